// A small, safe part of Markdown as DOM nodes. Model text only ever becomes text nodes: nothing here parses HTML,
// and links stay text, so an answer cannot run anything or load anything.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.+?)\s*#*$/;
const BULLET = /^(\s*)[-*+]\s+(.*)$/;
const NUMBER = /^(\s*)(\d{1,9})[.)]\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;

/** Split text into blocks `{kind, lines, ...}`. Linear in the text. */
export function blocks(text) {
  const found = [];
  let open = null;
  const begin = (block) => found.push((open = block));
  let fence = null;
  for (const line of text.split("\n")) {
    if (fence) {
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).replaceAll(fence[0], "")) {
        fence = open = null;
      } else open.lines.push(line);
      continue;
    }
    let m;
    if ((m = FENCE.exec(line))) {
      fence = m[1];
      begin({ kind: "code", language: m[2], lines: [] });
    } else if (!line.trim()) {
      // A blank line between two items keeps their list together; other blocks end.
      if (open?.kind !== "ol" && open?.kind !== "ul") open = null;
    } else if (RULE.test(line)) {
      found.push({ kind: "rule", lines: [] });
      open = null;
    } else if ((m = HEADING.exec(line))) {
      found.push({ kind: "heading", level: m[1].length, lines: [m[2]] });
      open = null;
    } else if ((m = NUMBER.exec(line))) {
      if (open?.kind !== "ol") begin({ kind: "ol", start: Number(m[2]), lines: [] });
      open.lines.push({ depth: m[1].length, text: m[3] });
    } else if ((m = BULLET.exec(line))) {
      if (open?.kind === "ol" && m[1].length > 0) open.lines.push({ depth: m[1].length, text: m[2], bullet: true });
      else {
        if (open?.kind !== "ul") begin({ kind: "ul", lines: [] });
        open.lines.push({ depth: m[1].length, text: m[2] });
      }
    } else if ((m = QUOTE.exec(line))) {
      if (open?.kind !== "quote") begin({ kind: "quote", lines: [] });
      open.lines.push(m[1]);
    } else if ((open?.kind === "ol" || open?.kind === "ul") && /^\s+/.test(line)) {
      open.lines.at(-1).text += "\n" + line.trim();
    } else {
      if (open?.kind !== "text") begin({ kind: "text", lines: [] });
      open.lines.push(line);
    }
  }
  return found;
}

// Spans are bounded, so that a text full of unmatched signs stays cheap.
const INLINE = /(`+)([^`]|[^`][^]{0,1000}?[^`])\1(?!`)|\*\*(?=\S)([^]{0,1000}?\S)\*\*|(?<![\w*])\*(?=[^\s*])([^]{0,1000}?[^\s*])\*(?![\w*])/g;

function inline(parent, text) {
  let at = 0;
  for (const m of text.matchAll(INLINE)) {
    if (m.index > at) parent.append(text.slice(at, m.index));
    const [tag, inner] = m[1] ? ["code", m[2]] : m[3] !== undefined ? ["strong", m[3]] : ["em", m[4]];
    const node = document.createElement(tag);
    if (tag === "code") node.textContent = inner.trim();
    else inline(node, inner);
    parent.append(node);
    at = m.index + m[0].length;
  }
  if (at < text.length) parent.append(text.slice(at));
  return parent;
}

function element(tag, text) {
  return inline(document.createElement(tag), text);
}

function list(block) {
  const root = document.createElement(block.kind);
  if (block.kind === "ol" && block.start !== 1) root.start = block.start;
  let last = null;
  for (const item of block.lines) {
    const node = element("li", item.text);
    if (last && (item.bullet || item.depth >= 2)) {
      let nested = last.querySelector(":scope > ul");
      if (!nested) last.append((nested = document.createElement("ul")));
      nested.append(node);
    } else root.append((last = node));
  }
  return root;
}

function code(block) {
  const figure = document.createElement("figure");
  figure.className = "code";
  const head = document.createElement("figcaption");
  head.append(block.language || "code");
  const pre = document.createElement("pre");
  const body = document.createElement("code");
  body.textContent = block.lines.join("\n");
  pre.tabIndex = 0; // long lines scroll; the keyboard must reach that
  pre.append(body);
  head.append(copyButton(() => body.textContent, "Copy"));
  figure.append(head, pre);
  return figure;
}

/** A button that copies what `text()` returns and says so. */
export function copyButton(text, label) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "link";
  button.textContent = label;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copying is not allowed here";
    }
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

function build(block) {
  switch (block.kind) {
    case "code":
      return code(block);
    case "rule":
      return document.createElement("hr");
    case "heading":
      return element(`h${Math.min(6, block.level + 2)}`, block.lines[0]);
    case "ol":
    case "ul":
      return list(block);
    case "quote":
      return element("blockquote", block.lines.join("\n"));
    default:
      return element("p", block.lines.join("\n"));
  }
}

/** Shows growing text in `root`; blocks that did not change keep their nodes, so selections and scrolling stay. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.shown = [];
  }

  show(text) {
    const next = blocks(text).map((block) => [JSON.stringify(block), block]);
    let same = 0;
    while (same < next.length && this.shown[same] === next[same][0]) same++;
    while (this.root.childNodes.length > same) this.root.lastChild.remove();
    for (const [, block] of next.slice(same)) this.root.append(build(block));
    this.shown = next.map(([source]) => source);
  }
}
