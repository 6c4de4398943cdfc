/** The playground's conductor: what happens when something is typed, picked, sent or stopped. */

import { Answer } from "./answer.js";
import { listModels, streamChat } from "./api.js";
import { bodyOf, galleryOf, mostTokens } from "./conversation.js";
import { byId, el } from "./dom.js";
import { cards } from "./examples.js";
import { preview, Tray } from "./media.js";
import { grouped } from "./numbers.js";
import { Settings } from "./settings.js";
import { troubleBox } from "./trouble.js";

const NEAR_PX = 80;

const main = byId("main");
const log = byId("log");
const prompt = byId("prompt");
const settings = new Settings(loadModels);
const tray = new Tray(notice);

let models = [];
let turns = [];
/** Of the answer that is coming; null when none is. */
let running = null;
let isAtEnd = true;

function notice(words, ...more) {
  byId("notice").hidden = !words;
  byId("notice").replaceChildren(words, ...more);
}

function announce(words) {
  byId("status").textContent = words;
}

async function loadModels() {
  const select = byId("model");
  try {
    models = await listModels(settings.key);
  } catch (error) {
    models = [];
    const isKey = error.status === 401;
    const remedy = isKey ? settings.askForKey.bind(settings) : loadModels;
    const words = isKey && !settings.key ? "This server asks for an API key." : `No models: ${error.message}.`;
    const name = isKey ? "Enter a key" : "Try again";
    notice(words, el("button", { type: "button", className: "plain", onclick: remedy }, name));
  }
  select.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
  select.disabled = models.length === 0;
  if (models.length === 0) return;
  notice("");
  if (models.some(({ id }) => id === settings.wantedModel)) select.value = settings.wantedModel;
  showContext();
}

const model = () => models.find(({ id }) => id === byId("model").value);

function showContext() {
  const { max_model_len: length } = model();
  byId("context").textContent = length ? `At most ${grouped(mostTokens(model()))} here: half the context.` : "";
}

async function send() {
  const text = prompt.value.trim();
  if (running || (!text && tray.isEmpty)) return;
  if (!model()) return void loadModels();
  const turn = { text, media: tray.take(), answer: null };
  prompt.value = "";
  fit();
  notice("");
  byId("welcome").hidden = true;
  log.querySelectorAll(".again").forEach((button) => button.remove()); // only the last question can be asked again
  turns.push(turn);
  log.append(asked(turn));
  await ask(turn);
}

function asked({ text, media }) {
  const shown = media.map((item) => preview(item, { canPlay: true }));
  const pictures = shown.length > 0 && el("div", { className: "media" }, ...shown);
  return el("article", { className: "turn asked", "aria-label": "You" }, pictures, text && el("p", {}, text));
}

async function ask(turn) {
  const answer = new Answer(galleryOf(turns));
  const control = new AbortController();
  log.append(answer.node);
  begin(control);
  try {
    for await (const chunk of streamChat(bodyOf(settings.values, model(), turns), settings.key, control.signal)) {
      answer.take(chunk);
    }
    turn.answer = answer.content;
    answer.end();
    announce("The answer is complete.");
  } catch (error) {
    turn.answer = answer.content || null;
    if (control.signal.aborted) {
      answer.end("Stopped.");
      announce("Stopped.");
    } else {
      const retry = () => {
        answer.node.remove();
        turn.answer = null;
        ask(turn);
      };
      answer.end(troubleBox(error, { retry, askForKey: settings.askForKey.bind(settings) }));
    }
  } finally {
    if (running === control) over();
  }
}

function begin(control) {
  running = control;
  isAtEnd = true;
  swap(byId("send"), byId("stop"));
  announce("Asked. The answer is coming.");
  scroll();
}

function over() {
  running = null;
  swap(byId("stop"), byId("send"));
}

/** Shows one button in place of another, which hands on the focus if it has it. */
function swap(old, fresh) {
  const hasFocus = document.activeElement === old;
  fresh.hidden = false;
  old.hidden = true;
  if (hasFocus) fresh.focus();
}

function startOver() {
  running?.abort();
  over();
  turns.flatMap(({ media }) => media).forEach(({ url }) => URL.revokeObjectURL(url));
  turns = [];
  tray.clear();
  log.replaceChildren();
  byId("welcome").hidden = false;
  notice("");
  prompt.focus();
}

async function tryExample({ question, file, thinking, zoom }) {
  tray.clear();
  await tray.add([file]);
  settings.turn("thinking", thinking);
  settings.turn("zoom", zoom);
  prompt.value = question;
  fit();
  prompt.focus();
  announce("The example stands in the message. Enter sends it.");
}

/** The message's field is as high as its text, within what the style allows. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function scroll() {
  if (isAtEnd) main.scrollTop = main.scrollHeight;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // Enter also ends the choice of a character
  event.preventDefault();
  send();
});
prompt.addEventListener("input", fit);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("settings").open) running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new-chat").addEventListener("click", startOver);
byId("model").addEventListener("change", showContext);
main.addEventListener("scroll", () => {
  isAtEnd = main.scrollHeight - main.scrollTop - main.clientHeight < NEAR_PX;
});
log.addEventListener("click", ({ target }) => {
  if (target.closest("summary")) isAtEnd = false; // what is unfolded stays where it is
});
log.addEventListener("toggle", ({ target }) => target.open && target.scrollIntoView({ block: "nearest" }), true);
new ResizeObserver(scroll).observe(log); // also when a picture has been decoded
byId("examples").append(...cards(tryExample));
loadModels();
