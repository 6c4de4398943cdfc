/** A conversation as the API takes it. Pure.
 *
 * A turn is {text, media: [{kind: "image"|"video", dataUrl, ...}], answer: string|null}; answer is null where there is
 * none: not yet, or because the server refused.
 */

/** Request fields of a question. `settings` are those of settings.js, `turns` end with the one that is asked. */
export function bodyOf(settings, model, turns) {
  const body = {
    model: model.id,
    messages: messagesOf(turns, settings.system),
    temperature: settings.temperature,
    max_tokens: Math.min(settings.maxTokens, mostTokens(model)),
    chat_template_kwargs: { enable_thinking: settings.thinking },
  };
  return settings.zoom ? { ...body, tools: [{ type: "image_zoom_in_tool" }] } : body;
}

/** Half the context: the other half is left to the question. */
export function mostTokens(model) {
  return model.max_model_len ? Math.max(1, Math.floor(model.max_model_len / 2)) : Infinity;
}

/** Earlier questions without an answer are left out: what the server refused once, it would refuse each time. */
export function messagesOf(turns, system) {
  const asked = turns.filter((turn, i) => turn.answer !== null || i === turns.length - 1);
  const messages = asked.flatMap((turn, i) => {
    const answer = { role: "assistant", content: turn.answer };
    return i === asked.length - 1 ? [question(turn)] : [question(turn), answer];
  });
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

function question({ text, media }) {
  if (media.length === 0) return { role: "user", content: text };
  const parts = media.map(({ kind, dataUrl }) => {
    const type = `${kind}_url`;
    return { type, [type]: { url: dataUrl } };
  });
  return { role: "user", content: text ? [...parts, { type: "text", text }] : parts };
}

/** Pictures of the conversation up to a turn, in order. */
export function picturesUpTo(turns, turn) {
  return turns.slice(0, turns.indexOf(turn) + 1).flatMap(({ media }) => media.filter(({ kind }) => kind === "image"));
}
