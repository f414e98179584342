// A run: its sites and its events, in columns over the sites.

export class Run {
  constructor(name) {
    this.name = name;
    this.clear();
  }

  clear() {
    this.sites = [];
    this.place = new Map();
    this.events = [];
    this.ranges = new Map();
  }

  // Take more events; false if their sites are others, and all events must be read again.
  add(view) {
    if (this.events.length === 0) {
      this.sites = view.sites;
      this.place = new Map(view.sites.map((site, i) => [site, i]));
    } else if (view.events.length > 0 && view.sites.join("\n") !== this.sites.join("\n")) {
      return false;
    }
    this.events.push(...view.events);
    this.ranges.clear();
    return true;
  }

  get last() {
    return this.events.length - 1;
  }

  has(site) {
    return this.place.has(site);
  }

  // A column's value at a site; null where the event does not know it, or the run the site.
  value(at, site, column) {
    const place = this.place.get(site);
    return place === undefined ? null : this.events[at][column][place];
  }

  // Whether a site trains a magnitude after an event; null where it cannot.
  trains(at, site) {
    const budgeted = this.value(at, site, "magnitudes");
    if (budgeted !== null) return budgeted;
    return this.value(at, site, "magnitude_change") === null ? null : true;
  }

  // Least and greatest positive number of a column, over all events; null if there is none.
  range(column) {
    if (!this.ranges.has(column)) this.ranges.set(column, this.findRange(column));
    return this.ranges.get(column);
  }

  findRange(column) {
    let [least, greatest] = [Infinity, 0];
    for (const event of this.events) {
      for (const value of event[column]) {
        if (value > 0 && value < Infinity) {
          least = Math.min(least, value);
          greatest = Math.max(greatest, value);
        }
      }
    }
    return greatest > 0 ? { least, greatest } : null;
  }

  // Whether any event knows the column.
  knows(column) {
    return this.events.some((event) => event[column].some((value) => value !== null));
  }

  // The last event at or before a step; the first one if none is.
  atStep(step) {
    let at = 0;
    while (at < this.last && this.events[at + 1].step <= step) at++;
    return at;
  }

  // The latest changes of a site up to an event, the newest first.
  changes(at, site, most) {
    const place = this.place.get(site);
    const found = [];
    for (let i = at; i >= 0 && found.length < most; i--) {
      for (const change of this.events[i].changes) {
        if (change.site === place) found.push({ step: this.events[i].step, ...change });
      }
    }
    return found.slice(0, most);
  }
}
