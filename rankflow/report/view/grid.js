// The heatmap: a row for each layer, a column for each type of module, a cell for each site.

import { css, inkOn, palette, shade } from "./colours.js";
import { clear, el, textWidth } from "./dom.js";

const [NARROWEST, WIDEST] = [16, 92];
const [LOWEST, HIGHEST] = [14, 30];
const GAP = 2;
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export class Grid {
  // inspect(site, cell) is called when a cell is pointed at or focused, with nulls when none is.
  constructor(inspect) {
    this.inspect = inspect;
    this.cells = new Map();
    this.table = el("div", {
      class: "grid",
      role: "grid",
      "aria-label": "Layers by module types",
      pointerover: (event) => this.point(event.target.closest("[data-site]")),
      pointerleave: () => this.inspect(null, null),
      focusin: (event) => this.focused(event.target),
      focusout: () => this.inspect(null, null),
      keydown: (event) => this.walk(event),
    });
    this.node = el("div", { class: "scroller", scroll: () => this.inspect(null, null) }, this.table);
    new ResizeObserver(() => this.fit()).observe(this.node);
  }

  // Build the cells of a layout, each at its place.
  build(layout, selection) {
    this.layout = layout;
    this.places = layout.rows.map(() => new Array(layout.columns.length).fill(null));
    for (const [site, [row, column, span]] of Object.entries(layout.cells)) {
      this.places[row].fill(site, column, column + span);
    }
    this.cells.clear();
    const corner = el("div", { class: "corner", role: "presentation" });
    const heads = layout.columns.map((label) => columnHead(label));
    clear(
      this.table,
      el("div", { role: "row" }, corner, ...heads),
      ...layout.rows.map((label, row) => this.row(label, row)),
    );
    this.cells.values().next().value?.setAttribute("tabindex", 0);
    this.paint(selection);
    this.fit();
  }

  row(label, row) {
    const { cells, groups } = this.layout;
    const opens = row > 0 && groups[row] !== groups[row - 1];
    const parts = [el("div", { class: "row-head", role: "rowheader", title: label }, label)];
    this.places[row].forEach((site, column) => {
      if (site === null) {
        parts.push(el("div", { class: "absent", role: "gridcell", "aria-label": "no adapter" }));
      } else if (cells[site][1] === column) {
        parts.push(this.cell(site, cells[site][2]));
      }
    });
    return el("div", { role: "row", class: opens ? "opens" : null }, ...parts);
  }

  cell(site, span) {
    const cell = el("div", { class: "cell", role: "gridcell", tabindex: -1, "data-site": site });
    if (span > 1) cell.style.gridColumn = `span ${span}`;
    this.cells.set(site, cell);
    return cell;
  }

  // Give every cell the colour and the text of the selection.
  paint(selection) {
    this.selection = selection;
    const scale = selection.scale();
    for (const [site, node] of this.cells) {
      const cell = selection.cell(site);
      const colour = colourOf(cell, scale, selection.compares);
      node.dataset.kind = cell.kind;
      node.dataset.magnitude = selection.magnitude(site);
      node.style.backgroundColor = colour === null ? "" : css(colour);
      node.style.color = colour === null ? "" : css(inkOn(colour));
      node.setAttribute("aria-label", `${site}: ${cell.text || cell.kind}`);
      this.write(node, cell.text);
    }
  }

  // A text that does not fit is left out: the colour stays, and the card has the number.
  write(node, text) {
    node.dataset.text = text;
    const span = this.layout.cells[node.dataset.site][2];
    const room = this.width * span - (node.dataset.magnitude === "" ? 4 : 12);
    node.textContent = this.measure(text) <= room ? text : this.shorten(text, room);
  }

  shorten(text, room) {
    const letter = text.endsWith(" only") ? text[0] : "";
    return this.measure(letter) <= room ? letter : "";
  }

  measure(text) {
    if (!this.widths.has(text)) this.widths.set(text, textWidth(text, this.table, this.size));
    return this.widths.get(text);
  }

  widths = new Map();
  width = WIDEST;
  size = 12;

  // Find sizes at which the grid fills its room.
  fit() {
    if (this.layout === undefined || this.node.clientWidth === 0) return;
    const { rows, columns } = this.layout;
    const label = rows.reduce((most, row) => Math.max(most, textWidth(row, this.table, 12)), 0);
    const labels = Math.min(label, 170) + 14;
    const across = Math.floor((this.node.clientWidth - labels - 12) / columns.length) - GAP;
    this.width = Math.min(Math.max(across, NARROWEST), WIDEST);
    const upright = columns.some((name) =>
      name.split(".").some((part) => textWidth(part, this.table, 11) > this.width - 2),
    );
    this.table.classList.toggle("upright", upright);
    this.table.style.setProperty("--columns", columns.length);
    this.table.style.setProperty("--width", `${this.width}px`);
    this.table.style.setProperty("--labels", `${labels}px`);
    const height = this.findHeight(rows.length);
    this.size = height >= 20 ? 12 : 10;
    this.table.style.setProperty("--height", `${height}px`);
    this.table.style.setProperty("--size", `${this.size}px`);
    this.widths.clear();
    for (const node of this.cells.values()) this.write(node, node.dataset.text);
  }

  findHeight(rows) {
    const bounded = getComputedStyle(this.node).overflowY === "auto";
    if (!bounded) return 26;
    const head = this.table.querySelector(".column-head")?.offsetHeight ?? 0;
    const down = Math.floor((this.node.clientHeight - head - 24) / rows) - GAP;
    return Math.min(Math.max(down, LOWEST), HIGHEST);
  }

  point(cell) {
    this.inspect(cell === null ? null : cell.dataset.site, cell);
  }

  focused(cell) {
    for (const node of this.cells.values()) node.setAttribute("tabindex", -1);
    cell.setAttribute("tabindex", 0);
    this.point(cell);
  }

  // Arrows go to the next site in their direction, over empty places.
  walk(event) {
    const step = STEPS[event.key];
    if (step === undefined || event.target.dataset.site === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const site = event.target.dataset.site;
    let [row, column] = this.layout.cells[site];
    do {
      row += step[0];
      column += step[1];
      const next = this.places[row]?.[column];
      if (next === undefined) return;
      if (next !== null && next !== site) return void this.cells.get(next).focus();
    } while (true);
  }
}

function columnHead(label) {
  const lines = label.split(".").map((part) => el("span", {}, part));
  return el("div", { class: "column-head", role: "columnheader", title: label }, ...lines);
}

function colourOf(cell, scale, compares) {
  const { ramp, diverging, nothing, broken } = palette();
  if (cell.kind === "value") return shade(compares ? diverging : ramp, scale.fraction(cell.value));
  if (cell.kind === "nothing") return nothing;
  return cell.kind === "broken" ? broken : null;
}
