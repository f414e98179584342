// What the colours and the marks mean; only what is on the page is named.

import { css, gradient, palette } from "./colours.js";
import { clear, el } from "./dom.js";

export function drawLegend(node, selection, cells) {
  const { quantity, compares } = selection;
  const { ramp, diverging, nothing, broken } = palette();
  const kinds = new Set(cells.map((cell) => cell.dataset.kind));
  const marks = new Set(cells.map((cell) => cell.dataset.magnitude));
  const entries = [
    kinds.has("nothing") ? entry("swatch", quantity.zero, css(nothing)) : null,
    kinds.has("broken") ? entry("swatch", "not finite", css(broken)) : null,
    kinds.has("unknown") ? entry("swatch unknown", quantity.unknown) : null,
    kinds.has("single") ? entry("swatch single", "a site of one run only") : null,
    marks.has("on") ? entry("dot", "magnitude trained") : null,
    marks.has("gained") ? entry("dot", "magnitude in A only") : null,
    marks.has("lost") ? entry("ring", "magnitude in B only") : null,
  ];
  const bar = el("div", { class: "bar" });
  bar.style.backgroundImage = gradient(compares ? diverging : ramp);
  const unit = compares ? `${quantity.label}, A \u2212 B` : quantity.unit;
  clear(
    node,
    el("div", { class: "scale" }, el("span", {}, unit), bar, ticks(selection.scale().marks)),
    el("div", { class: "entries" }, ...entries.filter((one) => one !== null)),
  );
}

function ticks(marks) {
  const texts = marks.map(({ at, text }) => {
    const tick = el("span", {}, text);
    tick.style.left = `${100 * at}%`;
    return tick;
  });
  return el("div", { class: "ticks" }, ...texts);
}

function entry(className, text, colour = null) {
  const mark = el("i", { class: className });
  if (colour !== null) mark.style.backgroundColor = colour;
  return el("span", { class: "entry" }, mark, text);
}
