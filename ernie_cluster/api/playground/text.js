/** An answer's text with the little of Markdown that helps reading: code, bold and headings. Built of nodes. */

import { el } from "./dom.js";

/** Replaces what `node` holds by the text; an unfinished text is fine. */
export function show(node, text) {
  node.replaceChildren(...blocks(text).map(({ kind, lines }) => BUILD[kind](lines)));
}

const BUILD = {
  code: (lines) => el("pre", {}, el("code", {}, lines.join("\n"))),
  heading: ([line]) => el("p", { className: "heading" }, ...inline(line)),
  paragraph: (lines) => el("p", {}, ...inline(lines.join("\n"))),
};

/** The text as [{kind: "code"|"heading"|"paragraph", lines}]. Pure. */
export function blocks(text) {
  const found = [];
  let open = null;
  for (const line of text.split("\n")) {
    const isFence = /^\s*```/.test(line);
    if (open?.kind === "code") {
      if (isFence) open = null;
      else open.lines.push(line);
    } else if (isFence) {
      found.push((open = { kind: "code", lines: [] }));
    } else if (/^#{1,6} /.test(line)) {
      found.push({ kind: "heading", lines: [line.replace(/^#+ /, "")] });
      open = null;
    } else if (line.trim() === "") {
      open = null;
    } else if (open) {
      open.lines.push(line);
    } else {
      found.push((open = { kind: "paragraph", lines: [line] }));
    }
  }
  return found;
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((piece, i) => {
    if (i % 2 === 0) return piece;
    return piece[0] === "`" ? el("code", {}, piece.slice(1, -1)) : el("strong", {}, piece.slice(2, -2));
  });
}
