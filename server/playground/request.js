// From what the form holds to what is sent, and to the same as a command.

import { locate } from "./stream.js";

export const CHAT_PATH = "v1/chat/completions";
const WITH_TOKENS = { stream: true, logprobs: true, top_logprobs: 5 };
// Fields of the form that go into the body as they are; each name is the field's path there.
const TEXT_FIELDS = ["adaptive.select", "adaptive.two_phase.marker"];
// Numbers with commas between.
const LIST_FIELDS = ["adaptive.list.temperatures"];

/**
 * The bodies of both requests.
 *
 * @param values the form's enabled fields, name to text
 * @returns `{adaptive, fixed}`; `fixed` is null unless a comparison is asked for
 */
export function makeBodies(values) {
  const body = { model: values.get("model"), messages: makeMessages(values) };
  const shared = { ...pick(values, ["seed", "max_tokens"]), ...WITH_TOKENS };
  const names = [...values.keys()].filter((name) => name.startsWith("adaptive."));
  const { adaptive = {} } = pick(values, names);
  const [kind, name] = split(values.get("chooser") ?? "policy:entropy");
  adaptive[kind] = name;
  adaptive.report = "tokens";
  const fixed = { ...body, ...pick(values, ["temperature"]), ...shared };
  return {
    adaptive: { ...body, temperature: "adaptive", adaptive, ...shared },
    fixed: values.has("compare") ? fixed : null,
  };
}

/** A request as a command for a POSIX shell. A key is never part of it. */
export function makeCurl({ path, text, key }) {
  const lines = [
    `curl -sN ${quoteForShell(locate(path))}`,
    `-H ${quoteForShell("Content-Type: application/json")}`,
    ...(key ? ['-H "Authorization: Bearer $API_KEY"'] : []),
    `-d ${quoteForShell(text)}`,
  ];
  return lines.join(" \\\n  ");
}

export function quoteForShell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function makeMessages(values) {
  const system = values.get("system") ?? "";
  const messages = system ? [{ role: "system", content: system }] : [];
  return [...messages, { role: "user", content: values.get("prompt") }];
}

/** The fields that are filled in, as an object nested as their names say. */
function pick(values, names) {
  const picked = {};
  for (const name of names) {
    const text = values.get(name) ?? "";
    if (text === "") continue;
    const path = name.split(".");
    const last = path.pop();
    const parent = path.reduce((object, part) => (object[part] ??= {}), picked);
    parent[last] = parse(name, text);
  }
  return picked;
}

function parse(name, text) {
  if (TEXT_FIELDS.includes(name)) return text;
  if (!LIST_FIELDS.includes(name)) return Number(text);
  // Number("") is 0, and a comma at the end is no temperature.
  const parts = text.split(",").filter((part) => part.trim() !== "");
  return parts.map(Number);
}

/** "head:a:b" is the head "a:b". */
function split(chooser) {
  const colon = chooser.indexOf(":");
  return [chooser.slice(0, colon), chooser.slice(colon + 1)];
}
