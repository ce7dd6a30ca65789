// The chat: messages, composer, settings, and the panel with the bundle's report.

import { ask, read } from "/stream.js";

const $ = (id) => document.getElementById(id);
const settings = $("settings").elements;
const messages = []; // {role, content}, as the API takes them
let server = { model: "", chat: true };
let running = null; // AbortController of the answer that is being streamed

/** Return a new element with a class and a text. Text is never read as markup. */
function element(tag, name, text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}

function addMessage(role, text) {
  const item = element("li", role);
  const body = element("div", "text", text);
  const note = element("div", "note");
  item.append(body, note);
  $("messages").append(item);
  item.scrollIntoView({ block: "end" });
  return { body, note };
}

/** Keep the end in view, unless the reader has scrolled away from it. */
function follow(change) {
  const list = $("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  change();
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function number(name) {
  const value = settings[name].value.trim();
  return value === "" ? undefined : Number(value);
}

function request() {
  const shared = {
    model: server.model, temperature: number("temperature"), top_p: number("top_p"),
    max_tokens: number("max_tokens"), seed: number("seed"),
  };
  if (!server.chat) return ["/v1/completions", { ...shared, prompt: messages.map((m) => m.content).join("") }];
  const system = settings.system.value.trim();
  const all = system ? [{ role: "system", content: system }, ...messages] : messages;
  return ["/v1/chat/completions", { ...shared, messages: all }];
}

/** Return what to say under an answer: tokens, speed without the first token, and the reused part of the prompt. */
function summary(usage, began, first, ended, reason) {
  if (!usage) return reason;
  const tokens = usage.completion_tokens;
  const seconds = (ended - first) / 1000;
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (first) parts.push(`first after ${((first - began) / 1000).toFixed(2)} s`);
  const cached = usage.prompt_tokens_details.cached_tokens;
  parts.push(`prompt ${usage.prompt_tokens}, ${cached} of it reused`);
  if (reason === "length") parts.push("cut off at the most new tokens");
  return parts.join(" · ");
}

function setRunning(controller) {
  running = controller;
  $("send").disabled = $("new").disabled = controller !== null;
  $("stop").disabled = controller === null;
  $("retry").disabled = controller !== null || !messages.some((m) => m.role === "user");
}

async function answer() {
  const { body, note } = addMessage("assistant", "");
  const controller = new AbortController();
  setRunning(controller);
  const began = performance.now();
  let first = 0;
  let pieces = 0;
  let text = "";
  const show = (piece) => {
    first ||= performance.now();
    pieces += 1;
    text += piece;
    follow(() => {
      body.textContent = text;
      const seconds = (performance.now() - first) / 1000;
      note.textContent = pieces > 1 ? `${((pieces - 1) / seconds).toFixed(1)} pieces/s` : "";
    });
  };
  try {
    const [path, wanted] = request();
    const { usage, reason } = await ask(path, wanted, settings.key.value, controller.signal, show);
    note.textContent = summary(usage, began, first, performance.now(), reason);
  } catch (error) {
    if (controller.signal.aborted) note.textContent = "stopped";
    else {
      note.className = "note error";
      note.textContent = error.message;
    }
  }
  // An answer that failed before its first character is no turn of the conversation.
  if (text || note.className === "note") messages.push({ role: "assistant", content: text });
  setRunning(null);
}

function send() {
  const text = $("input").value;
  if (running || !text.trim()) return;
  $("input").value = "";
  messages.push({ role: "user", content: text });
  addMessage("user", text);
  answer();
}

/** Drop the last answer and ask for another one. */
function retry() {
  if (running || !messages.length) return;
  if (messages.at(-1).role === "assistant") messages.pop();
  const shown = $("messages").lastElementChild;
  if (shown.className === "assistant") shown.remove();
  answer();
}

function row(cell, name, cells) {
  const made = document.createElement("tr");
  made.append(element("th", "", name), ...cells.map((text) => element(cell, "", text)));
  return made;
}

function showReport(report, engine) {
  $("sentence").textContent = report ? report.sentence : "This bundle has no readable report.";
  $("sentence").className = report ? report.status : "";
  const facts = [["Served by", engine]];
  if (report) {
    const head = document.createElement("thead");
    head.append(row("th", "", report.columns));
    const body = document.createElement("tbody");
    body.append(...report.rows.map((r) => row("td", r.name, r.cells)));
    $("table").replaceChildren(head, body);
    $("table").hidden = report.rows.length === 0;
    for (const e of report.engines) {
      facts.push([`${e.name} (${e.targets.join(", ")})`, [e.coverage, e.note].filter(Boolean).join("; ")]);
    }
    facts.push(["Prefix", report.prefix], ["Parity", report.parity]);
  }
  $("facts").replaceChildren(...facts.flatMap(([name, text]) => [element("dt", "", name), element("dd", "", text)]));
}

async function connect() {
  try {
    server = await read("/proof", settings.key.value);
    $("model").textContent = document.title = server.model;
    $("status").textContent = `${server.engine} · ${server.context.toLocaleString("en")} tokens of context`;
    settings.max_tokens.value = Math.min(settings.max_tokens.value, Math.floor(server.context / 2));
    if (!server.chat) $("input").placeholder = "Text to continue (this model was not trained to chat)";
    showReport(server.report, server.engine);
  } catch (error) {
    $("status").textContent = error.message;
    $("sentence").textContent = error.message;
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("input").addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter confirms that character.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("retry").addEventListener("click", retry);
$("new").addEventListener("click", () => {
  messages.length = 0;
  $("messages").replaceChildren();
  setRunning(null);
  $("input").focus();
});
$("panel-button").addEventListener("click", () => {
  const open = document.body.classList.toggle("panel");
  $("panel-button").setAttribute("aria-expanded", String(open));
  $("panel-button").textContent = open ? "Chat" : "Details";
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
settings.key.addEventListener("change", connect);
setRunning(null);
connect();
