/** What the user has chosen. The key stays in its tab; the rest is remembered by the browser. */

import { byId } from "./dom.js";

const MEMORY = "ernie_cluster playground";
const KEY = "ernie_cluster key";
const STANDARD = { model: "", thinking: false, zoom: false, temperature: 0.2, maxTokens: 1024, system: "" };

/** The form and the switches. `onKey` is called when the key has changed. */
export class Settings {
  constructor(onKey) {
    const dialog = byId("settings");
    const known = { ...STANDARD, ...remembered(localStorageOf(), MEMORY) };
    byId("thinking").checked = known.thinking === true;
    byId("zoom").checked = known.zoom === true;
    byId("temperature").value = known.temperature;
    byId("max-tokens").value = known.maxTokens;
    byId("system").value = known.system;
    byId("key").value = remembered(sessionStorageOf(), KEY).key ?? "";
    this.wantedModel = known.model;
    this.#showTemperature();
    for (const id of ["thinking", "zoom", "temperature", "max-tokens", "system", "model"]) {
      byId(id).addEventListener("change", () => this.#remember());
    }
    byId("temperature").addEventListener("input", () => this.#showTemperature());
    byId("key").addEventListener("change", () => {
      remember(sessionStorageOf(), KEY, { key: this.key });
      onKey();
    });
    byId("open-settings").onclick = () => dialog.showModal();
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  }

  get key() {
    return byId("key").value.trim();
  }

  /** As `bodyOf` of conversation.js takes them. */
  get values() {
    return {
      thinking: byId("thinking").checked,
      zoom: byId("zoom").checked,
      temperature: Number(byId("temperature").value),
      maxTokens: Math.max(1, Math.floor(Number(byId("max-tokens").value)) || STANDARD.maxTokens),
      system: byId("system").value.trim(),
    };
  }

  /** Switch on or off for the next question, and remember it. */
  turn(id, isOn) {
    byId(id).checked = isOn;
    this.#remember();
  }

  /** Open the form where the key goes. */
  askForKey() {
    byId("settings").showModal();
    byId("key").focus();
  }

  #remember() {
    remember(localStorageOf(), MEMORY, { ...this.values, model: byId("model").value });
  }

  #showTemperature() {
    byId("temperature-shown").value = Number(byId("temperature").value).toFixed(1);
  }
}

// A browser may forbid a page to store anything: then it forgets.

function localStorageOf() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

function sessionStorageOf() {
  try {
    return window.sessionStorage;
  } catch {
    return null;
  }
}

function remembered(storage, name) {
  try {
    return JSON.parse(storage.getItem(name)) ?? {};
  } catch {
    return {};
  }
}

function remember(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
  } catch {
    // see above
  }
}
