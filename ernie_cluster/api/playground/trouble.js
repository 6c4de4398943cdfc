/** Errors in words, with what can be done about them. */

import { el } from "./dom.js";

const TITLES = {
  0: "No answer",
  400: "The server cannot use this request",
  401: "This needs a valid API key",
  404: "Not served here",
  408: "The message took too long to arrive",
  413: "The message is too large",
  429: "Too much at once",
  503: "A part of the service failed",
  504: "Not finished in time",
};
const WORTH_ANOTHER_TRY = new Set([0, 408, 429]);

/** Title of a refusal by its status. Pure. */
export function titleOf(status) {
  return TITLES[status] ?? (status >= 500 ? "Something broke on the server" : `The server refused (status ${status})`);
}

/**
 * A box that tells of an error.
 * @param {Error} error an ApiError of api.js, or a fault of this page.
 * @param {{retry: function, askForKey: function}} remedies what the buttons do.
 */
export function troubleBox(error, { retry, askForKey }) {
  const { status = 0, param, code, retryAfterS, message } = error;
  const facts = [param && `field ${param}`, code && `code ${code}`, status && `status ${status}`].filter(Boolean);
  return el(
    "div",
    { className: "trouble", role: "alert" },
    el("strong", {}, titleOf(status)),
    el("p", {}, sentence(message)),
    facts.length > 0 && el("small", {}, facts.join(" · ")),
    status === 401 && el("button", { type: "button", className: "plain", onclick: askForKey }, "Enter a key"),
    (status >= 500 || status === 401 || WORTH_ANOTHER_TRY.has(status)) && retryButton(retry, retryAfterS),
  );
}

/** A button that can be used from when the server said so. */
function retryButton(retry, retryAfterS) {
  const button = el("button", { type: "button", className: "plain again", onclick: retry });
  let left = Math.ceil(retryAfterS ?? 0);
  const show = () => {
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
  };
  show();
  const timer = setInterval(() => {
    left -= 1;
    show();
    if (left <= 0) clearInterval(timer);
  }, 1000);
  return button;
}

/** Begins large, unless it begins with the name of a field, and ends with a full stop. */
function sentence(words) {
  const text = words.replace(/^[a-z](?=[a-z]* )/, (letter) => letter.toUpperCase());
  return /[.!?]$/.test(text) ? text : `${text}.`;
}
