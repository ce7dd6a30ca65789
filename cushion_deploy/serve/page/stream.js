// Streams an answer of the API: parses server-sent events and reports text, usage and errors.

/** Return the message of an error answer, or what the status says. */
async function failure(response) {
  try {
    const body = await response.json();
    return body.error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

/** Yield the JSON values of the events of a response; characters may be split between reads. */
async function* events(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/**
 * Ask for a streamed answer.
 *
 * @param {string} path path of the API.
 * @param {object} body the request; `stream` is added.
 * @param {string} key API key, may be empty.
 * @param {AbortSignal} signal stops the answer: the server sees that the connection is closed.
 * @param {(text: string) => void} onText receives every piece of text.
 * @returns {Promise<{usage: object|null, reason: string|null}>} once the answer has ended.
 */
export async function ask(path, body, key, signal, onText) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(request), signal });
  if (!response.ok) throw new Error(await failure(response));
  let usage = null;
  let reason = null;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    for (const choice of event.choices) {
      reason = choice.finish_reason ?? reason;
      const text = choice.delta ? choice.delta.content : choice.text;
      if (text) onText(text);
    }
  }
  return { usage, reason };
}

/** Return a JSON document of the server; throws its error message. */
export async function read(path, key) {
  const response = await fetch(path, { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (!response.ok) throw new Error(await failure(response));
  return response.json();
}
