/** Three questions to begin with, about pictures that are drawn here. */

import { el } from "./dom.js";

const INK = {
  red: "#d93a34",
  yellow: "#efb70f",
  blue: "#2f62d6",
  green: "#2b9a53",
  orange: "#ea7d18",
  purple: "#7c3fc4",
};

const EXAMPLES = [
  {
    title: "Look",
    question: "What is in this picture?",
    file: "shapes.png",
    size: [432, 288],
    paint: (pen) => {
      paper(pen, "#e2eef8");
      circle(pen, INK.red, 84, 144, 60);
      star(pen, INK.yellow, 222, 94, 68);
      square(pen, INK.blue, 290, 150, 112);
    },
  },
  {
    title: "Find",
    question: "Find the purple star.",
    file: "find.png",
    size: [432, 288],
    paint: (pen) => {
      paper(pen, "#faf7ee");
      circle(pen, INK.green, 66, 84, 50);
      square(pen, INK.orange, 152, 22, 92);
      star(pen, INK.purple, 352, 98, 66);
      square(pen, INK.green, 52, 170, 96);
      circle(pen, INK.red, 264, 214, 54);
    },
  },
  {
    title: "Look closer",
    question: "What number is on the sign?",
    file: "sign.png",
    size: [960, 640],
    thinking: true,
    zoom: true,
    paint: (pen) => {
      paper(pen, "#e2eef8");
      circle(pen, INK.orange, 180, 180, 104);
      circle(pen, INK.green, 728, 452, 132);
      square(pen, INK.red, 124, 372, 184);
      sign(pen, "4271", 604, 146, 92, 40);
    },
  },
];

/** Cards that call `choose({question, file, thinking, zoom})`. */
export function cards(choose) {
  return EXAMPLES.map((example) => {
    const canvas = painted(example);
    const take = async () => {
      const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
      const { question, thinking = false, zoom = false } = example;
      choose({ question, thinking, zoom, file: new File([blob], example.file, { type: "image/png" }) });
    };
    const words = el("span", { className: "words" }, el("strong", {}, example.title), el("span", {}, example.question));
    return el("li", {}, el("button", { type: "button", className: "example", onclick: take }, canvas, words));
  });
}

function painted({ size: [width, height], paint }) {
  const canvas = el("canvas", { width, height, "aria-hidden": "true" });
  paint(canvas.getContext("2d"));
  return canvas;
}

function paper(pen, colour) {
  pen.fillStyle = colour;
  pen.fillRect(0, 0, pen.canvas.width, pen.canvas.height);
}

function circle(pen, colour, x, y, radius) {
  pen.fillStyle = colour;
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}

function square(pen, colour, x, y, side) {
  pen.fillStyle = colour;
  pen.fillRect(x, y, side, side);
}

function star(pen, colour, x, y, radius) {
  pen.fillStyle = colour;
  pen.beginPath();
  for (let i = 0; i < 10; i += 1) {
    const [r, angle] = [i % 2 ? radius * 0.42 : radius, (Math.PI * i) / 5 - Math.PI / 2];
    pen.lineTo(x + r * Math.cos(angle), y + r * Math.sin(angle));
  }
  pen.fill();
}

function sign(pen, text, x, y, width, height) {
  pen.fillStyle = "#fff";
  pen.fillRect(x, y, width, height);
  pen.strokeStyle = "#111";
  pen.lineWidth = 2;
  pen.strokeRect(x, y, width, height);
  pen.fillStyle = "#111";
  pen.font = `600 ${height * 0.6}px sans-serif`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.fillText(text, x + width / 2, y + height / 2 + 1);
}
