// The card beside a cell: everything that is known of its site.

import { axis, cursor, extremes, line, stairs } from "./chart.js";
import { clear, el, svg } from "./dom.js";
import { digits, plural, signed, whole } from "./format.js";
import { QUANTITIES } from "./quantities.js";

const MOST_CHANGES = 5;
const [WIDTH, HEIGHT] = [300, 46];
const EDGE = 8;

export class Card {
  constructor() {
    this.node = el("div", { class: "card", role: "tooltip", hidden: "" });
  }

  hide() {
    this.node.hidden = true;
  }

  // Tell of a site, beside its cell and within the window.
  show(selection, site, cell) {
    const { run, at } = selection;
    const facts = selection.compares ? compared(selection, site) : plain(selection, site);
    const { kind, text } = selection.cell(site);
    clear(
      this.node,
      el("h3", { "data-field": "site" }, ...broken(site)),
      kind === "single" ? el("p", { class: "note" }, `This site is in ${text}.`) : null,
      kind === "absent" ? el("p", { class: "note" }, "This run has no such site.") : null,
      facts,
      run.has(site) || selection.compares ? history(selection, site) : null,
      run.has(site) ? changes(run.changes(at, site, MOST_CHANGES)) : null,
    );
    this.node.hidden = false;
    this.place(cell.getBoundingClientRect());
  }

  place(cell) {
    const { offsetWidth: width, offsetHeight: height } = this.node;
    const { clientWidth, clientHeight } = document.documentElement;
    const right = cell.right + EDGE + width <= clientWidth - EDGE;
    const left = right ? cell.right + EDGE : cell.left - EDGE - width;
    const below = left < EDGE; // no room on either side
    const x = below ? Math.min(cell.left, clientWidth - EDGE - width) : left;
    const fits = cell.bottom + EDGE + height <= clientHeight - EDGE;
    const y = below ? (fits ? cell.bottom + EDGE : cell.top - EDGE - height) : cell.top - 12;
    this.node.style.left = `${Math.max(x, EDGE)}px`;
    this.node.style.top = `${Math.max(Math.min(y, clientHeight - EDGE - height), EDGE)}px`;
  }
}

// A long name may break at its dots.
function broken(name) {
  return name.split(/(?<=\.)/).flatMap((part) => [part, el("wbr")]);
}

function plain(selection, site) {
  const { run, at } = selection;
  const known = QUANTITIES.filter(({ column }) => run.value(at, site, column) !== null);
  const rows = known.map(({ key, fact, column, exact }) =>
    factRow(key, fact, [exact(run.value(at, site, column)), remark(run, at, site, key)]),
  );
  return el("table", { class: "facts" }, el("tbody", {}, ...rows, magnitudeRow([[run, at]], site)));
}

function remark(run, at, site, key) {
  const before = run.value(at, site, "ranks_before");
  if (key === "rank" && before !== run.value(at, site, "ranks")) return `before ${whole(before)}`;
  if (key === "importance" && before > 1) {
    return `${digits(run.value(at, site, "importance") / before, 3)} each`;
  }
  return key === "magnitude" ? "mean over rows" : "";
}

function compared(selection, site) {
  const { run, at, other, against } = selection;
  const rows = QUANTITIES.map(({ key, fact, column, exact }) => {
    const [value, reference] = [run.value(at, site, column), other.value(against, site, column)];
    if (value === null && reference === null) return null;
    const known = value !== null && reference !== null;
    const write = (number) => (number === null ? "\u2013" : exact(number));
    const difference = known ? signed(value - reference, exact) : "\u2013";
    return factRow(key, fact, [write(value), write(reference), difference]);
  });
  const head = ["", "A", "B", "A \u2212 B"].map((text) => el("th", {}, text));
  const body = rows.filter((row) => row !== null);
  const magnitude = magnitudeRow([[run, at], [other, against]], site);
  return el(
    "table",
    { class: "facts compared" },
    el("thead", {}, el("tr", {}, ...head)),
    el("tbody", {}, ...body, magnitude),
  );
}

function factRow(key, label, texts) {
  const cells = texts.map((text, i) => {
    const field = i === 0 ? key : `${key}-${i}`;
    return el("td", { "data-field": field }, text);
  });
  return el("tr", {}, el("th", {}, label), ...cells);
}

function magnitudeRow(states, site) {
  const texts = states.map(([run, at]) => {
    const trains = run.trains(at, site);
    return trains === null ? "none" : trains ? "on" : "off";
  });
  return texts.every((text) => text === "none") ? null : factRow("trained", "Magnitude", texts);
}

// The quantity shown, over the steps, with the event marked.
function history(selection, site) {
  const { run, other, quantity, event } = selection;
  const lines = selection.compares && !selection.withItself ? [run, other] : [run];
  const points = lines.map((one) =>
    one.events.map((e, at) => [e.step, one.value(at, site, quantity.column) ?? NaN]),
  );
  const known = points.flat().filter(([, value]) => Number.isFinite(value));
  if (known.length === 0) return null;
  const [first, last] = extremes(known.map(([step]) => step));
  const [least, greatest] = extremes(known.map(([, value]) => value));
  const x = axis(first, last, 4, WIDTH - 4);
  const y = axis(Math.min(least, 0), greatest, HEIGHT - 4, 4);
  const picture = svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "history" },
    lines.length > 1 ? line("other", stairs(points[1], x, y)) : null,
    line("spent", stairs(points[0], x, y)),
    cursor("cursor", x(event.step), 2, HEIGHT - 2),
  );
  const range = [...new Set([least, greatest].map((value) => quantity.exact(value)))].join(" to ");
  const caption = `${quantity.fact} over ${plural(run.events.length, "event")}: ${range}`;
  return el("figure", {}, picture, el("figcaption", {}, caption));
}

function changes(found) {
  if (found.length === 0) return null;
  const rows = found.map(({ step, born, magnitude, count, reason }) => {
    const what = magnitude ? "magnitude" : plural(count, "component");
    return el(
      "li",
      {},
      el("span", { class: "when" }, `step ${whole(step)}`),
      el("span", {}, `${born ? "+" : "\u2212"} ${what}`),
      el("span", { class: "why" }, reason),
    );
  });
  return el("ul", { class: "changes", "data-field": "changes" }, ...rows);
}
