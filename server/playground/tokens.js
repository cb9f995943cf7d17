// What the chunks of a stream say of each token.

const MAX_BARS = 12;
const NUM_BINS = 10;

/** An answer as it grows: one entry a token, in order. */
export class Tokens {
  #decoder = new TextDecoder();
  #counts = new Map();
  #sum = 0;
  list = [];
  finishReason = null;
  /** The head that answered, once the server has said it. */
  head = null;

  /** @param fixed the temperature of every token, where the server reports none */
  constructor(fixed = null) {
    this.fixed = fixed;
  }

  add(chunk) {
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const content = choice.delta?.content ?? "";
    const entries = choice.logprobs?.content ?? (content ? [{ token: content }] : []);
    const temperatures = choice.adaptive?.temperatures ?? [];
    entries.forEach((entry, index) => this.#push(entry, temperatures[index] ?? this.fixed));
    this.finishReason = choice.finish_reason ?? this.finishReason;
    this.head = choice.adaptive?.head ?? this.head;
    if (choice.finish_reason !== "stop" || !entries.length) return;
    // The token that ends an answer is no part of its text.
    const last = this.list.at(-1);
    last.isEnd = !content.endsWith(last.text);
  }

  #push(entry, temperature) {
    // A token may end within a character; its bytes wait for those of the next.
    const text = entry.bytes
      ? this.#decoder.decode(Uint8Array.from(entry.bytes), { stream: true })
      : entry.token;
    this.list.push({
      position: this.list.length,
      text,
      bytes: entry.bytes ?? null,
      temperature,
      logprob: entry.logprob ?? null,
      alternatives: entry.top_logprobs ?? [],
      isEnd: false,
    });
    if (temperature === null) return;
    this.#sum += temperature;
    this.#counts.set(temperature, (this.#counts.get(temperature) ?? 0) + 1);
  }

  /** Number of tokens with a temperature; their mean, lowest and highest (null if there are none). */
  summarise() {
    const used = [...this.#counts.keys()];
    const count = [...this.#counts.values()].reduce((sum, value) => sum + value, 0);
    if (!count) return { count, mean: null, min: null, max: null };
    return { count, mean: this.#sum / count, min: Math.min(...used), max: Math.max(...used) };
  }

  /** How often: `{label, temperature, count}` in order, in bins where there are many values. */
  countTemperatures() {
    const counts = [...this.#counts].sort(([a], [b]) => a - b);
    if (counts.length <= MAX_BARS) {
      return counts.map(([temperature, count]) => ({
        label: String(Number(temperature.toFixed(3))),
        temperature,
        count,
      }));
    }
    const low = counts[0][0];
    const width = (counts.at(-1)[0] - low) / NUM_BINS;
    const bins = Array.from({ length: NUM_BINS }, (_, index) => ({
      label: [index, index + 1].map((edge) => (low + edge * width).toFixed(2)).join("–"),
      temperature: low + (index + 0.5) * width,
      count: 0,
    }));
    for (const [temperature, count] of counts) {
      bins[Math.min(Math.floor((temperature - low) / width), NUM_BINS - 1)].count += count;
    }
    return bins;
  }
}
