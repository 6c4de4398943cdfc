"""Asks a server held-out questions and judges what it says. Knows the wire and the skills, no table and no terminal."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from ernie_cluster.cli.eval_report import Key, Result
from ernie_cluster.cli.remote import refusal
from ernie_cluster.errors import DeadlineExceeded, ErnieClusterError
from ernie_cluster.skills.catalog import CHINESE_SKILLS, HELD_OUT, draw
from ernie_cluster.skills.judge import iou, judge, read_box
from ernie_cluster.skills.sample import Clip, Language, Picture, Sample, ToolCall
from ernie_cluster.skills.tools import next_turn, read_calls

SEED_STEP = 1_000_000
"""Distance of the questions of two `--seed`s; more than anyone asks of one skill."""


def plan(skills: Sequence[str], num_samples: int, seed: int) -> list[tuple[str, Language, int]]:
    """Skill, language and seed of every question: in English, and in Chinese where the skill has it."""
    first = HELD_OUT + seed * SEED_STEP
    pairs: list[tuple[str, Language]] = []
    for skill in skills:
        pairs += [(skill, "en"), (skill, "zh")] if skill in CHINESE_SKILLS else [(skill, "en")]
    return [(skill, language, first + i) for skill, language in pairs for i in range(num_samples)]


@dataclass(frozen=True, slots=True)
class Reply:
    """One message of the assistant."""

    text: str
    reasoning: str
    calls: Sequence[ToolCall]

    @property
    def lines(self) -> list[str]:
        """Text, then calls."""
        return ([self.text] if self.text or not self.calls else []) + [call_line(call) for call in self.calls]


def call_line(call: ToolCall) -> str:
    """A call on one line: `calculator {"expression": "12*34"}`."""
    return f"{call.name} {json.dumps(dict(call.arguments), ensure_ascii=False)}"


@dataclass
class Examiner:
    """Asks one model of one server, greedily.

    Args:
        client: knows the server's address.
        model: served name.
        max_tokens: of each answer.
        timeout_s: most seconds for each answer; a question with a tool has two.
        clock: seconds from any start.
    """

    client: httpx.AsyncClient
    model: str
    max_tokens: int = 256
    timeout_s: float = 120.0
    clock: Callable[[], float] = field(default=time.monotonic)

    async def examine_all(self, questions: Iterable[Key], concurrency: int, tell: Callable[[Result], None]) -> None:
        """Ask all, `concurrency` at a time; `tell` gets each result as it comes, in whatever order."""
        waiting = iter(questions)

        async def work() -> None:
            for key in waiting:
                skill, language, seed = key
                tell(await self.examine(draw(skill, seed, "zh" if language == "zh" else "en"), key))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())

    async def examine(self, sample: Sample, key: Key) -> Result:
        """Ask one question; run the tool that the model calls, and ask on. Never raises for what the server does.

        Args:
            sample: the question.
            key: under which it counts; a question of the skill `tool` may need none, and be of another skill itself.
        """
        wanted = [call_line(sample.tool_call)] if sample.tool_call else []
        blank = Result(*key, question_of(sample), wanted="\n".join([*wanted, sample.answer]))
        start = self.clock()
        try:
            result = await self._converse(sample, blank)
        except (ErnieClusterError, httpx.HTTPError) as e:
            result = replace(blank, error=str(e) or type(e).__name__)
        return replace(result, latency_s=self.clock() - start)

    async def _converse(self, sample: Sample, blank: Result) -> Result:
        reply = await self.ask(sample)
        said, thoughts, num_formed = reply.lines, [reply.reasoning], 0
        is_right = judge(sample, reply.text, reply.calls)
        has_call = sample.tool_call is not None
        if has_call:
            following = next_turn(sample, reply.calls, reasoning=reply.reasoning)
            is_right = False
            if following is not None:
                reply = await self.ask(following)
                said, thoughts, num_formed = said + reply.lines, [*thoughts, reply.reasoning], 1
                is_right = judge(following, reply.text, reply.calls)
        return replace(
            blank,
            got="\n".join(said),
            thought="\n".join(filter(None, thoughts)),
            is_right=is_right,
            num_calls_due=int(has_call),
            num_calls_formed=num_formed,
            iou=_overlap(sample, reply) if sample.skill == "ground" else None,
        )

    async def ask(self, sample: Sample) -> Reply:
        """The next message of the assistant.

        Raises:
            ErnieClusterError: refused, not in OpenAI's shape, or not within `timeout_s`.
            httpx.HTTPError: the connection failed.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": sample.wire_messages(),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "chat_template_kwargs": {"enable_thinking": sample.enable_thinking},
        }
        if sample.tools:
            body["tools"] = list(sample.tools)
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await self.client.post("/v1/chat/completions", json=body)
        except (TimeoutError, httpx.TimeoutException):
            raise DeadlineExceeded(f"no answer within {self.timeout_s:g} s; see --timeout") from None
        if response.status_code != 200:
            raise ErnieClusterError(refusal(response))
        return _reply(response)


def _reply(response: httpx.Response) -> Reply:
    try:
        message = response.json()["choices"][0]["message"]
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        calls = read_calls([(f["name"], f["arguments"]) for f in functions])
        return Reply(str(message.get("content") or ""), str(message.get("reasoning_content") or ""), calls)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ErnieClusterError(f"not an answer in OpenAI's shape: {response.text[:200]!r}") from None


def _overlap(sample: Sample, reply: Reply) -> float:
    box = read_box(reply.text)
    return iou(box, sample.target) if box is not None and sample.target is not None else 0.0


def question_of(sample: Sample) -> str:
    """The words of the user's last message."""
    content = next(m["content"] for m in reversed(sample.messages) if m["role"] == "user")
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def save_failures(folder: Path, results: Iterable[Result]) -> int:
    """Write what went wrong: `failures.jsonl`, and beside it the pictures (PNG) and videos (GIF) that were shown.

    Returns:
        How many there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = [r for r in results if not r.is_right]
    with (folder / "failures.jsonl").open("w", encoding="utf-8") as file:
        for result in failed:
            sample = draw(result.skill, result.seed, "zh" if result.language == "zh" else "en")
            stem = f"{result.skill}-{result.language}-{result.seed - HELD_OUT}"
            names = [_save(folder, f"{stem}-{i}", shown) for i, shown in enumerate(_shown(sample), start=1)]
            keys = ("skill", "language", "seed", "question", "wanted", "got", "thought", "error")
            line = {key: getattr(result, key) for key in keys} | {"shown": names}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return len(failed)


def _shown(sample: Sample) -> list[Picture | Clip]:
    contents = [m.get("content") for m in sample.messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part[part["type"]] for part in parts if part["type"] in ("image", "video")]


def _save(folder: Path, stem: str, shown: Picture | Clip) -> str:
    if isinstance(shown, Picture):
        shown.image.save(folder / f"{stem}.png")
        return f"{stem}.png"
    first, *rest = shown.frames
    first.save(folder / f"{stem}.gif", save_all=True, append_images=rest, duration=round(1000 / shown.fps), loop=0)
    return f"{stem}.gif"
