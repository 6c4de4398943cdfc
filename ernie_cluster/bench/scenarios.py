"""What users of several kinds ask, as data, and the requests that come of it.

A request is a function of scenario, seed and number: whoever asks number 7 of seed 3 asks the same. Prompts begin with
words of their own, so that no prefix cache helps, unless the scenario is about prefixes that are shared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ernie_cluster.bench.media import film, paint
from ernie_cluster.errors import ConfigError

Range = tuple[int, int]
"""Least and most, both included, evenly drawn."""

NONE: Range = (0, 0)
WORDS = (
    "the", "red", "blue", "green", "big", "small", "left", "right", "circle", "square", "star", "line", "picture", "and",
    "of", "to", "in", "is", "it", "on", "we", "you", "what", "how", "why", "who", "old", "new", "good", "time", "day",
    "year", "way", "man", "world", "life", "hand", "part", "place", "case", "week", "point", "number", "group", "name",
)  # fmt: skip
"""Frequent English words: about a token each for most tokenizers."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the files of the project.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of user."""

    name: str
    summary: str
    words: Range
    """Of the question, each about a token."""
    output_tokens: Range
    pictures: Range = NONE
    side: int = 448
    """Of pictures and frames, in pixels: 256 tokens for a picture, half as many for a frame of a video."""
    frames: Range = NONE
    """Of one video; none without."""
    thinks: bool = False
    shared_words: int = 0
    """Of a beginning that requests of one group have in common, tools aside."""
    num_groups: int = 1
    turns: Range = NONE
    """Earlier exchanges of the conversation, which each next request of a group repeats."""

    def shrunk(self, divisor: float) -> Scenario:
        """The same with texts of so many times fewer words and tokens, for small models."""

        def less(pair: Range) -> Range:
            return max(1, round(pair[0] / divisor)), max(1, round(pair[1] / divisor))

        return replace(
            self,
            words=less(self.words),
            output_tokens=less(self.output_tokens),
            shared_words=math.ceil(self.shared_words / divisor),
        )

    @property
    def most_tokens(self) -> int:
        """About the longest prompt and answer together that it can draw."""
        words, output = self.words[1], self.output_tokens[1]
        tokens_per_picture = (self.side // 28) ** 2
        seen = self.pictures[1] * tokens_per_picture + self.frames[1] * tokens_per_picture // 2
        return words + output + seen + self.shared_words + self.turns[1] * (words + output)

    def body(self, model: str, seed: int, number: int, *, is_plain: bool = False) -> dict[str, Any]:
        """Request `number` of `seed`: the body of a streamed chat completion.

        Args:
            is_plain: without fields that OpenAI does not know; answers then end where the model ends them.
        """
        chance = random.Random(f"{self.name}:{seed}:{number}")
        body: dict[str, Any] = {
            "model": model,
            "messages": self._messages(chance, seed, number),
            "max_tokens": chance.randint(*self.output_tokens),
            "temperature": 0.7,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.shared_words:
            body["tools"] = [_TOOL]
        if not is_plain:
            body |= {"ignore_eos": True, "chat_template_kwargs": {"enable_thinking": self.thinks}}
        return body

    def _messages(self, chance: random.Random, seed: int, number: int) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.shared_words:
            group = random.Random(f"{self.name}:{seed}:group {number % self.num_groups}")
            messages.append({"role": "system", "content": _text(group, self.shared_words)})
            # the same chance for the whole group: turn n is in every conversation that has got so far
            for _ in range(chance.randint(*self.turns)):
                messages.append({"role": "user", "content": _text(group, group.randint(*self.words))})
                messages.append({"role": "assistant", "content": _text(group, group.randint(*self.output_tokens))})
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": paint(chance, self.side)}}
            for _ in range(chance.randint(*self.pictures))
        ]
        if self.frames != NONE:
            url = film(chance, self.side, chance.randint(*self.frames))
            parts.append({"type": "video_url", "video_url": {"url": url}})
        text = _text(chance, chance.randint(*self.words))
        content = [*parts, {"type": "text", "text": text}] if parts else text
        return [*messages, {"role": "user", "content": content}]


def _text(chance: random.Random, num_words: int) -> str:
    return " ".join(chance.choices(WORDS, k=num_words))


class Source(Protocol):
    """Whose requests they are."""

    @property
    def name(self) -> str: ...

    @property
    def most_tokens(self) -> int:
        """See `Scenario`."""
        ...

    def choose(self, seed: int, number: int) -> Scenario:
        """Whose request number `number` is."""
        ...

    def shrunk(self, divisor: float) -> Source:
        """See `Scenario`."""
        ...


@dataclass(frozen=True, slots=True)
class Mix:
    """A source of scenarios by weight."""

    name: str
    summary: str
    parts: tuple[tuple[int, Scenario], ...]

    @property
    def most_tokens(self) -> int:
        return max(scenario.most_tokens for _, scenario in self.parts)

    def choose(self, seed: int, number: int) -> Scenario:
        weights = [weight for weight, _ in self.parts]
        chance = random.Random(f"{self.name}:{seed}:{number}")
        return chance.choices([scenario for _, scenario in self.parts], weights)[0]

    def shrunk(self, divisor: float) -> Mix:
        return replace(self, parts=tuple((weight, scenario.shrunk(divisor)) for weight, scenario in self.parts))


CHAT = Scenario("chat", "short questions, answers of some sentences", (30, 300), (64, 192))
LONG = Scenario("long", "documents: long prompts, short answers", (3000, 7000), (32, 128))
PICTURES = Scenario("pictures", "a question about one to three pictures", (20, 60), (48, 128), pictures=(1, 3))
VIDEO = Scenario("video", "a question about a short video", (20, 60), (48, 128), side=224, frames=(8, 16))
THINKING = Scenario("thinking", "long thoughts before the answer", (50, 300), (512, 1536), thinks=True)
AGENTS = Scenario(
    "agents",
    "eight agents: tools, a long beginning in common, a conversation that grows",
    (20, 120),
    (32, 128),
    shared_words=1500,
    num_groups=8,
    turns=(0, 6),
)
_SINGLE = (CHAT, LONG, PICTURES, VIDEO, THINKING, AGENTS)
MIXED = Mix(
    "mixed",
    "all of these: half chat, some of everything else",
    ((50, CHAT), (5, LONG), (20, PICTURES), (3, VIDEO), (7, THINKING), (15, AGENTS)),
)
SCENARIOS: Mapping[str, Mix] = {s.name: Mix(s.name, s.summary, ((1, s),)) for s in _SINGLE} | {MIXED.name: MIXED}


def find(name: str) -> Mix:
    """Raises ConfigError with all names."""
    if name not in SCENARIOS:
        raise ConfigError(f"scenario {name!r} is none of {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
