// Laws of the playground's pure functions, and that all its modules can be parsed. To be run beside copies of them, by
// `node --experimental-vm-modules`; prints the names of the modules.

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { SourceTextModule } from "node:vm";

import { eventData } from "./api.js";
import { findBoxes, orderly, within } from "./boxes.js";
import { bodyOf, galleryOf, messagesOf } from "./conversation.js";
import { counted, duration, grouped } from "./numbers.js";
import { blocks } from "./text.js";
import { decodeRate, laidOut } from "./timeline.js";
import { titleOf } from "./trouble.js";

async function read(bytes, size) {
  async function* chunks() {
    for (let i = 0; i < bytes.length; i += size) yield bytes.slice(i, i + size);
  }
  const found = [];
  for await (const data of eventData(chunks())) found.push(data);
  return found;
}

// events are the same however the stream is cut, also within a character
const stream = new TextEncoder().encode('event: x\ndata: {"a": "Grüß 🙂"}\n\n: comment\n\ndata: one\r\ndata:two\r\n\r\ndata: [DONE]\n\ndata: unfinished');
for (let size = 1; size <= stream.length; size += 1) {
  assert.deepEqual(await read(stream, size), ['{"a": "Grüß 🙂"}', "one\ntwo", "[DONE]"], `pieces of ${size}`);
}

// boxes are found wherever they stand, and are within the picture with their corners in order
const box = [1, 2, 3, 4];
assert.deepEqual(findBoxes('{"bbox_2d":[1,2,3,4],"label":"cat"}'), [{ box, label: "cat" }]);
assert.deepEqual(findBoxes('Two: [{"bbox_2d": [3, 4, 1, 2]}, {"label": 7, "bbox_2d": [1, 2, 3, 4]}].'), [{ box, label: "" }, { box, label: "7" }]);
assert.deepEqual(findBoxes('{"found": [{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "x"}]}').length, 2);
for (const none of ["", "bbox_2d", '{"bbox_2d"}', '{"bbox_2d": [1, 2, 3]}', '{"bbox_2d": "1,2,3,4"}', '{"bbox_2d": [1, 2, 1, 4]}', '{"bbox_2d": null}', '{"bbox_2d": [1, 2, 3, "4"]}']) {
  assert.deepEqual(findBoxes(none), [], none);
}
assert.deepEqual(orderly([-50, 900, 2000, 100]), [0, 100, 1000, 900]);
assert.equal(orderly([NaN, 0, 1, 1]), null);
assert.deepEqual(within([0, 0, 1000, 1000], box), box);
assert.deepEqual(within([200, 500, 400, 1000], [500, 0, 1000, 500]), [300, 500, 400, 750]);

// a conversation: what was not answered is not sent again; pictures go with their question
const picture = { kind: "image", dataUrl: "data:image/png;base64,AA==" };
const video = { kind: "video", dataUrl: "data:video/mp4;base64,AA==" };
const turns = [
  { text: "first", media: [picture], answer: "one" },
  { text: "refused", media: [{ ...picture }, { ...picture }], answer: null },
  { text: "", media: [video], answer: "" },
  { text: "last", media: [], answer: null },
];
const image = { type: "image_url", image_url: { url: picture.dataUrl } };
const wanted = [
  { role: "user", content: [image, { type: "text", text: "first" }] },
  { role: "assistant", content: "one" },
  { role: "user", content: [{ type: "video_url", video_url: { url: video.dataUrl } }] },
  { role: "assistant", content: "" },
  { role: "user", content: "last" },
];
assert.deepEqual(messagesOf(turns, ""), wanted);
assert.deepEqual(messagesOf(turns, "Be brief."), [{ role: "system", content: "Be brief." }, ...wanted]);
assert.deepEqual(galleryOf(turns), { pictures: [picture], main: 0 });
const later = [...turns.slice(0, 1), { text: "two", media: [video, picture, picture], answer: null }];
assert.deepEqual(galleryOf(later), { pictures: [picture, picture, picture], main: 1 });
assert.deepEqual(galleryOf([{ text: "hi", media: [], answer: null }]), { pictures: [], main: 0 });
const settings = { system: "", temperature: 0, maxTokens: 1000, thinking: true, zoom: false };
const last = turns.slice(3);
assert.deepEqual(bodyOf(settings, { id: "m", max_model_len: 512 }, last), {
  model: "m",
  messages: [{ role: "user", content: "last" }],
  temperature: 0,
  max_tokens: 256,
  chat_template_kwargs: { enable_thinking: true },
  tools: [],
});
assert.deepEqual(bodyOf({ ...settings, zoom: true }, { id: "m" }, last).tools, [{ type: "image_zoom_in_tool" }]);
assert.equal(bodyOf(settings, { id: "m" }, last).max_tokens, 1000);

// a timeline: bars lie within the axis, and it is used from end to end
const stages = [
  { name: "prefill", start_s: 102, duration_s: 1 },
  { name: "queue", start_s: 101, duration_s: 0.5 },
  { name: "decode", start_s: 103, duration_s: 2, tokens: 30 },
];
assert.deepEqual(laidOut(stages).map(({ left, width }) => [left, width]), [[25, 25], [0, 12.5], [50, 50]]);
assert.deepEqual(laidOut([{ start_s: 5, duration_s: 0 }]).map(({ left, width }) => [left, width]), [[0, 0]]);
assert.equal(decodeRate(stages), 15);
assert.equal(decodeRate([...stages, { name: "decode", start_s: 105, duration_s: 1, tokens: 30 }]), 20);
assert.equal(decodeRate(stages.slice(0, 2)), null);

// text
const kinds = (text) => blocks(text).map(({ kind, lines }) => [kind, lines.join("|")]);
assert.deepEqual(kinds("a\nb\n\n\nc"), [["paragraph", "a|b"], ["paragraph", "c"]]);
assert.deepEqual(kinds("## Title\ntext\n```js\nx = 1\n\n# no title\n```\nend"), [
  ["heading", "Title"], ["paragraph", "text"], ["code", "x = 1||# no title"], ["paragraph", "end"],
]);
assert.deepEqual(kinds("```\nopen"), [["code", "open"]]);
assert.deepEqual(kinds(" \n"), []);

// numbers
assert.deepEqual([0, 0.0004, 0.00994, 0.01, 0.25, 9.9, 9.9996, 61].map(duration), ["0.0 ms", "0.4 ms", "9.9 ms", "10 ms", "250 ms", "9900 ms", "10.0 s", "61.0 s"]);
assert.deepEqual([1234567, 0.12345, "x"].map(grouped), ["1,234,567", "0.123", "x"]);
assert.deepEqual([counted(1, "box", "boxes"), counted(2, "box", "boxes"), counted(0, "token")], ["1 box", "2 boxes", "0 tokens"]);

// every status has a title
for (const status of [0, 400, 401, 404, 408, 413, 415, 429, 431, 500, 502, 503, 504]) assert.match(titleOf(status), /^[A-Z]/);
assert.notEqual(titleOf(418), titleOf(502));

// modules that need a browser to run can be parsed
const folder = new URL(".", import.meta.url);
for (const name of readdirSync(folder).filter((file) => file.endsWith(".js")).sort()) {
  new SourceTextModule(readFileSync(new URL(name, folder), "utf8"), { identifier: name });
  console.log(name);
}
