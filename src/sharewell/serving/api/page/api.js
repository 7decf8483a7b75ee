// Talking to the server: JSON, streamed answers, and errors in words. Paths are relative, so a proxy may put the
// page under a prefix.

const KEY = "sharewell.api-key";

/** The API key of this tab; sessionStorage forgets it with the tab, and may be switched off altogether. */
export const apiKey = {
  value: read(KEY) ?? "",
  set(value) {
    this.value = value.trim();
    write(KEY, this.value);
  },
};

export function read(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

export function write(name, value) {
  try {
    if (value) sessionStorage.setItem(name, value);
    else sessionStorage.removeItem(name);
  } catch {
    // Without storage the page works, and forgets on reload.
  }
}

/** What went wrong, in words for people. `kind`: away | key | busy | refused | broken. */
export class ServerError extends Error {
  constructor(kind, message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, code, retryAfter });
  }
}

function sentence(text) {
  const trimmed = String(text ?? "").trim();
  if (!trimmed) return "";
  return trimmed[0].toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

function fromBody(error, status, retryAfter = null) {
  const said = sentence(error?.message);
  const code = error?.code ?? null;
  const more = { status, code, retryAfter };
  if (status === 401) {
    return new ServerError("key", apiKey.value ? "The server does not know this API key." : "This server wants an API key.", more);
  }
  if (status === 429) {
    const wait = retryAfter ? ` Try again in ${retryAfter === 1 ? "a second" : `${retryAfter} seconds`}.` : "";
    return new ServerError("busy", (said || "The server is busy.") + wait, more);
  }
  if (code === "context_length_exceeded") {
    return new ServerError("refused", `${said} Start a new chat, or shorten the message or the answer's max tokens.`, more);
  }
  if (status === 0) return new ServerError("broken", `The answer broke off. ${said}`.trim(), more);
  if (status === 503) return new ServerError("away", said || "The server takes no requests at the moment.", more);
  if (status >= 500) return new ServerError("broken", said || `The server failed (status ${status}).`, more);
  return new ServerError("refused", said || `The server refused the request (status ${status}).`, more);
}

async function send(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey.value) headers.Authorization = `Bearer ${apiKey.value}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("away", error.name === "TimeoutError" ? "The server does not answer." : "The server cannot be reached.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw fromBody(answer.error, response.status, Number(response.headers.get("Retry-After")) || null);
}

/** GET a JSON document; gives up after `timeoutMs`. Raises ServerError. */
export async function getJson(path, timeoutMs = 5000) {
  const response = await send(path, { signal: AbortSignal.timeout(timeoutMs) });
  try {
    return await response.json();
  } catch {
    throw new ServerError("away", "The server's answer broke off.");
  }
}

/**
 * POST a chat request and yield the parsed chunks of its stream. Raises ServerError, also when the stream carries
 * an error or ends before it is complete, and the fetch's AbortError when `signal` is aborted.
 */
export async function* streamChat(request, signal) {
  const response = await send("v1/chat/completions", {
    body: { ...request, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  const lines = readLines(response.body);
  let data = [];
  try {
    for await (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      if (line !== "" || !data.length) continue;
      const text = data.join("\n");
      data = [];
      if (text === "[DONE]") return;
      const chunk = JSON.parse(text);
      if (chunk.error) throw fromBody(chunk.error, 0);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError("broken", "The connection broke off in the middle of the answer.");
  }
  throw new ServerError("broken", "The connection broke off in the middle of the answer.");
}

async function* readLines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const lines = rest.split(/\r\n|\n/);
      rest = lines.pop();
      yield* lines;
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // leaving early tells the server that nobody reads any more
  }
}
