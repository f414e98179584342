// Elements, made in one call. Text goes in as text and never as markup.

const SVG = "http://www.w3.org/2000/svg";

// el("p", {class: "note", "data-site": name}, "some ", el("b", {}, "text"))
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// Listeners are attributes that are functions; an attribute that is null is left out.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function clear(node, ...children) {
  node.replaceChildren(...children.filter((child) => child !== null));
  return node;
}

// The greatest width of some texts in pixels, in the font of an element at a size in pixels.
export function widest(texts, node, size) {
  const { fontWeight, fontFamily } = getComputedStyle(node);
  CANVAS.font = `${fontWeight} ${size}px ${fontFamily}`;
  let width = 0;
  for (const text of texts) width = Math.max(width, CANVAS.measureText(text).width);
  return width;
}

const CANVAS = document.createElement("canvas").getContext("2d");
