// The chart of the budget and of what is spent, with a cursor at the event.

import { axis, cursor, line, roundMarks, stairs } from "./chart.js";
import { clear, el, svg } from "./dom.js";
import { compact, whole } from "./format.js";

const HEIGHT = 176;
const [LEFT, RIGHT, TOP, BOTTOM] = [44, 10, 10, 22];

export class BudgetChart {
  // choose(at) is called with the event nearest to where the chart is pressed.
  constructor(choose) {
    this.choose = choose;
    this.picture = svg("svg", {
      class: "chart",
      role: "img",
      height: HEIGHT,
      pointerdown: (event) => this.press(event),
      pointermove: (event) => event.buttons === 1 && this.press(event),
    });
    this.share = el("span", {});
    this.numbers = el("p", { class: "numbers" });
    const title = el("h2", {}, "Budget", this.share);
    this.node = el("section", { class: "panel" }, title, this.numbers, this.picture);
    new ResizeObserver(() => this.selection && this.draw(this.selection)).observe(this.node);
  }

  draw(selection) {
    this.selection = selection;
    const { run, other, event } = selection;
    const width = this.node.clientWidth;
    if (width === 0) return;
    const runs = selection.compares && !selection.withItself ? [run, other] : [run];
    const [first, last, most] = extent(runs);
    const [bottom, right] = [HEIGHT - BOTTOM, width - RIGHT];
    const x = (this.x = axis(first, last, LEFT, right));
    const y = axis(0, most * 1.05, bottom, TOP);
    this.tell(selection, runs);
    this.picture.setAttribute("width", width);
    this.picture.setAttribute("aria-label", `budget ${event.limit}, spent ${event.spent}`);
    const parts = [...marksOf(y, most, right), ...stepsOf(x, first, last, bottom)];
    const spent = stairs(eventPoints(run, "spent"), x, y);
    parts.push(line("area", `${spent}V${bottom}H${x(run.events[0].step)}Z`), line("spent", spent));
    if (runs.length > 1) parts.push(line("other", stairs(eventPoints(other, "spent"), x, y)));
    parts.push(line("limit", stairs(eventPoints(run, "limit"), x, y)));
    if (selection.compares) {
      parts.push(cursor("reference", x(selection.reference.step), TOP, bottom));
    }
    parts.push(cursor("cursor", x(event.step), TOP, bottom));
    parts.push(svg("circle", { class: "here", cx: x(event.step), cy: y(event.spent), r: 3.5 }));
    clear(this.picture, ...parts);
  }

  tell(selection, runs) {
    const { event } = selection;
    const share = event.limit > 0 ? (100 * event.spent) / event.limit : 100;
    this.share.textContent = `${share.toFixed(1)}% spent`;
    const numbers = [["limit", "budget", event.limit], ["spent", "spent", event.spent]];
    if (runs.length > 1) numbers.push(["other", "B spent", selection.reference.spent]);
    const parts = numbers.map(([key, label, value]) => {
      const number = el("b", { "data-field": key }, whole(value));
      return el("span", { class: `key ${key}` }, `${label} `, number);
    });
    clear(this.numbers, ...parts);
  }

  press(event) {
    const at = event.clientX - this.picture.getBoundingClientRect().left;
    const { events } = this.selection.run;
    let nearest = 0;
    const distance = (i) => Math.abs(this.x(events[i].step) - at);
    for (let i = 1; i < events.length; i++) if (distance(i) < distance(nearest)) nearest = i;
    this.choose(nearest);
  }
}

function eventPoints(run, key) {
  return run.events.map((event) => [event.step, event[key]]);
}

function extent(runs) {
  let [first, last, most] = [Infinity, 0, 1];
  for (const run of runs) {
    for (const event of run.events) {
      first = Math.min(first, event.step);
      last = Math.max(last, event.step);
      most = Math.max(most, event.limit, event.spent);
    }
  }
  return [first, last, most];
}

function marksOf(y, most, right) {
  return roundMarks(most).flatMap((mark) => [
    svg("line", { class: "rule", x1: LEFT, x2: right, y1: y(mark), y2: y(mark) }),
    svg("text", { class: "mark end", x: LEFT - 6, y: y(mark), dy: "0.35em" }, compact(mark)),
  ]);
}

function stepsOf(x, first, last, bottom) {
  const texts = [[first, "start", `step ${whole(first)}`], [last, "end", whole(last)]];
  return texts.map(([step, side, text]) =>
    svg("text", { class: `mark ${side}`, x: x(step), y: bottom + 15 }, text),
  );
}
