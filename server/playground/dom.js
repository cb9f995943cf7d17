// Elements from code. What a model or a user wrote only ever becomes a text node.

/** An element with properties (`data-*` and `aria-*` as attributes) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Show how hot something is; the style sheet makes it a colour. */
export function setTemperature(element, temperature) {
  element.classList.toggle("heat", temperature !== null);
  if (temperature !== null) element.style.setProperty("--t", temperature);
}

/** A number for people: at most `digits` decimals, no zeros at the end. */
export function shorten(value, digits = 3) {
  return String(Number(value.toFixed(digits)));
}

// Invisible characters and those that change the direction of what follows.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** Text in which no character hides or reorders others; line breaks and tabs stay. */
export function reveal(text) {
  return text.replace(HIDDEN, (character) => {
    const code = character.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return `⟨${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

/** A token in one line, its spaces and line breaks as signs. */
export function quote(text) {
  return reveal(text).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}
