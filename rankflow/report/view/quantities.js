// What a cell may show, how it is written, and where it stands on a scale from 0 to 1.

import { compact, digits, signed, whole } from "./format.js";

const DECADES = 4;

export const QUANTITIES = [
  {
    key: "rank",
    label: "Rank",
    fact: "Rank",
    column: "ranks",
    unit: "Rank: components of a site",
    zero: "rank 0",
    unknown: "not told",
    lacking: "",
    brief: whole,
    exact: whole,
    scale: (range) => fromOne(range.greatest),
  },
  {
    key: "importance",
    label: "Importance",
    fact: "Importance",
    column: "importance",
    unit: "Importance: sum of scores before the event",
    zero: "none (\u2264 0)",
    unknown: "not told",
    lacking: "",
    brief: (value) => digits(value, 2),
    exact: digits,
    scale: (range) => logarithmic(range.least, range.greatest),
  },
  {
    key: "parameters",
    label: "Parameters",
    fact: "Parameters",
    column: "parameters",
    unit: "Trainable parameters of a site",
    zero: "none",
    unknown: "not told",
    lacking: "Its events do not tell parameters: an earlier version wrote them.",
    brief: compact,
    exact: whole,
    scale: (range) => linear(range.greatest, compact),
  },
  {
    key: "magnitude",
    label: "Magnitude",
    fact: "|m / n \u2212 1|",
    column: "magnitude_change",
    unit: "Magnitude: mean |m / n \u2212 1| before the event",
    zero: "no change",
    unknown: "no magnitude trained",
    lacking: "None of its events tells of a trained magnitude.",
    brief: (value) => digits(value, 2),
    exact: digits,
    scale: (range) => linear(range.greatest, (value) => digits(value, 2)),
  },
];

// A scale knows a value's place, and marks: where they stand and what they say.
function fromOne(greatest) {
  const top = Math.max(greatest, 2);
  const count = Math.min(top, 6);
  const marks = new Set();
  for (let i = 0; i < count; i++) marks.add(Math.round(1 + (i * (top - 1)) / (count - 1)));
  const fraction = (value) => (value - 1) / (top - 1);
  const mark = (value) => ({ at: fraction(value), text: whole(value) });
  return { fraction, marks: [...marks].map(mark) };
}

function linear(greatest, format) {
  const marks = [0, 0.5, 1].map((at) => ({ at, text: at === 0 ? "0" : format(at * greatest) }));
  return { fraction: (value) => value / greatest, marks };
}

function logarithmic(least, greatest) {
  const bottom = Math.min(Math.max(least, greatest / 10 ** DECADES), greatest / 10);
  const length = Math.log(greatest / bottom);
  const marks = [0, 0.5, 1].map((at) => ({ at, text: digits(bottom * Math.exp(at * length), 2) }));
  return { fraction: (value) => Math.log(value / bottom) / length, marks };
}

// No difference stands in the middle.
export function symmetric(greatest, format) {
  const text = (at) => (at === 0 ? "0" : signed(at * greatest, format));
  const marks = [-1, 0, 1].map((at) => ({ at: (1 + at) / 2, text: text(at) }));
  return { fraction: (value) => 0.5 + value / (2 * greatest), marks };
}
