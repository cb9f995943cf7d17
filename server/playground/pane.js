// One answer on the page: its text in colours, chart, numbers, errors, and the command for it.

import { describe } from "./card.js";
import { Chart } from "./chart.js";
import { make, reveal, setTemperature, shorten } from "./dom.js";
import { makeCurl } from "./request.js";
import { ServerError, streamChunks } from "./stream.js";
import { Tokens } from "./tokens.js";

const ENDINGS = {
  stop: "finished",
  length: "reached max tokens",
};

export class Pane {
  #find;
  #text;
  #track;
  #chart;
  #card;
  #scale;
  #speak;
  #spans = [];
  #tokens = new Tokens();
  #active = null;
  #isDrawing = false;
  #times = [];

  /**
   * @param root an element with what the template of a pane has
   * @param page `{card, scale, speak}`, shared by the panes
   */
  constructor(root, { card, scale, speak }) {
    this.root = root;
    this.#card = card;
    this.#scale = scale;
    this.#speak = speak;
    this.#find = (name) => root.querySelector(`.${name}`);
    this.#text = this.#find("text");
    this.#track = this.#find("track");
    this.#chart = new Chart(this.#track);
    this.#listen();
  }

  /**
   * Send a request and show its answer as it comes.
   *
   * @param request `{path, text, key, signal}`
   * @param kind `{title, chosen, fixed}`: the policy's or the head's name, and the temperature of
   *   every token; null where the server reports them
   * @returns how it ended, in a few words
   * @throws ServerError, which is shown already
   */
  async run(request, { title, chosen, fixed }) {
    this.#clear(fixed);
    this.#find("title").textContent = title;
    this.#find("command").textContent = makeCurl(request);
    this.#find("footer").hidden = false;
    this.#setState("waiting");
    try {
      for await (const chunk of streamChunks(request)) this.#take(chunk);
    } catch (error) {
      this.#draw();
      if (error.name === "AbortError") return this.#setState("stopped");
      this.#setState("failed");
      this.#showError(error);
      throw error;
    }
    this.#draw();
    const { list, finishReason, head } = this.#tokens;
    if (head && head !== chosen) this.#find("title").append(` (its canary ${head})`);
    const ending = ENDINGS[finishReason] ?? finishReason ?? "finished";
    return this.#setState(list.length ? ending : "the model said nothing");
  }

  /** The answer's numbers in a sentence. */
  describe() {
    const { list } = this.#tokens;
    const { mean, min, max } = this.#tokens.summarise();
    const tokens = `${list.length} token${list.length === 1 ? "" : "s"}`;
    if (mean === null) return tokens;
    const [average, low, high] = [mean, min, max].map((value) => shorten(value, 2));
    return `${tokens}, mean temperature ${average}, from ${low} to ${high}`;
  }

  /** Draw again with the next frame. */
  refresh() {
    if (this.#isDrawing) return;
    this.#isDrawing = true;
    requestAnimationFrame(() => this.#draw());
  }

  /** Point at no token. */
  release() {
    this.#point(null);
  }

  #clear(fixed) {
    this.release();
    this.#tokens = new Tokens(fixed);
    this.#spans = [];
    this.#times = [];
    this.#text.replaceChildren();
    this.#chart.clear();
    this.#find("error").hidden = true;
    this.#draw();
  }

  #take(chunk) {
    const before = this.#tokens.list.length;
    this.#tokens.add(chunk);
    if (this.#tokens.list.length === before) return;
    const now = performance.now();
    this.#times = [this.#times[0] ?? { now, count: this.#tokens.list.length }, { now }];
    this.#setState("answering");
    this.refresh();
  }

  #draw() {
    this.#isDrawing = false;
    const { list } = this.#tokens;
    const spans = list.slice(this.#spans.length).map(makeSpan);
    const summary = this.#tokens.summarise();
    if (summary.max !== null) this.#scale.raise(summary.max);
    this.#spans.push(...spans);
    this.#text.append(...spans);
    this.#chart.update(list, summary.mean, this.#scale.top);
    this.#find("top").textContent = shorten(this.#scale.top, 2);
    this.#find("last").textContent = this.#chart.width;
    this.#find("measures").hidden = !list.length;
    this.#showFacts(summary);
    this.#showHistogram();
    this.#track.setAttribute("aria-valuemax", list.length);
  }

  #showFacts({ mean, min, max }) {
    const facts = { count: this.#tokens.list.length, rate: this.#rate };
    for (const [name, value] of Object.entries({ mean, min, max })) {
      facts[name] = value === null ? "–" : shorten(value, 2);
    }
    for (const [name, value] of Object.entries(facts)) this.#find(name).textContent = value;
    this.#find("alternative").textContent = `Temperature over position: ${this.describe()}.`;
  }

  /** Tokens a second after the first, which also waits for the prompt. */
  get #rate() {
    const [first, last] = this.#times;
    const seconds = last ? (last.now - first.now) / 1000 : 0;
    const count = this.#tokens.list.length - (first?.count ?? 0);
    return seconds > 0 && count ? shorten(count / seconds, 1) : "–";
  }

