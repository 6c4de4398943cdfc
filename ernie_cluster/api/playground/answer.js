/** One answer while it comes: thoughts, zooms, calls and text in the order in which they come, and then its numbers. */

import { crop, findBoxes, framed, orderly, within } from "./boxes.js";
import { el } from "./dom.js";
import { counted, duration, grouped } from "./numbers.js";
import { show } from "./text.js";
import { decodeRate, strip, waterfall } from "./timeline.js";

const ZOOM = "image_zoom_in_tool";
/** What came in less time than this came in too few pieces to say how fast. */
const CLEAR_S = 0.1;

export class Answer {
  /** All text of the answer; thoughts are no part of it. */
  content = "";
  #blocks = [];
  #calls = new Map();
  #drawing = 0;
  #usage = null;
  #stages = [];
  #finish = null;
  #begunMs = performance.now();
  #firstMs = null;
  #lastMs = null;

  /** @param {{pictures: Array, main: number}} gallery what boxes may mean, see conversation.js. */
  constructor({ pictures, main }) {
    this.main = pictures[main];
    /** All that the model sees, with the part of the user's picture that it is; zooms are added to it. */
    this.seen = pictures.map((picture) => ({ picture, part: [0, 0, 1000, 1000] }));
    this.body = el("div", { className: "blocks" });
    this.waiting = el("p", { className: "waiting", "aria-hidden": "true" }, el("i"), el("i"), el("i"));
    const what = { className: "turn answer", "aria-label": "Answer", "aria-busy": "true" };
    this.node = el("article", what, this.body, this.waiting);
  }

  /** Take a chunk of the stream. */
  take({ choices, usage, timeline }) {
    this.#usage = usage ?? this.#usage;
    this.#stages = timeline ?? this.#stages;
    for (const { delta, finish_reason: finish } of choices) {
      this.#finish = finish ?? this.#finish;
      if (delta.reasoning_content) this.#block("thought").text += this.#timed(delta.reasoning_content);
      for (const call of delta.builtin_tool_calls ?? []) this.#showRun(call);
      if (delta.content) {
        this.content += delta.content;
        this.#block("text").text += this.#timed(delta.content);
      }
      for (const call of delta.tool_calls ?? []) this.#showCall(call);
    }
    this.#drawing ||= requestAnimationFrame(() => this.#draw());
  }

  /** Nothing more will come. @param {string|Node} [last] what to say of the end, where it is not the answer's own. */
  end(last = "") {
    this.#endThought();
    this.#draw();
    this.waiting.remove();
    this.node.setAttribute("aria-busy", "false");
    if (!this.body.hasChildNodes() && !last) this.body.append(el("p", { className: "aside" }, "The answer is empty."));
    this.#showBoxes();
    if (this.#finish === "length") last ||= "Cut off: this is the longest answer that the settings allow.";
    if (last) this.node.append(typeof last === "string" ? el("p", { className: "aside" }, last) : last);
    const numbers = this.#numbers();
    if (numbers) this.node.append(numbers);
  }

  #timed(text) {
    this.#lastMs = performance.now();
    this.#firstMs ??= this.#lastMs;
    return text;
  }

