// The page: runs requests side by side, and reacts to buttons, keys and the address.

import { Card } from "./card.js";
import { Pane } from "./pane.js";
import { CHAT_PATH, makeBodies } from "./request.js";
import { Scale } from "./scale.js";
import { Settings } from "./settings.js";

const SAVE_DELAY_MS = 300;
const find = (id) => document.getElementById(id);

const form = find("form");
const settings = new Settings(form);
const scale = new Scale(find("legend"));
const card = new Card(find("card"));
const page = { card, scale, speak: (text) => (find("spoken").textContent = text) };
const panes = { adaptive: makePane(page), fixed: makePane(page) };
let running = null;
scale.onRaise = () => Object.values(panes).forEach((pane) => pane.refresh());

form.addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
form.addEventListener("input", () => save());
find("stop").addEventListener("click", stop);
find("key").addEventListener("change", load);
find("numbers").addEventListener("change", ({ target }) => {
  find("answers").classList.toggle("numbered", target.checked);
});
for (const button of document.querySelectorAll("[data-prompt]")) {
  button.addEventListener("click", () => {
    form.elements.prompt.value = button.dataset.prompt;
    save();
  });
}
addEventListener("keydown", (event) => {
  const isRun = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (isRun && !event.repeat) form.requestSubmit();
  if (event.key !== "Escape") return;
  for (const pane of Object.values(panes)) pane.release();
  stop();
});
// Heads come and go while the server runs.
addEventListener("visibilitychange", () => !document.hidden && settings.isReady && load());
addEventListener("hashchange", () => (settings.fragment = location.hash.slice(1)));

find("settings").open = matchMedia("(min-width: 60rem)").matches;
find("keys").textContent = navigator.platform.startsWith("Mac") ? "⌘ ↵" : "Ctrl ↵";
settings.fragment = location.hash.slice(1);
load();

/** Fill the lists, and say what is wrong where that fails. */
async function load() {
  try {
    await settings.load(find("key").value, location.hash.slice(1));
    showNotice("");
    find("key").removeAttribute("aria-invalid");
  } catch (error) {
    const isRefused = error.status === 401;
    const hint = isRefused ? " – this server wants an API key: give it under Settings." : "";
    showNotice(error.message + hint);
    find("key").setAttribute("aria-invalid", isRefused);
    find("settings").open ||= isRefused;
  }
}

async function start() {
  await stop();
  if (!settings.isReady) await load();
  if (!settings.isReady || running) return;
  const controller = new AbortController();
  const done = run(controller.signal);
  running = { controller, done };
  find("stop").disabled = false;
  setStatus("Answering…");
  page.speak("Answering");
  page.speak(await done);
  setStatus("");
  running = null;
  find("stop").disabled = true;
}

/** Abort what is running; the engine stops with the connection. */
async function stop() {
  running?.controller.abort();
  await running?.done;
}

/** Send the requests at once. Returns what to say when all have ended; it never throws. */
async function run(signal) {
  const values = settings.read();
  const bodies = makeBodies(values);
  const fixed = bodies.fixed?.temperature ?? null;
  const chosen = settings.chooserName;
  const kinds = {
    adaptive: { title: `Adaptive · ${chosen}`, chosen, fixed: null },
    fixed: { title: `Fixed · ${fixed}`, chosen: null, fixed },
  };
  scale.begin(settings.temperatures, fixed);
  settings.unmark();
  showNotice("");
  panes.fixed.root.hidden = bodies.fixed === null;
  find("answers").hidden = false;
  const endings = Object.entries(panes).map(async ([name, pane]) => {
    if (bodies[name] === null) return "";
    // Exactly this text is sent, and shown as a command.
    const text = JSON.stringify(bodies[name], null, 2);
    const request = { path: CHAT_PATH, text, key: find("key").value, signal };
    try {
      const ending = await pane.run(request, kinds[name]);
      return `${kinds[name].title}: ${ending}, ${pane.describe()}.`;
    } catch (error) {
      settings.mark(error.param);
      return `${kinds[name].title}: failed.`;
    }
  });
  return (await Promise.all(endings)).join(" ");
}

function makePane(page) {
  const content = find("pane").content.cloneNode(true);
  const pane = new Pane(content.firstElementChild, page);
  find("answers").append(content);
  return pane;
}

function save() {
  clearTimeout(save.timer);
  save.timer = setTimeout(() => {
    if (settings.isReady) history.replaceState(null, "", `#${settings.fragment}`);
  }, SAVE_DELAY_MS);
}

function setStatus(text) {
  find("status").textContent = text;
}

function showNotice(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}
