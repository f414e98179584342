// Pickers and sliders. They show the selection, and tell what the reader asks for.

import { clear, el, svg } from "./dom.js";
import { whole } from "./format.js";
import { QUANTITIES } from "./quantities.js";

const PLAY = "M5 3.5v11l9-5.5z";
const PAUSE = "M5 3.5h3v11H5zM10 3.5h3v11h-3z";
const GROUND = "M9 2a7 7 0 1 0 0 14A7 7 0 0 0 9 2zm0 1.6v10.8a5.4 5.4 0 0 0 0-10.8z";

// The line on top: which run, which quantity, compared with what, light or dark.
export class Header {
  constructor(ask) {
    this.runs = el("select", { name: "run", change: () => ask.run(this.runs.value) });
    this.quantities = el("div", { class: "segments", role: "radiogroup" });
    for (const { key, label } of QUANTITIES) {
      const change = () => ask.quantity(key);
      const input = el("input", { type: "radio", name: "quantity", value: key, change });
      this.quantities.append(el("label", {}, input, el("span", {}, label)));
    }
    this.compare = el("select", { name: "compare", change: () => ask.compare(this.compare.value) });
    this.ground = el("button", { class: "ground", type: "button", click: ask.ground });
    this.node = el(
      "header",
      {},
      el("label", { class: "field" }, el("span", {}, "Run"), this.runs),
      this.quantities,
      el("label", { class: "field" }, el("span", {}, "Compare with"), this.compare),
      this.ground,
    );
  }

  draw(selection, names, ground) {
    const { run, quantity } = selection;
    fillSelect(this.runs, names.map((name) => el("option", { value: name }, name)), run.name);
    for (const input of this.quantities.querySelectorAll("input")) {
      const { column, lacking } = QUANTITIES.find(({ key }) => key === input.value);
      input.disabled = !run.knows(column);
      input.checked = input.value === quantity.key;
      input.parentNode.title = input.disabled ? lacking : "";
    }
    fillSelect(this.compare, choices(names, run), choiceOf(selection));
    clear(this.ground, icon(GROUND), ground[0].toUpperCase() + ground.slice(1));
    this.ground.setAttribute("aria-label", `Light or dark: ${ground}`);
  }
}

function choices(names, run) {
  const others = names.filter((name) => name !== run.name);
  const options = [
    el("option", { value: "" }, "nothing"),
    el("optgroup", { label: "this run" },
      el("option", { value: "before" }, "the event before"),
      el("option", { value: "fixed" }, "a fixed event"),
    ),
  ];
  if (others.length > 0) {
    const each = others.map((name) => el("option", { value: `run:${name}` }, name));
    options.push(el("optgroup", { label: "another run" }, ...each));
  }
  return options;
}

function choiceOf(selection) {
  if (!selection.compares) return "";
  if (!selection.withItself) return `run:${selection.other.name}`;
  return selection.linked ? "before" : "fixed";
}

// Options are only made anew if they changed, so that an open list stays open.
function fillSelect(select, options, value) {
  const text = options.map((option) => option.outerHTML).join("");
  if (select.dataset.options !== text) {
    clear(select, ...options);
    select.dataset.options = text;
  }
  select.value = value;
}

// The sliders over the events, one more for what is compared with.
export class Timeline {
  constructor(ask) {
    this.play = el("button", { class: "play", type: "button", click: ask.play });
    this.shown = slider("at", "Event", (at) => ask.at(at));
    this.reference = slider("against", "Event compared with", (at) => ask.against(at));
    const change = () => ask.linked(this.same.checked);
    this.same = el("input", { type: "checkbox", name: "linked", change });
    this.link = el("label", { class: "link" }, this.same, "same step");
    this.second = el("div", { class: "line" }, el("span"), ...this.reference.parts, this.link);
    const first = el("div", { class: "line" }, this.play, ...this.shown.parts, el("span"));
    this.node = el("section", { class: "timeline", "aria-label": "Events" }, first, this.second);
  }

  draw(selection, playing) {
    const { run, at, other, against, compares, linked, withItself } = selection;
    clear(this.play, icon(playing ? PAUSE : PLAY));
    this.play.setAttribute("aria-label", playing ? "Pause" : "Play");
    drawSlider(this.shown, run, at, compares ? tagOf("A", run, withItself) : "");
    this.second.hidden = !compares;
    if (!compares) return;
    drawSlider(this.reference, other, against, tagOf("B", other, withItself));
    this.link.style.visibility = withItself ? "hidden" : "";
    this.same.checked = linked;
  }
}

function slider(name, label, move) {
  const tag = el("span", { class: "tag" });
  const text = el("output", { class: "when", name });
  const moved = () => move(Number(input.value));
  const input = el("input", { type: "range", name, min: 0, "aria-label": label, input: moved });
  return { parts: [tag, input, text], tag, input, text };
}

function tagOf(letter, run, alone) {
  return alone ? letter : `${letter} \u00b7 ${run.name}`;
}

function drawSlider({ tag, input, text }, run, at, name) {
  const { index, step } = run.events[at];
  tag.textContent = tag.title = name;
  input.max = run.last;
  input.value = at;
  input.setAttribute("aria-valuetext", `event ${index}, step ${step}`);
  input.style.setProperty("--done", `${run.last > 0 ? (100 * at) / run.last : 100}%`);
  const latest = at === run.last ? el("i", {}, "latest") : null;
  clear(text, el("b", {}, `event ${index}`), ` \u00b7 step ${whole(step)}`, latest);
}

function icon(path) {
  const size = { viewBox: "0 0 18 18", width: 18, height: 18 };
  return svg("svg", { ...size, "aria-hidden": true }, svg("path", { d: path }));
}
