// One turn of the conversation as it is shown: the question, the growing answer, and what the answer took.

import { count, duration, plural, rate } from "./format.js";
import { MarkdownView, copyButton } from "./markdown.js";

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

export class TurnView {
  /** `turn`: {prompt, text, state, error, figures}; `onRetry` is called when the person wants it asked again. */
  constructor(turn, onRetry) {
    this.turn = turn;
    this.onRetry = onRetry;
    this.root = element("article", "turn");
    const question = element("div", "question");
    question.append(element("span", "hidden", "You: "), turn.prompt);
    this.answer = element("div", "answer");
    this.answer.append(element("span", "hidden", "Model: "));
    this.body = element("div", "body");
    this.foot = element("footer");
    this.answer.append(this.body, this.foot);
    this.root.append(question, this.answer);
    this.view = new MarkdownView(this.body);
    this.frame = null;
    this.render();
  }

  /** Show the turn as it is now, at most once a frame. */
  refresh() {
    this.frame ??= requestAnimationFrame(() => this.render());
  }

  render() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.frame = null;
    const { turn } = this;
    this.root.dataset.state = turn.state;
    this.view.show(turn.text);
    this.foot.replaceChildren(...(turn.state === "streaming" ? [] : this.notes()));
    this.foot.hidden = !this.foot.childNodes.length;
    this.onRender?.();
  }

  notes() {
    const { turn } = this;
    const parts = [];
    const figures = turn.figures ?? {};
    const stats = element("ul", "figures");
    const add = (text, title) => {
      const item = element("li", "", text);
      if (title) item.title = title;
      stats.append(item);
    };
    if (figures.firstTokenS) add(`first token ${duration(figures.firstTokenS)}`, "Seen from this page");
    if (figures.tokensPerS) add(`${rate(figures.tokensPerS)} tokens/s`, "Tokens after the first one, by the time between first and last");
    if (figures.tokens) add(`${figures.counted ? "" : "about "}${plural(figures.tokens, "token")}`);
    if (figures.promptTokens) {
      add(
        `${count(figures.cachedTokens)} of ${plural(figures.promptTokens, "prompt token")} shared`,
        "Prompt tokens that the engine had computed before",
      );
      const bar = element("span", "share");
      const part = element("i");
      part.style.width = `${(100 * figures.cachedTokens) / figures.promptTokens}%`;
      bar.append(part);
      stats.lastChild.append(bar);
    }
    if (stats.childNodes.length) parts.push(stats);
    if (turn.text) parts.push(copyButton(() => turn.text, "Copy answer"));
    if (turn.state === "stopped") parts.push(element("p", "remark", "You stopped this answer."));
    if (turn.state === "cut") parts.push(element("p", "remark", "The answer ended at its token limit."));
    if (turn.state === "done" && !turn.text) parts.push(element("p", "remark", "The model ended its answer without a word."));
    if (turn.state === "failed") {
      const box = element("div", "failure");
      box.setAttribute("role", "alert");
      box.append(element("p", "", turn.error));
      const again = element("button", "quiet", "Try again");
      again.type = "button";
      again.addEventListener("click", () => this.onRetry());
      box.append(again);
      parts.unshift(box);
    }
    return parts;
  }
}
