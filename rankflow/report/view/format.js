// Numbers as text.

const MINUS = "\u2212";
const GROUPED = new Intl.NumberFormat("en-US");

// 165888 -> "165,888"
export function whole(value) {
  return GROUPED.format(value).replace("-", MINUS);
}

// Significant digits, with an exponent where a plain number would be long: 0.0312, 1.2e-7
export function digits(value, count = 4) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "\u221e" : `${MINUS}\u221e`;
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text =
    size >= 1e5 || size < 1e-3 ? value.toExponential(count - 1) : value.toPrecision(count);
  return text.replace(/e\+?/, "e").replaceAll("-", MINUS);
}

// At most four characters where that is possible: 512, 3.1k, 24k, 1.2M
export function compact(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) {
      const scaled = value / unit;
      return `${scaled.toFixed(Math.abs(scaled) < 9.95 ? 1 : 0)}${letter}`.replace("-", MINUS);
    }
  }
  return whole(value);
}

// The text of a difference, with its sign: +3, -1, 0
export function signed(value, format) {
  return value > 0 ? `+${format(value)}` : format(value);
}

export function plural(count, noun) {
  return `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
}
