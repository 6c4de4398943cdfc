/** Pictures and videos that wait for the next message. */

import { byId, el } from "./dom.js";

const KINDS = {
  "image/png": "image",
  "image/jpeg": "image",
  "image/webp": "image",
  "image/gif": "image",
  "video/mp4": "video",
  "video/webm": "video",
  "video/quicktime": "video",
};

/** A file as {kind, name, url, dataUrl}: `url` shows it here, `dataUrl` travels. Throws Error in words for the user. */
export async function readFile(file) {
  const kind = KINDS[file.type];
  const name = file.name || "The file";
  if (!kind) throw new Error(`${name} is not a PNG, JPEG, WebP or GIF picture, nor an MP4 or WebM video.`);
  const dataUrl = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
  return { kind, name: file.name || kind, url: URL.createObjectURL(file), dataUrl };
}

/** An `<img>` or a `<video>`; in a conversation, videos can be played. */
export function preview({ kind, name, url }, { canPlay = false } = {}) {
  if (kind === "image") return el("img", { src: url, alt: name });
  const look = { muted: true, controls: canPlay, playsInline: true, preload: "metadata" };
  return el("video", { src: url, "aria-label": name, ...look });
}

/** The row of thumbnails above the message. `onTrouble` is told of files that cannot be attached, in words. */
export class Tray {
  #media = [];

  constructor(onTrouble) {
    this.onTrouble = onTrouble;
    this.list = byId("attached");
    byId("attach").onclick = () => byId("files").click();
    byId("files").onchange = ({ target }) => {
      this.add([...target.files]);
      target.value = ""; // the same file may be picked again
    };
    this.#listenToDrops();
    document.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length === 0) return;
      event.preventDefault(); // a copied picture comes with its address as text
      this.add([...event.clipboardData.files]);
    });
  }

  get isEmpty() {
    return this.#media.length === 0;
  }

  /** Attach files; those that cannot be sent are told of. */
  async add(files) {
    const read = await Promise.allSettled(files.map(readFile));
    const refused = read.filter(({ status }) => status === "rejected");
    this.#media.push(...read.filter(({ status }) => status === "fulfilled").map(({ value }) => value));
    if (refused.length > 0) this.onTrouble(refused.map(({ reason }) => reason.message).join(" "));
    this.#show();
  }

  /** Hand over what is attached; the tray is empty then. */
  take() {
    const media = this.#media;
    this.#media = [];
    this.#show();
    return media;
  }

  /** Throw away what is attached. */
  clear() {
    this.take().forEach(({ url }) => URL.revokeObjectURL(url));
  }

  #show() {
    this.list.hidden = this.isEmpty;
    const items = this.#media.map((item) => el("li", {}, preview(item), this.#remover(item)));
    this.list.replaceChildren(...items);
  }

  #remover(item) {
    const remove = () => {
      this.#media = this.#media.filter((other) => other !== item);
      URL.revokeObjectURL(item.url);
      this.#show();
      byId("prompt").focus();
    };
    const what = { type: "button", "aria-label": `Remove ${item.name}`, title: "Remove" };
    return el("button", { ...what, onclick: remove }, "×");
  }

  #listenToDrops() {
    const hint = byId("drop");
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      hint.hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) hint.hidden = true; // it left the window
    });
    document.addEventListener("drop", (event) => {
      hint.hidden = true;
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
  }
}
