// The heatmap: a row for each layer, a column for each type of module, a cell for each site.

import { css, inkOn, palette, shade } from "./colours.js";
import { clear, el, widest } from "./dom.js";
import { drawLegend } from "./legend.js";

const [NARROWEST, WIDEST] = [16, 150];
const [LOWEST, HIGHEST] = [14, 46];
const SIZES = [13, 12, 11, 10, 9];
const GAP = 2;
const NARROW = "(max-width: 900px)"; // as in the style sheet
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export class Grid {
  // inspect(site, cell) is called when a cell is pointed at or focused, with nulls when none is.
  constructor(inspect) {
    this.inspect = inspect;
    this.cells = new Map();
    [this.width, this.height] = [WIDEST, HIGHEST];
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
    const scroll = () => this.inspect(null, null);
    this.scroller = el("div", { class: "scroller", scroll }, this.table);
    this.legend = el("footer", { class: "legend" });
    this.node = el("section", { class: "map" }, this.scroller, this.legend);
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
    const scale = selection.scale();
    for (const [site, node] of this.cells) {
      const cell = selection.cell(site);
      const colour = colourOf(cell, scale, selection.compares);
      node.dataset.kind = cell.kind;
      node.dataset.text = cell.text;
      node.dataset.magnitude = selection.magnitude(site);
      node.style.backgroundColor = colour === null ? "" : css(colour);
      node.style.color = colour === null ? "" : css(inkOn(colour));
      node.setAttribute("aria-label", `${site}: ${cell.text || cell.kind}`);
    }
    drawLegend(this.legend, selection, [...this.cells.values()]);
    this.write();
  }

  // Texts have one size in all cells. Where none fits all, only the card tells the numbers.
  write() {
    const nodes = [...this.cells.values()];
    const numbers = nodes.filter(({ dataset }) => dataset.kind !== "single");
    const texts = new Set(numbers.map(({ dataset }) => dataset.text));
    const room = this.width - (this.height < 24 ? 12 : 3); // in a low cell the dot stands beside
    const fits = (some, size) => widest(some, this.table, size) <= room;
    const fit = SIZES.find((size) => size < this.height - 3 && fits(texts, size));
    const size = fit ?? SIZES.at(-1);
    this.table.style.setProperty("--size", `${size}px`);
    for (const node of nodes) {
      const { kind, text } = node.dataset;
      if (kind === "single") node.textContent = fits([text], size) ? text : text[0];
      else node.textContent = fit === undefined ? "" : text;
    }
  }

  // Find sizes at which the grid fills its room.
  fit() {
    if (this.layout === undefined || this.scroller.clientWidth === 0) return;
    const { rows, columns } = this.layout;
    const labels = Math.min(widest(rows, this.table, 12), 170) + 14;
    const across = Math.floor((this.scroller.clientWidth - labels - 14) / columns.length) - GAP;
    this.width = Math.min(Math.max(across, NARROWEST), WIDEST);
    const words = columns.flatMap((name) => name.split("."));
    const upright = widest(words, this.table, 11) > this.width - 2;
    this.table.classList.toggle("upright", upright);
    this.table.style.setProperty("--columns", columns.length);
    this.table.style.setProperty("--width", `${this.width}px`);
    this.table.style.setProperty("--labels", `${labels}px`);
    this.height = this.findHeight(rows.length);
    this.table.style.setProperty("--height", `${this.height}px`);
    this.write();
  }

  // Rows share the height of the window; in a narrow one the page is as long as it must be.
  findHeight(rows) {
    if (matchMedia(NARROW).matches) return 26;
    const groups = this.layout.groups.at(-1);
    const around = this.table.querySelector(".column-head").offsetHeight + this.legend.offsetHeight;
    const down = Math.floor((this.node.clientHeight - around - 16 * groups - 24) / rows) - GAP;
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
    let next = site;
    while (next === null || next === site) {
      row += step[0];
      column += step[1];
      next = this.places[row]?.[column];
    }
    this.cells.get(next)?.focus();
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
