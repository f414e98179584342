// Elements, made in one call. Text goes in as text and never as markup.

const SVG = "http://www.w3.org/2000/svg";

// el("p", {class: "note", "data-site": name}, "some ", el("b", {}, "text"))
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// Listeners are attributes that are functions; an attribute that is null or false is left out.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function clear(node, ...children) {
  node.replaceChildren(...children.filter((child) => child !== null));
  return node;
}

// Width of a text in pixels, in the font of an element.
export function textWidth(text, node, size) {
  const style = getComputedStyle(node);
  CANVAS.font = `${style.fontWeight} ${size}px ${style.fontFamily}`;
  return CANVAS.measureText(text).width;
}

const CANVAS = document.createElement("canvas").getContext("2d");
