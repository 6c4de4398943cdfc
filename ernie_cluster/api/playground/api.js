/** The server's API: models, and answers as they come. Knows no page. */

/** What the server, or the way to it, says instead of an answer. */
export class ApiError extends Error {
  /**
   * @param {number} status HTTP status; 0 when the answer broke off, or never began.
   * @param {{message?: string, param?: string, code?: string}} error OpenAI's error object.
   * @param {number|null} retryAfterS seconds after which another try is worth while.
   */
  constructor(status, error, retryAfterS = null) {
    super(error.message || `the server answered with status ${status}`);
    Object.assign(this, { status, param: error.param ?? null, code: error.code ?? null, retryAfterS });
  }
}

/** Model objects. Throws ApiError. */
export async function listModels(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data;
}

/** Chunks of a chat completion. Throws ApiError; the signal's AbortError when it was aborted. */
export async function* streamChat(body, key, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true }, include_timeline: true }),
    signal,
  });
  try {
    for await (const data of eventData(pieces(response.body))) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(0, chunk.error);
      yield chunk;
    }
  } catch (error) {
    throw error instanceof TypeError ? new ApiError(0, { message: `the connection broke: ${error.message}` }) : error;
  }
  throw new ApiError(0, { message: "the connection was closed before the answer was finished" });
}

/** Data of server-sent events. `chunks` are pieces of UTF-8, cut anywhere. */
export async function* eventData(chunks) {
  const decoder = new TextDecoder();
  let rest = "";
  let lines = [];
  for await (const chunk of chunks) {
    const whole = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = whole.pop();
    for (const line of whole.map((text) => text.replace(/\r$/, ""))) {
      if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
      if (line !== "" || lines.length === 0) continue;
      yield lines.join("\n");
      lines = [];
    }
  }
}

async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading does not want the rest
  }
}

async function ask(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "the server cannot be reached" });
  }
  if (response.ok) return response;
  const retryAfter = Number.parseFloat(response.headers.get("retry-after"));
  throw new ApiError(response.status, await errorOf(response), Number.isFinite(retryAfter) ? retryAfter : null);
}

async function errorOf(response) {
  try {
    return (await response.json()).error ?? {};
  } catch {
    return {}; // not ours: a proxy's page
  }
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}
