"""What the load of an experiment asks: greedy, seeded and grammar-bound prompts, with pictures and without.

Each has one right answer, whichever replicas take part in it, so that a wrong one is seen.
"""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw

_WORDS = [
    "the",
    "red",
    "circle",
    "left",
    "of",
    "a",
    "blue",
    "square",
    "and",
    "what",
    "is",
    "above",
    "it",
    "how",
    "many",
    "lines",
    "end",
    "where",
    "they",
    "began",
]
_SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "labels": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 2, "maxItems": 6},
    },
    "required": ["colour", "count", "labels"],
    "additionalProperties": False,
}
_MIX = (
    ("greedy", 12, 0),
    ("seeded", 60, 2),
    ("schema", 12, 0),
    ("greedy", 60, 1),
    ("seeded", 240, 0),
    ("schema", 60, 1),
    ("greedy", 240, 1),
)
"""Way, words, pictures; 240 words are prefilled in several chunks by the smallest engines."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question with one right answer."""

    name: str
    """Says what is special about it."""
    body: dict[str, Any]
    """Of a streamed chat completion."""

    def salted(self, salt: str) -> Prompt:
        """The same question, which finds nothing in prefix caches: all of its KV is computed and moved."""
        return replace(self, body={**self.body, "cache_salt": salt})


def make_prompts(model: str, seed: int, *, has_eyes: bool, max_tokens: int) -> list[Prompt]:
    """The prompts of an experiment, the same for the same arguments.

    Args:
        model: served name.
        has_eyes: whether it takes pictures.
        max_tokens: of those answers that no grammar ends.
    """
    chance = random.Random(seed)
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0, "ignore_eos": True},
        "seeded": {"temperature": 0.8, "top_p": 0.9, "seed": seed + 17, "ignore_eos": True},
        "schema": {
            "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "seen", "schema": _SCHEMA}},
        },
    }
    prompts = []
    for way, num_words, num_pictures in _MIX:
        if num_pictures and not has_eyes:
            continue
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _picture(chance)}} for _ in range(num_pictures)
        ]
        content.append({"type": "text", "text": " ".join(chance.choices(_WORDS, k=num_words))})
        fixed = {"model": model, "stream": True, "max_tokens": max_tokens}
        name = f"{way}, {num_words} words, {num_pictures} pictures"
        prompts.append(Prompt(name, {**fixed, "messages": [{"role": "user", "content": content}], **ways[way]}))
    return prompts


def _picture(chance: random.Random) -> str:
    """Another one each time, as a data URL."""
    image = Image.new("RGB", (112, 84), (chance.randrange(256), chance.randrange(256), chance.randrange(256)))
    left, top = chance.randrange(60), chance.randrange(40)
    ImageDraw.Draw(image).ellipse((left, top, left + 40, top + 36), fill=(220, chance.randrange(256), 30))
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
