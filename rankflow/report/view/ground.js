// Light or dark: as the reader chose, else as TensorBoard shows itself, else as the browser does.

import { setGround } from "./colours.js";

const CHOICES = ["auto", "light", "dark"];
const PREFERENCE = matchMedia("(prefers-color-scheme: dark)");

export class Ground {
  // changed() is called whenever the ground may be another one.
  constructor(root, changed) {
    this.root = root;
    this.changed = changed;
    this.choice = "auto";
    this.host = findHost();
    PREFERENCE.addEventListener("change", () => this.apply());
    if (this.host !== null) {
      const options = { attributes: true, attributeFilter: ["class"] };
      new MutationObserver(() => this.apply()).observe(this.host, options);
    }
  }

  next() {
    this.choice = CHOICES[(CHOICES.indexOf(this.choice) + 1) % CHOICES.length];
    this.apply();
  }

  apply() {
    const name = this.choice === "auto" ? this.automatic() : this.choice;
    setGround(name);
    this.root.dataset.ground = name;
    const { style } = document.documentElement; // the page beyond its content
    style.colorScheme = name;
    style.backgroundColor = getComputedStyle(this.root).backgroundColor;
    this.changed();
  }

  automatic() {
    const { host } = this;
    const dark = host === null ? PREFERENCE.matches : host.classList.contains("dark-mode");
    return dark ? "dark" : "light";
  }
}

// The body of the TensorBoard page around this frame; null where there is none, or none to look at.
function findHost() {
  if (window.parent === window) return null;
  try {
    const { body } = window.parent.document;
    return body.querySelector("tb-webapp") === null ? null : body;
  } catch {
    return null; // a page of another origin, such as a notebook's
  }
}
