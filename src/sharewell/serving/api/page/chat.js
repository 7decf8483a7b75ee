// The conversation: sends it, streams answers into it, keeps it for this tab.

import { ServerError, read, streamChat, write } from "./api.js";
import { Settings } from "./settings.js";
import { TurnView } from "./turn.js";

const KEPT = "sharewell.conversation";
const STARTERS = [
  "Explain in three sentences why a shared prompt only has to be computed once.",
  "Write a Python function that reverses the words of a sentence.",
  "Give me five ideas for a rainy Sunday.",
];
const at = (id) => document.getElementById(id);

/** Reads a growing text to a polite live region, sentence by sentence: token by token would be noise. */
class Speaker {
  constructor(root) {
    this.root = root;
  }

  begin() {
    this.root.replaceChildren();
    this.said = 0;
  }

  hear(text, complete = false) {
    const rest = text.slice(this.said);
    const last = [...rest.matchAll(/[.!?:]\s/g)].at(-1);
    const end = complete ? rest.length : last ? last.index + 1 : 0;
    this.say(rest.slice(0, end));
    this.said += end;
  }

  say(words) {
    if (!words.trim()) return;
    const line = document.createElement("p");
    line.textContent = words.trim();
    this.root.append(line);
    while (this.root.childNodes.length > 20) this.root.firstChild.remove();
  }
}

export class Chat {
  /** `onKey(error)` is called when an answer was refused for want of an API key. */
  constructor({ onKey }) {
    this.onKey = onKey;
    this.settings = new Settings();
    this.speaker = new Speaker(at("spoken"));
    this.turns = [];
    this.abort = null;
    this.stuck = true;
    this.restore();
    this.listen();
  }

  offer(models) {
    this.settings.offer(models);
  }

  listen() {
    const prompt = at("prompt");
    prompt.addEventListener("input", () => this.fit());
    prompt.addEventListener("keydown", (event) => {
      // isComposing: Enter that only accepts what an input method proposes.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.abort) this.submit();
    });
    at("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.abort) this.stop();
      else this.submit();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
    at("new-chat").addEventListener("click", () => this.clear());
    const log = at("log");
    log.addEventListener("scroll", () => {
      this.stuck = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
      at("latest").hidden = this.stuck;
    });
    new ResizeObserver(() => this.follow()).observe(log);
    at("latest").addEventListener("click", () => this.follow(true));
    for (const text of STARTERS) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => !this.abort && this.ask(text));
      at("starters").append(button);
    }
  }

  /** The message box grows with its text; the style sheet bounds it. */
  fit() {
    const box = at("prompt");
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight + 2}px`;
  }

  follow(always = false) {
    if (always) this.stuck = true;
    if (this.stuck) at("log").scrollTop = at("log").scrollHeight;
  }

  submit() {
    const text = at("prompt").value.trim();
    if (text && this.ask(text)) {
      at("prompt").value = "";
      this.fit();
    }
    at("prompt").focus();
  }

  stop() {
    this.abort?.abort();
  }

  clear() {
    this.stop();
    this.abort = null; // what was just stopped ends by itself, and no longer speaks for this chat
    this.mode("send");
    this.turns = [];
    for (const node of at("log").querySelectorAll(".turn")) node.remove();
    at("welcome").hidden = false;
    this.keep();
    at("prompt").focus();
  }

  /** What the server is sent for `turn`: turns that got no answer are left out, roles must alternate. */
  messages(turn) {
    const sent = this.settings.system ? [{ role: "system", content: this.settings.system }] : [];
    for (const earlier of this.turns.slice(0, this.turns.indexOf(turn))) {
      if (!earlier.text) continue;
      sent.push({ role: "user", content: earlier.prompt }, { role: "assistant", content: earlier.text });
    }
    return [...sent, { role: "user", content: turn.prompt }];
  }

  /** Ask a new question; false when the settings must be put right first. */
  ask(prompt) {
    const fields = this.settings.request();
    if (!fields) return false;
    const turn = { prompt, text: "", state: "streaming" };
    this.turns.push(turn);
    const view = this.add(turn);
    this.follow(true);
    this.run(turn, view, fields);
    return true;
  }

  retry(turn, view) {
    const fields = this.abort ? null : this.settings.request();
    if (!fields) return;
    Object.assign(turn, { text: "", state: "streaming", error: null, figures: null });
    view.render();
    this.run(turn, view, fields);
    at("prompt").focus();
  }

  add(turn) {
    at("welcome").hidden = true;
    const view = new TurnView(turn, () => this.retry(turn, view));
    view.onRender = () => this.follow();
    at("log").append(view.root);
    return view;
  }

  async run(turn, view, fields) {
    const abort = (this.abort = new AbortController());
    this.mode("stop");
    this.speaker.begin();
    const asked = performance.now();
    const seen = { first: null, last: null, pieces: 0, usage: null, reason: null };
    try {
      for await (const chunk of streamChat({ ...fields, messages: this.messages(turn) }, abort.signal)) {
        seen.usage = chunk.usage ?? seen.usage;
        const choice = chunk.choices[0];
        seen.reason = choice?.finish_reason ?? seen.reason;
        const piece = choice?.delta.content;
        if (!piece) continue;
        seen.last = performance.now();
        seen.first ??= seen.last;
        seen.pieces++;
        turn.text += piece;
        view.refresh();
        this.speaker.hear(turn.text);
      }
      turn.state = seen.reason === "length" ? "cut" : "done";
    } catch (error) {
      if (error.name === "AbortError") turn.state = "stopped";
      else if (error instanceof ServerError) {
        Object.assign(turn, { state: "failed", error: error.message });
        if (error.kind === "key") this.onKey(error);
      } else throw error;
    } finally {
      turn.figures = figures(asked, seen);
      view.render();
      this.speaker.hear(turn.text, true);
      if (this.abort === abort) {
        this.abort = null;
        this.mode("send");
        this.keep();
      }
    }
  }

  mode(mode) {
    at("send").dataset.mode = mode;
    at("send").textContent = mode === "stop" ? "Stop" : "Send";
    at("log").setAttribute("aria-busy", String(mode === "stop"));
  }

  keep() {
    write(KEPT, this.turns.length ? JSON.stringify(this.turns) : "");
  }

  restore() {
    let turns = null;
    try {
      turns = JSON.parse(read(KEPT) ?? "[]");
    } catch {
      return; // written by another version
    }
    for (const turn of turns) {
      // A reload in the middle of an answer ends it.
      if (turn.state === "streaming") turn.state = "stopped";
      this.turns.push(turn);
      this.add(turn);
    }
    this.follow();
  }
}

/** What an answer took: seconds, tokens, and how much of its prompt was shared. */
function figures(asked, { first, last, pieces, usage }) {
  if (first === null) return null;
  const tokens = usage?.completion_tokens ?? pieces;
  return {
    firstTokenS: (first - asked) / 1000,
    tokens,
    counted: Boolean(usage),
    tokensPerS: last > first && tokens > 1 ? ((tokens - 1) * 1000) / (last - first) : null,
    promptTokens: usage?.prompt_tokens ?? null,
    cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? 0,
  };
}
