// What an event did, or how two differ, in a few lines.

import { extremes } from "./chart.js";
import { clear, el } from "./dom.js";
import { plural, signed, whole } from "./format.js";

const MOST_MOVES = 8;

export function drawSummary(node, selection, layout) {
  const { run, at, event } = selection;
  const [title, lines, from] = selection.compares
    ? ["Difference", differences(selection), [selection.other, selection.against, "ranks"]]
    : [`Event ${event.index}`, did(event), [run, at, "ranks_before"]];
  const list = lines.map((text) => el("li", {}, text));
  clear(
    node,
    el("h2", {}, title),
    el("ul", { class: "lines" }, ...list),
    ...moves(selection, layout, ...from),
  );
}

function did(event) {
  const ranks = event.ranks.filter((rank) => rank !== null);
  const [least, most] = extremes(ranks);
  const total = sum(ranks);
  const budgeted = event.magnitudes.filter((on) => on !== null);
  const trained = budgeted.filter((on) => on).length;
  return [
    `pruned ${counted(event, false)}`,
    `born ${counted(event, true)}`,
    `ranks ${least} to ${most}, mean ${(total / ranks.length).toFixed(1)}, ${whole(total)} in all`,
    ...(budgeted.length > 0 ? [`magnitudes ${trained} of ${budgeted.length}`] : []),
    `spent ${whole(event.spent_before)} before, ${whole(event.spent)} after`,
  ];
}

function counted(event, born) {
  let [components, magnitudes] = [0, 0];
  for (const change of event.changes) {
    if (change.born !== born) continue;
    if (change.magnitude) magnitudes += 1;
    else components += change.count;
  }
  const parts = [];
  if (components > 0) parts.push(plural(components, "component"));
  if (magnitudes > 0) parts.push(plural(magnitudes, "magnitude"));
  return parts.join(" and ") || "nothing";
}

function differences(selection) {
  const { run, other, event, reference } = selection;
  const lines = [
    `${signed(event.spent - reference.spent, whole)} parameters`,
    `${signed(sum(event.ranks) - sum(reference.ranks), whole)} components`,
  ];
  const count = (letter, noun, sites) => {
    if (sites.length > 0) lines.push(`${plural(sites.length, noun)} in ${letter} only`);
  };
  count("A", "magnitude", run.sites.filter((site) => selection.magnitude(site) === "gained"));
  count("B", "magnitude", run.sites.filter((site) => selection.magnitude(site) === "lost"));
  count("A", "site", run.sites.filter((site) => !other.has(site)));
  count("B", "site", other.sites.filter((site) => !run.has(site)));
  return lines;
}

// The sites whose rank differs most from what it is compared with.
function moves(selection, layout, run, at, column) {
  const moved = [];
  for (const site of selection.run.sites) {
    const now = selection.run.value(selection.at, site, "ranks");
    const before = run.value(at, site, column);
    if (now !== null && before !== null && now !== before) moved.push({ site, before, now });
  }
  if (moved.length === 0) return [el("p", { class: "note" }, "All ranks are the same.")];
  moved.sort((a, b) => Math.abs(b.now - b.before) - Math.abs(a.now - a.before));
  const rows = moved.slice(0, MOST_MOVES).map(({ site, before, now }) =>
    el(
      "tr",
      {},
      el("td", { class: "name", title: site }, placeOf(site, layout)),
      el("td", {}, `${before} \u2192 ${now}`),
      el("td", { class: "change" }, signed(now - before, whole)),
    ),
  );
  const rest = moved.length - rows.length;
  const note = rest > 0 ? el("p", { class: "note" }, `and ${plural(rest, "site")} more`) : null;
  return [el("table", { class: "moves" }, el("tbody", {}, ...rows)), note];
}

// A site's row and column, which are shorter than its name.
function placeOf(site, { rows, columns, cells }) {
  const [row, column, span] = cells[site];
  const alone = span > 1 || columns.length === 1;
  return alone ? rows[row] : `${rows[row]} \u00b7 ${columns[column]}`;
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + (number ?? 0), 0);
}
