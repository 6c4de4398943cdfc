"""Walks through the demo's questions with the official client, and shows what comes as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ernie_cluster.cli.demo_pictures import Step, framed
from ernie_cluster.cli.remote import printable
from ernie_cluster.skills.judge import iou, judge, read_box
from ernie_cluster.skills.sample import Sample, ToolCall
from ernie_cluster.skills.tools import next_turn, read_calls

if TYPE_CHECKING:
    import openai

MAX_TOKENS = 96
"""Of each answer: more than any right one takes."""

_LABEL_WIDTH, _BAR_WIDTH = 8, 36
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class Screen:
    """Text under labels: what comes under the same label flows on, another one begins a line."""

    out: TextIO
    _label: str | None = None

    def say(self, label: str, text: str, *, is_dim: bool = False) -> None:
        """Show a piece of text at once."""
        if label != self._label:
            self.line(f"    {label:<{_LABEL_WIDTH}}", end="")
            self._label = label
        text = printable(text).replace("\n", "\n" + " " * (4 + _LABEL_WIDTH))
        self.out.write(f"{_DIM}{text}{_PLAIN}" if is_dim and self.out.isatty() else text)
        self.out.flush()

    def line(self, text: str = "", end: str = "\n") -> None:
        """Begin a line of its own."""
        self.out.write(("" if self._label is None else "\n") + text + end)
        self.out.flush()
        self._label = None


@dataclass(slots=True)
class Heard:
    """What one streamed answer came to."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    """Name and arguments of each."""
    first_s: float | None = None
    """From asking to the first token."""
    last_s: float = 0.0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    timeline: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls with parsed arguments."""
        return read_calls([(name, arguments) for name, arguments in self.calls])

    @property
    def pace(self) -> str:
        """Time to first token, and tokens per second after it."""
        if self.first_s is None:
            return "no tokens"
        text = f"{self.num_prompt_tokens} prompt tokens, first token after {self.first_s * 1e3:.0f} ms"
        if self.num_tokens < 2 or self.last_s <= self.first_s:
            return text
        return f"{text}, then {(self.num_tokens - 1) / (self.last_s - self.first_s):.0f} tokens/s"


@dataclass
class Walk:
    """Asks one model, step by step.

    Args:
        client: connected to the server.
        model: served name.
        folder: where the pictures go.
        out: the terminal.
        clock: seconds from any start.
    """

    client: openai.OpenAI
    model: str
    folder: Path
    out: TextIO
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._screen = Screen(self.out)

    def take(self, number: int, step: Step) -> Heard:
        """Show one question, its answer, and whether it is right; returns the first answer."""
        screen = self._screen
        step.picture.image.save(self.folder / f"{step.file_stem}.png")
        screen.line(f"\n  {number}. {step.title}\n")
        screen.say("shown", f"{step.file_stem}.png")
        screen.say("asked", step.sample.messages[-1]["content"][-1]["text"])
        first = heard = self._hear(step.sample)
        sample = self._run_tool(step, first)
        if sample is not step.sample:
            heard = self._hear(sample)
        self._draw_box(step, heard.text)
        wanted = f"a usable call of {sample.tool_call.name}" if sample.tool_call else sample.answer
        is_right = judge(sample, heard.text, heard.tool_calls)
        screen.say("", "✓ right" if is_right else f"✗ expected {wanted}")
        screen.say("", f"   {heard.pace}", is_dim=True)
        screen.line(end="")
        return first

    def _hear(self, sample: Sample) -> Heard:
        heard, start = Heard(), self.clock()
        for label, text in self._stream(sample, heard):
            heard.last_s = self.clock() - start
            if heard.first_s is None:
                heard.first_s = heard.last_s
            self._screen.say(label, text, is_dim=label == "thinks")
        return heard

    def _stream(self, sample: Sample, heard: Heard) -> Iterator[tuple[str, str]]:
        """Label and text of what comes, as it comes; `heard` holds all of it."""
        tools: dict[str, Any] = {"tools": list(sample.tools)} if sample.tools else {}
        stream: Any = self.client.chat.completions.create(  # type: ignore[call-overload]
            model=self.model,
            messages=sample.wire_messages(),
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"include_timeline": True, "enable_thinking": sample.enable_thinking},
            **tools,
        )
        for chunk in stream:
            if chunk.usage is not None:
                heard.num_tokens, heard.num_prompt_tokens = chunk.usage.completion_tokens, chunk.usage.prompt_tokens
            heard.timeline = getattr(chunk, "timeline", None) or heard.timeline
            for choice in chunk.choices:
                yield from _pieces(choice.delta, heard)

    def _run_tool(self, step: Step, heard: Heard) -> Sample:
        """The conversation after the tool that was called, or as it was where none was or it cannot be run."""
        following = next_turn(step.sample, heard.tool_calls, reasoning=heard.reasoning) if step.sample.tools else None
        if following is None:
            return step.sample
        name = f"{step.file_stem}-crop.png"
        following.pictures[-1].image.save(self.folder / name)
        self._screen.say("gets", f"{name}, the region that it asked for")
        return following

    def _draw_box(self, step: Step, text: str) -> None:
        box, target = read_box(text), step.sample.target
        if step.sample.skill != "ground" or box is None or target is None:
            return
        name = f"{step.file_stem}-box.png"
        framed(step.picture, box).save(self.folder / name)
        self._screen.say("drawn", f"{name}; overlap with the true box {iou(box, target):.0%}")


def _pieces(delta: Any, heard: Heard) -> Iterator[tuple[str, str]]:
    if reasoning := getattr(delta, "reasoning_content", None):
        heard.reasoning += reasoning
        yield "thinks", reasoning
    if delta.content:
        heard.text += delta.content
        yield "says", delta.content
    for call in delta.tool_calls or ():
        if call.index == len(heard.calls):
            heard.calls.append(["", ""])
        name, arguments = call.function.name or "", call.function.arguments or ""
        heard.calls[call.index][0] += name
        heard.calls[call.index][1] += arguments
        yield "calls", f"{name} {arguments}" if name else arguments


def timeline_lines(timeline: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """The stages of a journey as a table with bars on one time axis.

    Args:
        timeline: as the API gives it.
        width: most columns of a line; what is longer ends in "…".
    """
    if not timeline:
        return []
    start = min(s["start_s"] for s in timeline)
    total = max(s["start_s"] + s["duration_s"] for s in timeline) - start or 1e-9
    lines = [f"    {'stage':<11}{'start':>9}{'took':>10}"]
    for span in timeline:
        left = int((span["start_s"] - start) / total * _BAR_WIDTH)
        bar = (" " * left + "#" * max(1, round(span["duration_s"] / total * _BAR_WIDTH)))[:_BAR_WIDTH]
        detail = [
            f"{v:,} {k}" if isinstance(v, int) else str(v)
            for k, v in span.items()
            if k not in ("name", "start_s", "duration_s")
        ]
        when, took = (span["start_s"] - start) * 1e3, span["duration_s"] * 1e3
        lines.append(f"    {span['name']:<11}{when:>6.1f} ms{took:>7.1f} ms  {bar:<{_BAR_WIDTH}}  {', '.join(detail)}")
    return [line.rstrip() if len(line) <= width else line[: width - 1] + "…" for line in lines]
