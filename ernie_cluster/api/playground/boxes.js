/** Boxes that an answer names, and the parts of pictures that they mean. A box is [x1, y1, x2, y2], 0 to 1000. */

import { el, place } from "./dom.js";

const NUM_COLOURS = 6;
const CROP_SIDE = 640;

/** Boxes of an answer, as {box, label}: of objects like {"bbox_2d": [x1, y1, x2, y2], "label": "cat"}, wherever in
 * the text they stand; "bbox_2d" may be a list of boxes. What is no box is left out. */
export function findBoxes(text) {
  return [...text.matchAll(/\{[^{}]*"bbox_2d"[^{}]*\}/g)].flatMap(([found]) => {
    const { bbox_2d: given, label } = parsed(found);
    const several = Array.isArray(given?.[0]) ? given : [given];
    return several.map(orderly).filter(Boolean).map((box) => ({ box, label: label ? String(label) : "" }));
  });
}

/** The box within the picture and with its corners in order; null when it is none, or empty. */
export function orderly(given) {
  if (!Array.isArray(given) || given.length !== 4 || !given.every(Number.isFinite)) return null;
  const [x1, y1, x2, y2] = given.map((v) => Math.min(1000, Math.max(0, v)));
  const box = [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
  return box[2] > box[0] && box[3] > box[1] ? box : null;
}

/** A box of a part of a picture, as a box of the whole picture. */
export function within([x1, y1, x2, y2], box) {
  return box.map((v, i) => (i % 2 === 0 ? x1 + (v * (x2 - x1)) / 1000 : y1 + (v * (y2 - y1)) / 1000));
}

/** A picture with frames drawn over it, which grow and shrink with it. */
export function framed(picture, boxes) {
  const image = el("img", { src: picture.url, alt: picture.name });
  return el("div", { className: "framed" }, image, ...boxes.map(frame));
}

function frame({ box: [x1, y1, x2, y2], label }, i) {
  const name = label && el("span", { className: y1 < 90 ? "label inside" : "label" }, label);
  const what = { className: `frame hue-${i % NUM_COLOURS}`, role: "img", "aria-label": `box ${label}`.trim() };
  const sides = { left: x1 / 10, top: y1 / 10, width: (x2 - x1) / 10, height: (y2 - y1) / 10 };
  return place(el("div", what, name), sides);
}

/** A canvas with the part of the picture that a box means; empty until the picture is decoded. */
export function crop(picture, [x1, y1, x2, y2]) {
  const canvas = el("canvas", { className: "crop", role: "img", "aria-label": "enlarged part", width: 1, height: 1 });
  const image = el("img", { src: picture.url });
  const draw = () => {
    const [x, y] = [(x1 / 1000) * image.naturalWidth, (y1 / 1000) * image.naturalHeight];
    const width = Math.max(1, ((x2 - x1) / 1000) * image.naturalWidth);
    const height = Math.max(1, ((y2 - y1) / 1000) * image.naturalHeight);
    const scale = CROP_SIDE / Math.max(width, height);
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, canvas.width, canvas.height);
    canvas.dataset.source = [x, y, width, height].map(Math.round).join(" ");
  };
  image.decode().then(draw, () => canvas.remove());
  return canvas;
}

function parsed(json) {
  try {
    return JSON.parse(json);
  } catch {
    return {};
  }
}
