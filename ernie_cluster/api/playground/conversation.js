/** A conversation as the API takes it. Pure.
 *
 * A turn is {text, media: [{kind: "image"|"video", dataUrl, ...}], answer: string|null}; answer is null where there is
 * none: not yet, or because the server refused.
 */

/** Request fields of a question. `settings` are those of settings.js, `turns` end with the one that is asked. */
export function bodyOf(settings, model, turns) {
  return {
    model: model.id,
    messages: messagesOf(turns, settings.system),
    temperature: settings.temperature,
    max_tokens: Math.min(settings.maxTokens, mostTokens(model)),
    chat_template_kwargs: { enable_thinking: settings.thinking },
    tools: settings.zoom ? [{ type: "image_zoom_in_tool" }] : [], // none, even where the server has tools of its own
  };
}

/** Half the context: the other half is left to the question. */
export function mostTokens(model) {
  return model.max_model_len ? Math.max(1, Math.floor(model.max_model_len / 2)) : Infinity;
}

/** The messages of a request. */
export function messagesOf(turns, system) {
  const messages = sent(turns).flatMap((turn) => [question(turn), { role: "assistant", content: turn.answer }]);
  messages.pop(); // the answer that is asked for
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** The pictures of a request, in order, and which of them the question is about: the first of the last question that
 * brought any. The server sees it so, too. */
export function galleryOf(turns) {
  const brought = sent(turns).map(({ media }) => media.filter(({ kind }) => kind === "image"));
  const main = brought.findLastIndex((pictures) => pictures.length > 0);
  return { pictures: brought.flat(), main: brought.slice(0, Math.max(0, main)).flat().length };
}

/** Earlier questions without an answer are left out: what the server refused once, it would refuse each time. */
function sent(turns) {
  return turns.filter((turn, i) => turn.answer !== null || i === turns.length - 1);
}

function question({ text, media }) {
  if (media.length === 0) return { role: "user", content: text };
  const parts = media.map(({ kind, dataUrl }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url: dataUrl } }));
  return { role: "user", content: text ? [...parts, { type: "text", text }] : parts };
}
