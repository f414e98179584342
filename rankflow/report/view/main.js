// The page: it loads runs, keeps the selection, and has every part drawn when something changes.

import { BudgetChart } from "./budget.js";
import { Card } from "./card.js";
import { Header, Timeline } from "./controls.js";
import { el } from "./dom.js";
import { Grid } from "./grid.js";
import { Ground } from "./ground.js";
import { QUANTITIES } from "./quantities.js";
import { Run } from "./run.js";
import { Selection } from "./selection.js";
import { findSource } from "./source.js";
import { drawSummary } from "./summary.js";

const POLL_MILLISECONDS = 4000;
const [PLAY_MILLISECONDS, FASTEST, SLOWEST] = [9000, 50, 500];

export function render() {
  document.head.append(el("style", {}, STYLE));
  const view = new View(findSource());
  document.body.append(view.root);
  view.ground.apply();
  view.start();
}

class View {
  constructor(source) {
    this.source = source;
    this.selection = new Selection();
    this.runs = new Map();
    this.names = [];
    this.laidOut = "";
    this.timer = null;
    this.busy = Promise.resolve();
    this.build();
    this.ground = new Ground(this.root, () => this.update());
    document.addEventListener("keydown", (event) => this.key(event));
  }

  build() {
    const ask = {
      run: (name) => this.attempt(() => this.open(name)),
      quantity: (key) => this.show(key),
      compare: (choice) => this.attempt(() => this.compare(choice)),
      ground: () => this.ground.next(),
      play: () => this.play(),
      at: (at) => this.moveTo(at),
      against: (at) => this.pin(at),
      linked: (linked) => this.link(linked),
    };
    this.header = new Header(ask);
    this.timeline = new Timeline(ask);
    this.grid = new Grid((site, cell) => this.inspect(site, cell));
    this.chart = new BudgetChart((at) => this.moveTo(at));
    this.card = new Card();
    this.summary = el("section", { class: "panel" });
    this.message = el("p", { class: "message", role: "status" });
    const keys = "\u2190 \u2192 move over events, space plays, Tab goes to the sites";
    this.content = el(
      "div",
      { class: "content", hidden: true },
      this.header.node,
      this.timeline.node,
      el("div", { class: "body" },
        this.grid.node,
        el("aside", {}, this.chart.node, this.summary, el("p", { class: "hint" }, keys)),
      ),
    );
    this.root = el("main", { class: "rankflow" }, this.message, this.content, this.card.node);
  }

  async start() {
    await this.attempt(() => this.poll());
    if (this.source.grows) setTimeout(() => this.start(), POLL_MILLISECONDS);
  }

  // Do something that takes time and may fail, after what is being done, and say so if it fails.
  attempt(action) {
    this.root.setAttribute("aria-busy", true);
    const attempted = async () => {
      try {
        await action();
        if (this.names.length > 0) this.say("");
      } catch (error) {
        this.say(error.message);
      } finally {
        this.root.setAttribute("aria-busy", false);
      }
    };
    this.busy = this.busy.then(attempted);
    return this.busy;
  }

  say(text) {
    this.message.textContent = text;
    this.message.hidden = text === "";
  }

  // Look for new runs, and for new events of the runs that are shown.
  async poll() {
    if (document.hidden && this.selection.run !== null) return;
    const found = await this.source.runs();
    this.names = found.map(({ name }) => name);
    if (found.length === 0) return this.say("No events yet. Ranks have not moved so far.");
    const { run, other } = this.selection;
    if (run === null || !this.names.includes(run.name)) return this.open(this.names[0]);
    for (const one of new Set([run, other])) {
      const count = found.find(({ name }) => name === one?.name)?.events ?? 0;
      if (count > 0 && count !== one.events.length) await this.grow(one, count);
    }
    return this.update();
  }

  // Read what a run has got since; fewer events than before mean that it began again.
  async grow(run, count) {
    const { selection } = this;
    const follows = selection.at === run.last && selection.run === run;
    if (count < run.events.length) run.clear();
    await this.read(run);
    const at = follows ? run.last : Math.min(selection.at, selection.run.last);
    selection.moveTo(at);
    await this.layOut();
  }

  async read(run) {
    const view = await this.source.events(run.name, run.events.length);
    if (run.add(view)) return;
    run.clear();
    run.add(await this.source.events(run.name, 0));
  }

  async load(name) {
    if (!this.runs.has(name)) {
      const run = new Run(name);
      await this.read(run);
      this.runs.set(name, run);
    }
    return this.runs.get(name);
  }

  async open(name) {
    const run = await this.load(name);
    const { selection } = this;
    const { withItself } = selection;
    this.stop();
    selection.run = run;
    if (selection.compares && withItself) selection.other = run;
    else if (selection.other === run) selection.other = null;
    if (!run.knows(selection.quantity.column)) selection.quantity = QUANTITIES[0];
    selection.moveTo(run.last);
    await this.layOut();
  }

  async compare(choice) {
    const { selection } = this;
    const other = choice.startsWith("run:") ? await this.load(choice.slice(4)) : selection.run;
    selection.other = choice === "" ? null : other;
    selection.linked = choice !== "fixed";
    selection.against = 0;
    selection.moveTo(selection.at);
    await this.layOut();
  }

  // Ask for the places of the sites, if other sites are shown than before.
  async layOut() {
    const { run, other } = this.selection;
    const shown = [...new Set([run, other])].filter((one) => one !== null);
    const sites = JSON.stringify(shown.map((one) => one.sites));
    if (this.laidOut !== sites) {
      const layout = await this.source.layout(shown.map((one) => one.name));
      this.content.hidden = false;
      this.grid.build(layout, this.selection);
      this.laidOut = sites;
    }
    this.update();
  }

  update() {
    const { selection } = this;
    if (this.laidOut === "") return;
    this.header.draw(selection, this.names, this.ground.choice);
    this.timeline.draw(selection, this.timer !== null);
    this.grid.paint(selection);
    this.chart.draw(selection);
    drawSummary(this.summary, selection, this.grid.layout);
    if (this.inspected) this.card.show(selection, ...this.inspected);
  }

  inspect(site, cell) {
    this.inspected = site === null ? null : [site, cell];
    if (site === null) this.card.hide();
    else this.card.show(this.selection, site, cell);
  }

  show(key) {
    this.selection.quantity = QUANTITIES.find((quantity) => quantity.key === key);
    this.update();
  }

  moveTo(at) {
    this.selection.moveTo(at);
    this.update();
  }

  pin(at) {
    this.selection.pin(at);
    this.update();
  }

  link(linked) {
    this.selection.linked = linked;
    this.moveTo(this.selection.at);
  }

  play() {
    if (this.timer !== null) this.stop();
    else {
      const { selection } = this;
      if (selection.at === selection.run.last) selection.moveTo(0);
      const share = PLAY_MILLISECONDS / selection.run.events.length;
      const pause = Math.min(Math.max(share, FASTEST), SLOWEST);
      this.timer = setInterval(() => this.step(), pause);
    }
    this.update();
  }

  step() {
    this.moveTo(this.selection.at + 1);
    if (this.selection.at === this.selection.run.last) {
      this.stop();
      this.update();
    }
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }

  key(event) {
    if (this.laidOut === "" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, button")) return;
    const { at, run } = this.selection;
    const goals = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: run.last };
    if (event.key in goals) this.moveTo(goals[event.key]);
    else if (event.key === " ") this.play();
    else if (event.key === "Escape") this.inspect(null, null);
    else return;
    event.preventDefault();
  }
}
