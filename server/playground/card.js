// What is known of one token: a card beside it, and the same in words.

import { make, quote, setTemperature, shorten } from "./dom.js";

const MARGIN = 8;

export class Card {
  #root;
  #locate = null;

  constructor(root) {
    this.#root = root;
    const follow = () => this.#locate && this.#place();
    addEventListener("scroll", follow, { capture: true, passive: true });
    addEventListener("resize", follow);
  }

  /** @param locate where in the window to put it: a function that gives a DOMRect */
  show(token, count, locate) {
    const swatch = make("span", { className: "swatch", textContent: describeTemperature(token) });
    setTemperature(swatch, token.temperature);
    this.#root.replaceChildren(
      make("p", { className: "token" }, make("code", { textContent: name(token) }), swatch),
      make("p", { textContent: `${describePlace(token, count)} · ${describeChance(token)}` }),
      ...(token.alternatives.length ? [makeTable(token)] : []),
    );
    this.#locate = locate;
    this.#root.hidden = false;
    this.#place();
  }

  hide() {
    this.#locate = null;
    this.#root.hidden = true;
  }

  #place() {
    const { left, top, bottom } = this.#locate();
    const { offsetWidth, offsetHeight } = this.#root;
    const { clientWidth, clientHeight } = document.documentElement;
    const x = Math.max(MARGIN, Math.min(left, clientWidth - offsetWidth - MARGIN));
    const isBelow = bottom + offsetHeight + 2 * MARGIN < clientHeight;
    const y = isBelow ? bottom + MARGIN : Math.max(MARGIN, top - offsetHeight - MARGIN);
    this.#root.style.left = `${x}px`;
    this.#root.style.top = `${y}px`;
  }
}

/** A token for those who listen. */
export function describe(token, count) {
  return [
    token.text.trim() ? `“${token.text.trim()}”` : name(token),
    `temperature ${describeTemperature(token)}`,
    describePlace(token, count),
    describeChance(token),
  ].join(", ");
}

function name(token) {
  if (token.isEnd) return `${quote(token.text)} ends the answer`;
  if (token.text) return quote(token.text);
  return "part of a character";
}

function describeTemperature({ temperature }) {
  return temperature === null ? "not reported" : shorten(temperature);
}

function describePlace({ position }, count) {
  return `token ${position + 1} of ${count}`;
}

function describeChance({ logprob }) {
  return logprob === null ? "probability not reported" : `probability ${percent(logprob)}`;
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share < 0.1) return "< 0.1 %";
  return `${share.toFixed(share < 9.95 ? 1 : 0)} %`;
}

function makeTable({ text, bytes, alternatives }) {
  const own = JSON.stringify(bytes ?? text);
  const rows = alternatives.toSorted((a, b) => b.logprob - a.logprob).map((alternative) => {
    const bar = make("span", { className: "bar" });
    bar.style.width = `${100 * Math.exp(alternative.logprob)}%`;
    const isChosen = JSON.stringify(alternative.bytes ?? alternative.token) === own;
    return make(
      "tr",
      { className: isChosen ? "chosen" : "" },
      make("th", { scope: "row", textContent: quote(alternative.token) || "–" }),
      make("td", { className: "bars" }, bar),
      make("td", { textContent: percent(alternative.logprob) }),
    );
  });
  const caption = make("caption", { textContent: "Likeliest, before the temperature" });
  return make("table", {}, caption, make("tbody", {}, ...rows));
}