  /** The last block, if it is of this kind; else a new one. */
  #block(kind) {
    const last = this.#blocks.at(-1);
    if (last?.kind === kind) return last;
    this.#endThought();
    const block = { kind, text: "", sinceMs: performance.now(), node: el("div", { className: "text" }) };
    this.#blocks.push(block);
    if (kind === "thought") {
      block.summary = el("summary", {}, "Thinking…");
      this.body.append(el("details", { className: "thought" }, block.summary, block.node));
    } else {
      this.body.append(block.node);
    }
    return block;
  }

  #endThought() {
    const last = this.#blocks.at(-1);
    if (last?.kind !== "thought" || last.isOver) return;
    last.isOver = true;
    const seconds = (performance.now() - last.sinceMs) / 1000;
    last.summary.textContent = seconds < CLEAR_S ? "Thoughts" : `Thought for ${duration(seconds)}`;
  }

  /** At most once per frame, however fast the text comes. */
  #draw() {
    cancelAnimationFrame(this.#drawing);
    this.#drawing = 0;
    for (const block of this.#blocks) {
      if (block.drawn === block.text) continue;
      block.drawn = block.text;
      if (block.kind === "thought") block.node.textContent = block.text.trim();
      else if (block.kind === "text") show(block.node, block.text);
    }
  }

  /** A call of a function that somebody else is to run; it comes in pieces. */
  #showCall({ index, function: { name = "", arguments: more = "" } }) {
    const call = this.#calls.get(index) ?? { name: "", arguments: "", code: this.#card("Calls a function") };
    this.#calls.set(index, call);
    call.name += name;
    call.arguments += more;
    call.code.textContent = pretty({ name: call.name, arguments: call.arguments });
  }

  /** A call that the server runs itself; it may come again with its result. */
  #showRun({ id, name, type, arguments: given, result }) {
    const call = this.#calls.get(id) ?? { name: name ?? type, arguments: given };
    this.#calls.set(id, call);
    call.result = result ?? call.result;
    const picture = call.code ? null : this.#zoomed(call);
    call.code ??= this.#card(picture ? "The call" : `Uses ${call.name}`, picture);
    call.code.textContent = pretty({ name: call.name, arguments: call.arguments, result: call.result });
  }

  /** A folded card of JSON, below a picture if there is one; returns where the JSON goes. */
  #card(title, picture = null) {
    this.#endThought();
    const code = el("code");
    const json = el("pre", {}, code);
    const folded = el("details", { className: "call", open: picture === null }, el("summary", {}, title), json);
    this.body.append(el("div", { className: "card" }, picture, folded));
    this.#blocks.push({ kind: "card", text: "", drawn: "" });
    return code;
  }

  /** Where the model looked, and what it saw there; null when it is not known. */
  #zoomed({ name, arguments: given, result }) {
    const { bbox_2d: corners, label = "", picture: asked } = parsed(given);
    const number = result?.picture ?? asked;
    const from = number ? this.seen[number - 1] : this.seen.find(({ picture }) => picture === this.main);
    const box = orderly(corners);
    if (name !== ZOOM || !from || !box || result?.error) return null;
    const [picture, part] = [from.picture, within(from.part, box)];
    this.seen.push({ picture, part });
    return el(
      "figure",
      { className: "zoomed" },
      el("div", { className: "pair" }, framed(picture, [{ box: part, label: "" }]), crop(picture, part)),
      el("figcaption", {}, "Looked closer", label && " at ", label && el("strong", {}, String(label))),
    );
  }

  #showBoxes() {
    const boxes = findBoxes(this.content);
    if (boxes.length === 0 || !this.main) return;
    const caption = `${counted(boxes.length, "box", "boxes")} in ${this.main.name}`;
    this.body.append(el("figure", { className: "grounded" }, framed(this.main, boxes), el("figcaption", {}, caption)));
  }

  #numbers() {
    const words = [...this.#pace(), ...tokens(this.#usage)].join(" · ");
    if (!words && this.#stages.length === 0) return null;
    if (this.#stages.length === 0) return el("p", { className: "numbers" }, words);
    return el(
      "details",
      { className: "numbers" },
      el("summary", {}, el("span", {}, words || "Timeline"), strip(this.#stages)),
      waterfall(this.#stages),
    );
  }

  #pace() {
    if (this.#firstMs === null) return [];
    const first = `first token after ${duration((this.#firstMs - this.#begunMs) / 1000)}`;
    const seconds = (this.#lastMs - this.#firstMs) / 1000;
    const rate = decodeRate(this.#stages) ?? (seconds > CLEAR_S ? (this.#usage?.completion_tokens - 1) / seconds : 0);
    return rate > 0 ? [first, `${grouped(Math.round(rate))} tokens/s`] : [first];
  }
}

function tokens(usage) {
  if (!usage) return [];
  const cached = usage.prompt_tokens_details?.cached_tokens;
  const asked = `${counted(usage.prompt_tokens, "token")} in`;
  return [cached ? `${asked} (${grouped(cached)} cached)` : asked, `${grouped(usage.completion_tokens)} out`];
}

/** JSON for reading; `arguments` come as text, which may still be unfinished. */
function pretty(call) {
  return JSON.stringify({ ...call, arguments: parsed(call.arguments, call.arguments) }, null, 2);
}

function parsed(given, otherwise = {}) {
  if (typeof given !== "string") return given ?? otherwise;
  try {
    return JSON.parse(given) ?? otherwise;
  } catch {
    return otherwise;
  }
}
