// The colour of a cell, and the page's ground. COLOURS comes from Python.

let ground = "light";

export function setGround(name) {
  ground = name;
}

export function palette() {
  return COLOURS[ground];
}

export function css(colour) {
  return `rgb(${colour.join(" ")})`;
}

// A point between evenly spaced colours; fractions outside 0 to 1 take the nearer end.
export function shade(ramp, fraction) {
  const position = Math.min(Math.max(fraction, 0), 1) * (ramp.length - 1);
  const lower = Math.min(Math.floor(position), ramp.length - 2);
  const weight = position - lower;
  return ramp[lower].map((a, i) => Math.round(a + weight * (ramp[lower + 1][i] - a)));
}

// The ink that reads well on a colour, by its luma (ITU-R BT.601).
export function inkOn([red, green, blue]) {
  const [dark, light] = palette().inks;
  return 0.299 * red + 0.587 * green + 0.114 * blue > 112 ? dark : light;
}

export function gradient(ramp) {
  return `linear-gradient(90deg, ${ramp.map(css).join(", ")})`;
}
