// The strip above an answer: temperature over position.

import { shorten } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const NUM_STOPS = 8;
// So that the first tokens of an answer are not as wide as the page.
const MIN_WIDTH = 48;
let numCharts = 0;

export class Chart {
  #root;
  #svg = draw("svg", { preserveAspectRatio: "none", "aria-hidden": "true" });
  #flipped = draw("g", {});
  #gradient = draw("linearGradient", { gradientUnits: "userSpaceOnUse", x1: 0, x2: 0, y1: 0 });
  #area = draw("path", { class: "area" });
  #line = draw("path", { class: "line" });
  #mean = draw("path", { class: "mean" });
  #cursor = draw("path", { class: "cursor" });
  #path = "";
  #length = 0;

  /** @param root holds the drawing; an empty element */
  constructor(root) {
    this.#root = root;
    this.#gradient.id = `heat-${numCharts++}`;
    for (let stop = 0; stop <= NUM_STOPS; stop++) {
      const share = stop / NUM_STOPS;
      const element = draw("stop", { offset: share });
      element.style.setProperty("--heat", share);
      this.#gradient.append(element);
    }
    this.#area.style.fill = `url(#${this.#gradient.id})`;
    this.#flipped.append(this.#area, this.#line, this.#mean, this.#cursor);
    this.#svg.append(this.#gradient, this.#flipped);
    root.append(this.#svg);
  }

  clear() {
    this.#path = "";
    this.#length = 0;
    this.point(null);
    for (const path of [this.#area, this.#line, this.#mean]) path.removeAttribute("d");
  }

  /** Draw what has come. `top` is the temperature at the upper edge. */
  update(tokens, mean, top) {
    for (const { position, temperature } of tokens.slice(this.#length)) {
      this.#path += `${position ? "V" : "M0 "}${shorten(temperature ?? 0, 4)}H${position + 1}`;
    }
    this.#length = tokens.length;
    if (!this.#length) return;
    const { width } = this;
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${top}`);
    this.#flipped.setAttribute("transform", `matrix(1 0 0 -1 0 ${top})`);
    this.#gradient.setAttribute("y2", top);
    this.#line.setAttribute("d", this.#path);
    this.#area.setAttribute("d", `${this.#path}V0H0Z`);
    if (mean !== null) this.#mean.setAttribute("d", `M0 ${mean}H${width}`);
  }

  /** Mark a position, or none (null). */
  point(position) {
    if (position === null) this.#cursor.removeAttribute("d");
    else this.#cursor.setAttribute("d", `M${position + 0.5} 0V1000`);
  }

  /** The position under a place of the window; null where there is none. */
  find(x) {
    const { left, width } = this.#root.getBoundingClientRect();
    const position = Math.floor(((x - left) / width) * this.width);
    return position >= 0 && position < this.#length ? position : null;
  }

  /** Where a position is in the window: a rectangle as wide as its bar. */
  locate(position) {
    const { left, top, width, height } = this.#root.getBoundingClientRect();
    const bar = width / this.width;
    return new DOMRect(left + position * bar, top, bar, height);
  }

  /** How many tokens it has room for. */
  get width() {
    return Math.max(this.#length, MIN_WIDTH);
  }
}

function draw(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
