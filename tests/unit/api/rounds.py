"""A model of several rounds, for tests: what it says in each, and pictures that it can tell apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from ernie_cluster.request import GenerationRequest, MediaInput
from tests.fakes import FakeBackend, FakeProcessor, Script, say

ZOOM = {"type": "image_zoom_in_tool"}
CALCULATOR = {"type": "calculator"}
URL = "data:image/png;base64,AA=="
PICTURE = {"type": "image_url", "image_url": {"url": URL}}
ASKED = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What is on the sign?"}]}]
BOX = [100, 200, 300, 400]


def call(name: str, arguments: Any) -> str:
    """What a model writes to call a tool; `arguments` is JSON text, or a value."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>\n'


LOOK = call("image_zoom_in_tool", {"bbox_2d": BOX, "label": "sign"})
ADD = call("calculator", {"expression": "12*34"})


class Rounds(FakeBackend):
    """Plays a script in each round of an answer, the last one also in all after it."""

    def __init__(self, *rounds: str | Script, **more: Any) -> None:
        super().__init__(**more)
        self.rounds = [say(script, 5) if isinstance(script, str) else script for script in rounds]

    def _script_of(self, request: GenerationRequest) -> Script:
        _, _, number = request.request_id.rpartition("-")[0].partition(".")
        return self.rounds[min(int(number or 0), len(self.rounds) - 1)]


class Seeing(FakeProcessor):
    """Makes 4 x 6 patches of each picture; the hash tells which picture, and which region of it."""

    def __init__(self, max_model_len: int = 4096) -> None:
        super().__init__(max_model_len=max_model_len)

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> GenerationRequest:
        request = super().chat(messages, **options)
        contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
        shown = [part["image_url"] for content in contents for part in content if part["type"] == "image_url"]
        media = tuple(MediaInput("image", hash_of(**given), (1, 4, 6), 0, 6, None) for given in shown)
        return replace(request, media=media)


def hash_of(url: str, regions: Any = (), content: bytes | None = None, max_pixels: int | None = None) -> bytes:
    return hashlib.sha256(repr((url, regions, content, max_pixels)).encode()).digest()
