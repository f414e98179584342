// Lines over the optimizer steps: the budget and what is spent of it, and a site's history.

import { svg } from "./dom.js";

// Steps and values of a run, as the corners of a staircase: a value holds until the next event.
export function stairs(points, x, y) {
  let path = "";
  for (const [step, value] of points) {
    if (!Number.isFinite(value)) continue;
    path += path === "" ? `M${x(step)} ${y(value)}` : `H${x(step)}V${y(value)}`;
  }
  return path;
}

// A linear map from numbers to pixels.
export function axis(from, to, start, end) {
  const length = to - from || 1;
  return (value) => (start + ((value - from) / length) * (end - start)).toFixed(1);
}

export function line(className, path) {
  return svg("path", { class: className, d: path });
}

export function cursor(className, x, top, bottom) {
  return svg("line", { class: className, x1: x, x2: x, y1: top, y2: bottom });
}

// The least and the greatest of some numbers.
export function extremes(numbers) {
  return numbers.reduce(([a, b], n) => [Math.min(a, n), Math.max(b, n)], [Infinity, -Infinity]);
}

// Round numbers that divide a range from 0 into two to five parts.
export function roundMarks(greatest) {
  const power = 10 ** Math.floor(Math.log10(greatest || 1));
  const step = [0.2, 0.5, 1, 2].map((part) => part * power).find((size) => greatest / size <= 5);
  const marks = [];
  for (let mark = 0; mark <= greatest; mark += step) marks.push(mark);
  return marks;
}
