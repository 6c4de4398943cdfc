/** A request's way through the cluster, as bars on one axis. */

import { el, place } from "./dom.js";
import { duration, grouped } from "./numbers.js";

/** Stages with a colour of their own. */
const KNOWN = new Set(["queue", "preprocess", "route", "encode", "embeddings", "fetch", "prefill", "transfer", "decode"]);

/** Each stage with its place between the first one's start and the last one's end, in percent:
 * [{stage, offset_s, left, width}]. Pure. */
export function laidOut(stages) {
  const start = Math.min(...stages.map((s) => s.start_s));
  const whole = Math.max(...stages.map((s) => s.start_s + s.duration_s)) - start || 1;
  return stages.map((stage) => {
    const offset_s = stage.start_s - start;
    return { stage, offset_s, left: (100 * offset_s) / whole, width: (100 * stage.duration_s) / whole };
  });
}

/** Tokens per second of the decode stages together; null where none of them tells. Pure. */
export function decodeRate(stages) {
  const told = stages.filter((s) => s.name === "decode" && s.tokens > 0 && s.duration_s > 0);
  const sum = (key) => told.reduce((total, s) => total + s[key], 0);
  return told.length > 0 ? sum("tokens") / sum("duration_s") : null;
}

/** All stages in one line, without words. */
export function strip(stages) {
  return el("span", { className: "strip", "aria-hidden": "true" }, ...laidOut(stages).map(bar));
}

/** A line for each stage: name, bar, time, and what is known of it. */
export function waterfall(stages) {
  return el("ol", { className: "stages", "aria-label": "Stages of the request" }, ...laidOut(stages).map(line));
}

function line(laid) {
  const { name, start_s: _start, duration_s: took, ...details } = laid.stage;
  const known = Object.entries(details).map(told).join(" · ");
  return el(
    "li",
    { title: `starts after ${duration(laid.offset_s)}` },
    el("span", { className: "stage-name" }, name),
    el("span", { className: "track", "aria-hidden": "true" }, bar(laid)),
    el("span", { className: "took" }, duration(took)),
    known && el("small", { className: "detail" }, known),
  );
}

function told([key, value]) {
  const values = [value].flat().map(grouped).join("; ");
  if (key === "why") return values;
  const name = key.replaceAll("_", " ");
  return typeof value === "number" ? `${values} ${name}` : `${name} ${values}`;
}

function bar({ stage, left, width }) {
  const kind = KNOWN.has(stage.name) ? stage.name : "other";
  return place(el("span", { className: `stage stage-${kind}` }), { left, width });
}
