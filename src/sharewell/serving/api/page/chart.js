// A small line chart of the recent past, as inline SVG that takes its colours from the style sheet.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600; // of the view box; the element itself is as wide as its place
const HEIGHT = 100;

function svg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

export class Sparkline {
  /**
   * From `leastS` to `mostS` seconds of history in `root`, as far as there is any. `describe(value, ageS)` words one
   * point, `summarize(last, peak)` all of them.
   */
  constructor(root, { leastS, mostS, describe, summarize }) {
    Object.assign(this, { root, leastS, mostS, describe, summarize });
    this.points = []; // [time in s, value], null where nothing is known
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, x1: -9, x2: -9 });
    this.svg.append(this.area, this.line, this.cursor);
    this.tip = document.createElement("span");
    this.tip.className = "tip";
    this.tip.hidden = true;
    root.append(this.svg, this.tip);
    root.addEventListener("pointermove", (event) => this.point(event));
    root.addEventListener("pointerleave", () => this.point(null));
  }

  /** Seconds that the width stands for. */
  get spanS() {
    const age = this.points.length ? this.points.at(-1)[0] - this.points[0][0] : 0;
    return Math.min(this.mostS, Math.max(this.leastS, age));
  }

  get peak() {
    return this.points.reduce((most, [, value]) => Math.max(most, value ?? 0), 0);
  }

  /** A value at `now` (seconds, any origin). null leaves a gap. */
  push(now, value) {
    this.points.push([now, value]);
    while (this.points.length && now - this.points[0][0] > this.mostS) this.points.shift();
    this.draw();
  }

  draw() {
    const now = this.points.at(-1)[0];
    const { spanS } = this;
    const top = Math.max(this.peak, 1) * 1.08;
    const x = (t) => (WIDTH * (1 - (now - t) / spanS)).toFixed(1);
    const y = (v) => (HEIGHT - 2 - (HEIGHT - 4) * (v / top)).toFixed(1);
    let line = "";
    let area = "";
    let run = [];
    const close = () => {
      if (!run.length) return;
      const path = run.map(([t, v]) => `${x(t)},${y(v)}`).join("L");
      line += `M${path}`;
      area += `M${x(run[0][0])},${HEIGHT}L${path}L${x(run.at(-1)[0])},${HEIGHT}Z`;
      run = [];
    };
    for (const [t, v] of this.points) {
      if (v === null) close();
      else run.push([t, v]);
    }
    close();
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", area);
    this.svg.setAttribute("aria-label", this.summarize(this.points.at(-1)[1], this.peak));
  }

  point(event) {
    const known = this.points.filter(([, value]) => value !== null);
    this.tip.hidden = !event || !known.length;
    if (this.tip.hidden) {
      this.cursor.setAttribute("x1", -9);
      this.cursor.setAttribute("x2", -9);
      return;
    }
    const box = this.root.getBoundingClientRect();
    const now = this.points.at(-1)[0];
    const t = now - this.spanS * (1 - (event.clientX - box.left) / box.width);
    const [at, value] = known.reduce((best, p) => (Math.abs(p[0] - t) < Math.abs(best[0] - t) ? p : best));
    const share = Math.min(1, Math.max(0, 1 - (now - at) / this.spanS));
    this.cursor.setAttribute("x1", WIDTH * share);
    this.cursor.setAttribute("x2", WIDTH * share);
    this.tip.textContent = this.describe(value, now - at);
    this.tip.style.left = `${100 * share}%`;
    this.tip.dataset.side = share > 0.5 ? "left" : "right";
  }
}
