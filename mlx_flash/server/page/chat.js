// The conversation. What a model writes becomes text nodes, never HTML.

import { events, request, ServerError } from "./api.js";
import { bytes, digits, percent, plural, seconds } from "./format.js";

const EXAMPLES = {
  chat: ["What is the capital of France?", "Explain flash memory in two sentences.", "Write a haiku about slate."],
  text: ["Once upon a time", "One day, a little dog", "The sun was shining and"],
};

const find = (id) => document.getElementById(id);

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

export class Chat {
  constructor() {
    this.log = find("log");
    this.box = find("message");
    this.messages = [];
    this.abort = null;
    this.templated = true;
    find("compose").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(this.box.value);
    });
    this.box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send(this.box.value);
    });
    this.box.addEventListener("input", () => this.fit());
    find("stop").addEventListener("click", () => this.stop());
    find("new").addEventListener("click", () => this.clear());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
  }

  // A model without a chat template continues texts instead.
  serve(model) {
    this.templated = model.chat;
    if (!model.chat) {
      find("welcome-title").textContent = "Begin a text, the model continues it";
      find("welcome-text").textContent =
        "This model has no chat template: each message is continued on its own.";
      this.box.placeholder = "A text to continue";
      find("system-field").hidden = true;
    }
    const buttons = EXAMPLES[model.chat ? "chat" : "text"].map((text) => {
      const button = element("button", "example", text);
      button.type = "button";
      button.addEventListener("click", () => this.send(text));
      return button;
    });
    find("examples").replaceChildren(...buttons);
  }

  fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(this.box.scrollHeight, 200)}px`;
  }

  stop() {
    this.abort?.abort();
  }

  clear() {
    this.stop();
    this.messages = [];
    for (const entry of this.log.querySelectorAll(".entry")) entry.remove();
    find("welcome").hidden = false;
    this.box.focus();
  }

  async send(text) {
    if (!text.trim() || this.abort) return;
    this.box.value = "";
    this.fit();
    find("welcome").hidden = true;
    const asked = { role: "user", content: text };
    const history = this.messages;
    history.push(asked);
    this.add("user", "You").body.textContent = text;
    const entry = this.add("model", this.templated ? "Model" : "Continued");
    entry.whole.setAttribute("aria-busy", "true");
    const answer = { text: "", usage: null, seen: false };
    this.abort = new AbortController();
    this.busy(true);
    try {
      await this.stream(text, answer, entry);
      this.finish(entry, answer, "");
    } catch (error) {
      if (error.name === "AbortError") this.finish(entry, answer, "stopped");
      else this.fail(entry, error);
    } finally {
      entry.whole.setAttribute("aria-busy", "false");
      this.abort = null;
      this.busy(false);
      if (answer.text) history.push({ role: "assistant", content: answer.text });
      else history.splice(history.indexOf(asked), 1);
    }
  }

  async stream(text, answer, entry) {
    const body = { model: "default_model", stream: true, stream_options: { include_usage: true } };
    const temperature = find("temperature").value;
    const tokens = find("max-tokens").value;
    if (temperature) body.temperature = Number(temperature);
    if (tokens) body.max_tokens = Number(tokens);
    const system = find("system").value.trim();
    if (this.templated) {
      const first = system ? [{ role: "system", content: system }] : [];
      body.messages = [...first, ...this.messages];
    } else {
      body.prompt = text;
    }
    const path = this.templated ? "/v1/chat/completions" : "/v1/completions";
    const options = { method: "POST", body: JSON.stringify(body), signal: this.abort.signal };
    for await (const data of events(await request(path, options))) {
      if (data === "[DONE]") break;
      const part = JSON.parse(data);
      if (part.error) throw new ServerError(part.error.message ?? String(part.error), 500);
      if (part.usage) answer.usage = part.usage;
      const choice = part.choices?.[0];
      if (choice) this.show(entry, answer, choice);
    }
  }

  show(entry, answer, choice) {
    const delta = choice.delta ?? { content: choice.text };
    const thought = delta.reasoning ?? delta.reasoning_content;
    const follow = this.atEnd();
    if (thought) this.thinking(entry).append(thought);
    if (delta.content) {
      answer.text += delta.content;
      entry.body.append(delta.content);
    }
    for (const call of delta.tool_calls ?? []) {
      entry.body.append(`${call.function?.name ?? ""}${call.function?.arguments ?? ""}`);
    }
    if (choice.finish_reason === "length") answer.cut = true;
    if (follow) this.toEnd();
  }

  thinking(entry) {
    if (!entry.thought) {
      const details = element("details", "thought");
      details.open = true;
      entry.thought = element("div", "text");
      details.append(element("summary", "", "Thinking"), entry.thought);
      entry.body.before(details);
    }
    return entry.thought;
  }

  finish(entry, answer, note) {
    const said = [];
    const { usage } = answer;
    const flash = usage?.flash ?? {};
    if (usage) said.push(plural(usage.completion_tokens, "token"));
    if (flash.tokens_per_s) said.push(`${digits(flash.tokens_per_s)} tokens/s`);
    if (flash.first_token_s) said.push(`first after ${seconds(flash.first_token_s)}`);
    if (flash.hit_rate != null) said.push(`${percent(flash.hit_rate)} hits`);
    if (flash.bytes_read != null) said.push(`${bytes(flash.bytes_read)} read`);
    if (answer.cut) said.push("cut at the most tokens");
    if (note) said.push(note);
    const follow = this.atEnd();
    entry.whole.append(element("p", "figures", said.join(" · ")));
    if (follow) this.toEnd();
  }

  fail(entry, error) {
    const said = element("p", "error", error.message);
    said.setAttribute("role", "alert");
    entry.whole.append(said);
    this.toEnd();
  }

  add(kind, who) {
    const whole = element("article", `entry ${kind}`);
    const body = element("div", "text");
    whole.append(element("h3", "unseen", who), body);
    this.log.append(whole);
    this.toEnd();
    return { whole, body, thought: null };
  }

  busy(now) {
    find("send").hidden = now;
    find("stop").hidden = !now;
    if (!now) this.box.focus({ preventScroll: true });
  }

  atEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}
