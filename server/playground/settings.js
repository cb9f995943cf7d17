// The form's fields: filled from the server's lists, kept in the address.

import { make } from "./dom.js";
import { fetchJson } from "./stream.js";

const POLICIES = {
  entropy: "from the entropy of each token",
  schedule: "from one temperature to another",
  two_phase: "one while thinking, one after",
  constant: "the same for every token",
  list: "one after the other",
};
const ALIAS = ":adaptive";

export class Settings {
  #form;
  #heads = [];
  isReady = false;

  constructor(form) {
    this.#form = form;
    form.addEventListener("change", () => this.#showFieldsOfChooser());
  }

  /**
   * Ask the server for its models and heads, and fill the lists. Throws a ServerError.
   *
   * @param fragment of the address: what to choose from them the first time
   */
  async load(key, fragment) {
    const paths = ["v1/models", "v1/adaptive/heads"];
    const [models, heads] = await Promise.all(paths.map((path) => fetchJson(path, key)));
    this.#heads = heads.data;
    const names = models.data.map(({ id }) => id);
    // An alias makes every request adaptive, and the fixed one must not be.
    const isAlias = (name) => name.endsWith(ALIAS) && names.includes(name.slice(0, -ALIAS.length));
    const { model, chooser } = this.#form.elements;
    const wanted = this.isReady
      ? new Map([model, chooser].map(({ name, value }) => [name, value]))
      : new URLSearchParams(fragment);
    model.replaceChildren(
      ...names.filter((name) => !isAlias(name)).map((name) => new Option(name, name)),
    );
    const groups = [
      makeGroup("Heads", "head", this.#heads.map(describeHead)),
      makeGroup("Without a head", "policy", Object.entries(POLICIES)),
    ];
    chooser.replaceChildren(...groups.filter(({ children }) => children.length));
    // A choice a token shows most. Otherwise the server's own default.
    const shown =
      this.#heads.find(({ level }) => level === "token") ??
      this.#heads.find((head) => head.default);
    if (shown) chooser.value = `head:${shown.id}`;
    for (const select of [model, chooser]) {
      select.dataset.initial = select.value;
      choose(select, wanted);
    }
    this.#showFieldsOfChooser();
    this.isReady = true;
  }

  /** The enabled fields, name to text. */
  read() {
    return new Map(new FormData(this.#form));
  }

  /** What chooses the temperature, in a word. */
  get chooserName() {
    return this.#form.elements.chooser.value.replace(/^\w+:/, "");
  }

  /** The temperatures that may come, where a head chooses from a few; [] otherwise. */
  get temperatures() {
    const [head] = this.#heads.filter(({ id }) => this.#form.elements.chooser.value === `head:${id}`);
    const values = this.read();
    if ((values.get("adaptive.select") || head?.select) === "mean") return [];
    const number = (name, otherwise) => Number(values.get(name) || otherwise);
    const low = number("adaptive.min", 0);
    const high = number("adaptive.max", Infinity);
    const scale = number("adaptive.scale", 1);
    const bound = (value) => Math.min(Math.max(scale * value, low), high);
    const fallback = head?.abstain ? [head.abstain.fallback] : [];
    return [...new Set([...(head?.temperatures ?? []), ...fallback].map(bound))].sort((a, b) => a - b);
  }

  /** What differs from the page as it opens, as the fragment of an address. */
  get fragment() {
    const changed = [...this.#fields].filter((field) => getValue(field) !== getInitial(field));
    return new URLSearchParams(changed.map((field) => [field.name, getValue(field)])).toString();
  }

  set fragment(fragment) {
    const wanted = new URLSearchParams(fragment);
    for (const field of this.#fields) choose(field, wanted);
    this.#showFieldsOfChooser();
  }

  /** Mark the field that an error names, if there is one. */
  mark(name) {
    this.#fields.find((field) => field.name === name)?.setAttribute("aria-invalid", "true");
  }

  unmark() {
    for (const field of this.#fields) field.removeAttribute("aria-invalid");
  }

  get #fields() {
    return [...this.#form.elements].filter(({ name }) => name);
  }

  #showFieldsOfChooser() {
    const isHead = this.#form.elements.chooser.value.startsWith("head:");
    const shown = isHead ? "head" : this.chooserName;
    for (const group of this.#form.querySelectorAll("[data-for]")) {
      group.hidden = group.disabled = group.dataset.for !== shown;
    }
    this.#form.elements.temperature.disabled = !this.#form.elements.compare.checked;
  }
}

function describeHead({ id, level, trained }) {
  const untrained = trained ? "" : ", untrained";
  return [id, `one ${level === "token" ? "a token" : "an answer"}${untrained}`];
}

function makeGroup(label, kind, entries) {
  const options = entries.map(
    ([name, description]) => new Option(`${name} (${description})`, `${kind}:${name}`),
  );
  return make("optgroup", { label }, ...options);
}

function choose(field, wanted) {
  setValue(field, wanted.get(field.name) ?? getInitial(field));
  // An option that this server does not have.
  if (field.selectedIndex === -1) setValue(field, getInitial(field));
}

function getValue(field) {
  return field.type === "checkbox" ? (field.checked ? "on" : "off") : field.value;
}

function setValue(field, value) {
  if (field.type === "checkbox") field.checked = value === "on";
  else field.value = value;
}

function getInitial(field) {
  if (field.type === "checkbox") return field.defaultChecked ? "on" : "off";
  return field.dataset.initial ?? field.defaultValue ?? field.options[0]?.value ?? "";
}
