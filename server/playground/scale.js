// The scale of temperatures that all colours on the page share, and its legend.

import { make, setTemperature, shorten } from "./dom.js";

const NUM_STEPS = 5;

export class Scale {
  #legend;
  #choices = [];
  top = 0;
  onRaise = () => {};

  constructor(legend) {
    this.#legend = legend;
    this.begin([], null);
  }

  /**
   * Before an answer.
   *
   * @param choices the temperatures that a head chooses from; [] where any may come
   * @param fixed the temperature beside it, or null
   */
  begin(choices, fixed) {
    this.#choices = choices;
    this.top = 0;
    this.raise(Math.max(1, fixed ?? 0, ...choices));
  }

  /** Make room for a temperature. What has its colour already changes along. */
  raise(temperature) {
    if (temperature <= this.top) return;
    this.top = temperature;
    document.documentElement.style.setProperty("--top", this.top);
    const steps = Array.from({ length: NUM_STEPS + 1 }, (_, step) => (step * this.top) / NUM_STEPS);
    const values = this.#choices.length ? this.#choices : steps;
    this.#legend.replaceChildren(...values.map(makeSwatch));
    this.onRaise();
  }
}

function makeSwatch(temperature) {
  const swatch = make("li", { textContent: shorten(temperature, 2) });
  setTemperature(swatch, temperature);
  return swatch;
}