  #showHistogram() {
    const bars = this.#tokens.countTemperatures();
    const most = Math.max(...bars.map(({ count }) => count));
    const rows = bars.map(({ label, temperature, count }) => {
      const bar = make("span", { className: "bar" });
      setTemperature(bar, temperature);
      bar.style.width = `${(100 * count) / most}%`;
      return make(
        "tr",
        {},
        make("th", { scope: "row", textContent: label }),
        make("td", { className: "bars" }, bar),
        make("td", { textContent: count }),
      );
    });
    this.#find("histogram").replaceChildren(...rows);
  }

  #showError(error) {
    const shown = error instanceof ServerError ? error : { message: String(error), param: null };
    const isNamed = !shown.param || shown.message.includes(shown.param);
    const field = isNamed ? [] : [make("code", { textContent: shown.param }), " "];
    this.#find("error").replaceChildren(...field, shown.message);
    this.#find("error").hidden = false;
  }

  #setState(state) {
    this.#find("state").textContent = state;
    this.root.dataset.state = state;
    return state;
  }

  #listen() {
    const atSpan = (position) => () => this.#spans[position].getClientRects()[0];
    const atBar = (position) => () => this.#chart.locate(position);
    const hover = (position, place) => {
      if (position !== this.#active) this.#point(position, place(position));
    };
    const hoverText = ({ target }) => {
      const span = target.closest("[data-position]");
      hover(span ? Number(span.dataset.position) : null, atSpan);
    };
    const hoverTrack = ({ clientX }) => hover(this.#chart.find(clientX), atBar);
    // A finger leaves as soon as it is lifted; the click comes after.
    for (const name of ["pointerover", "click"]) this.#text.addEventListener(name, hoverText);
    for (const name of ["pointermove", "click"]) this.#track.addEventListener(name, hoverTrack);
    for (const [element, place] of [[this.#text, atSpan], [this.#track, atBar]]) {
      element.addEventListener("pointerleave", () => this.release());
      element.addEventListener("blur", () => this.release());
      element.addEventListener("keydown", (event) => {
        const position = this.#step(event);
        if (position === null) return;
        event.preventDefault();
        this.#point(position, place(position));
        this.#spans[position].scrollIntoView({ block: "nearest" });
        if (element === this.#text) this.#speak(this.#track.getAttribute("aria-valuetext"));
      });
    }
    this.#find("copy").addEventListener("click", () => this.#copy());
  }

  /** Where a key leads from the active token; null if nowhere. */
  #step({ key, ctrlKey, metaKey, altKey }) {
    const last = this.#spans.length - 1;
    if (last < 0 || ctrlKey || metaKey || altKey) return null;
    const from = this.#active ?? -1;
    const steps = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: last };
    return key in steps ? Math.max(0, Math.min(steps[key], last)) : null;
  }

  #point(position, locate) {
    this.#spans[this.#active]?.classList.remove("active");
    this.#active = position;
    this.#chart.point(position);
    if (position === null) return this.#card.hide();
    const { list } = this.#tokens;
    this.#spans[position].classList.add("active");
    this.#card.show(list[position], list.length, locate);
    this.#track.setAttribute("aria-valuenow", position + 1);
    this.#track.setAttribute("aria-valuetext", describe(list[position], list.length));
  }

  async #copy() {
    const command = this.#find("command");
    try {
      await navigator.clipboard.writeText(command.textContent);
      this.#speak("Copied");
      this.#find("copy").textContent = "Copied";
      setTimeout(() => (this.#find("copy").textContent = "Copy"), 2000);
    } catch {
      // Without TLS a browser gives no clipboard: leave it to the user's own command.
      getSelection().selectAllChildren(command);
      this.#speak("Selected: copy it with your keyboard");
    }
  }
}

function makeSpan(token) {
  const lines = token.isEnd ? [""] : reveal(token.text).split("\n");
  const span = make("span", {}, lines.shift());
  for (const line of lines) span.append(make("i", { className: "break" }), "\n", line);
  span.dataset.position = token.position;
  if (token.isEnd) span.className = "end";
  else if (!token.text) span.className = "part";
  if (token.temperature !== null) span.dataset.temperature = shorten(token.temperature);
  setTemperature(span, token.temperature);
  return span;
}
