// Talks to the server: JSON, and streams of server-sent events.

/** Something the server says, or its silence. `param` is the field that it names, if any. */
export class ServerError extends Error {
  constructor(message, { param = null, status = null } = {}) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

export async function fetchJson(path, key) {
  const response = await send(path, { headers: makeHeaders(key) });
  return response.json();
}

/**
 * The chunks of a streamed answer.
 *
 * Throws a ServerError where the server refuses, fails or goes away before the answer is whole,
 * and an AbortError once `signal` says so.
 */
export async function* streamChunks({ path, text, key, signal }) {
  const headers = { "Content-Type": "application/json", ...makeHeaders(key) };
  const response = await send(path, { method: "POST", headers, body: text, signal });
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw readError(chunk, null);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError(`The connection broke before the answer was complete (${error.message}).`);
  }
  throw new ServerError("The server ended the stream before the answer was complete.");
}

/** Where a path of the server is, also behind a proxy that serves it under a prefix. */
export function locate(path) {
  return new URL(path, document.baseURI.split("#")[0]).href;
}

function makeHeaders(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function send(path, options) {
  const url = locate(path);
  let response;
  try {
    response = await fetch(url, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`No answer from ${new URL(url).origin}: is the server running?`);
  }
  if (!response.ok) throw readError(await response.text(), response.status);
  return response;
}

function readError(body, status) {
  try {
    const { error } = typeof body === "string" ? JSON.parse(body) : body;
    if (typeof error === "string") return new ServerError(error, { status });
    return new ServerError(error.message, { param: error.param ?? null, status });
  } catch {
    return new ServerError(`HTTP ${status}: ${String(body).slice(0, 500) || "no explanation"}`, { status });
  }
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}
