// What is shown: a run at an event, a quantity, and what it is compared with.

import { signed } from "./format.js";
import { QUANTITIES, symmetric } from "./quantities.js";

export class Selection {
  constructor() {
    this.run = null;
    this.at = 0; // position in run.events
    this.quantity = QUANTITIES[0];
    this.other = null; // the run compared with, this one included
    this.against = 0; // position in other.events
    this.linked = false; // whether `against` follows `at`
    this.largest = { key: "", value: 0 };
  }

  get event() {
    return this.run.events[this.at];
  }

  get compares() {
    return this.other !== null;
  }

  get withItself() {
    return this.other === this.run;
  }

  get reference() {
    return this.other.events[this.against];
  }

  moveTo(at) {
    this.at = Math.min(Math.max(at, 0), this.run.last);
    if (this.compares) this.against = this.referenceOf(this.at);
  }

  pin(against) {
    this.linked = false;
    this.against = Math.min(Math.max(against, 0), this.other.last);
  }

  // Which event is compared with one: the one before it, or the other run's at the same step.
  referenceOf(at) {
    if (!this.linked) return Math.min(this.against, this.other.last);
    return this.withItself ? Math.max(at - 1, 0) : this.other.atStep(this.run.events[at].step);
  }

  // What a cell shows: its kind, its number, and the text of it.
  cell(site) {
    return this.compares ? this.difference(site) : this.plain(site);
  }

  plain(site) {
    const value = this.run.value(this.at, site, this.quantity.column);
    if (value === null) return { kind: this.run.has(site) ? "unknown" : "absent", text: "" };
    const kind = Number.isFinite(value) ? (value > 0 ? "value" : "nothing") : "broken";
    return { kind, value, text: this.quantity.brief(value) };
  }

  difference(site) {
    const [here, there] = [this.run.has(site), this.other.has(site)];
    if (!here && !there) return { kind: "absent", text: "" };
    if (!here || !there) return { kind: "single", text: here ? "A only" : "B only" };
    const value = this.differenceAt(this.at, this.against, site);
    if (value === null) return { kind: "unknown", text: "" };
    const text = signed(value, this.quantity.brief);
    return { kind: Number.isFinite(value) ? "value" : "broken", value, text };
  }

  differenceAt(at, against, site) {
    const value = this.run.value(at, site, this.quantity.column);
    const reference = this.other.value(against, site, this.quantity.column);
    return value === null || reference === null ? null : value - reference;
  }

  // One scale for all events, so that colours can be compared while the slider moves.
  scale() {
    if (this.compares) return symmetric(this.largestDifference() || 1, this.quantity.brief);
    const range = this.run.range(this.quantity.column) ?? { least: 1, greatest: 1 };
    return this.quantity.scale(range);
  }

  largestDifference() {
    const { run, other, linked, quantity } = this;
    const pinned = linked ? "" : this.against;
    const sizes = [run.events.length, other.events.length];
    const key = [run.name, other.name, ...sizes, linked, pinned, quantity.key].join("\n");
    if (this.largest.key !== key) this.largest = { key, value: this.findLargestDifference() };
    return this.largest.value;
  }

  findLargestDifference() {
    let largest = 0;
    for (let at = 0; at <= this.run.last; at++) {
      const against = this.referenceOf(at);
      for (const site of this.run.sites) {
        const size = Math.abs(this.differenceAt(at, against, site) ?? 0);
        if (size > largest && size < Infinity) largest = size;
      }
    }
    return largest;
  }

  // Whether a magnitude is trained: "on", or against the reference "gained" or "lost"; else "".
  magnitude(site) {
    const now = this.run.value(this.at, site, "magnitudes") === true;
    if (!this.compares) return now ? "on" : "";
    if (!this.run.has(site) || !this.other.has(site)) return "";
    const before = this.other.value(this.against, site, "magnitudes") === true;
    return now === before ? "" : now ? "gained" : "lost";
  }
}
