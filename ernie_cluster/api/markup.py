"""Takes the text of a chat answer apart, while it arrives: reasoning, content, and calls of tools.

    reasoning </think> content <tool_call> {"name": ..., "arguments": {...}} </tool_call> ...

Pure, and indifferent to how the text is cut into pieces. Nothing the model wrote is lost but the marks themselves,
line breaks around them, and what else a call's object holds. What a model gets wrong is treated like this:

- A `<tool_call>` behind which no call can be read is text, and reading goes on right behind it: no object, broken JSON,
  no name, or an answer that is cut off before the arguments begin.
- Once arguments have begun, the client has the call. It gets the rest as the model writes it, even when that is no
  valid JSON or is cut off by the token limit; OpenAI, too, leaves it to the client to check the arguments.
- Without a `</think>` all is reasoning. A `</think>` that ends nothing is text.

Knows no tokens, no HTTP and no OpenAI object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ernie_cluster.api.stops import StopStringFilter
from ernie_cluster.api.tool_calls import (
    CALL_END,
    CALL_START,
    CLOSING,
    HEADER,
    ArgumentsScanner,
    may_be_call,
    num_begun,
    read_call,
)

THINK_START, THINK_END = "<think>", "</think>"
RESPONSE_START, RESPONSE_END = "<response>", "</response>"


@dataclass(frozen=True, slots=True)
class Markup:
    """Which markup of an answer is read; by default none."""

    reasoning: Literal["none", "maybe", "open"] = "none"
    """maybe: the answer may begin with `<think>`. open: the prompt ended with it."""
    has_tools: bool = False
    """Tools were offered, so `<tool_call>` means something."""
    is_one_call: bool = False
    """The answer ends with its first call."""


@dataclass(slots=True)
class CallPiece:
    """The next piece of a call."""

    index: int
    """Of the call in its answer."""
    name: str | None
    """Of the function; with the call's first piece only."""
    arguments: str
    """JSON text. All pieces together are an object, if the model wrote one."""
    content_offset: int = 0
    """Characters of the answer's content that stand before the call; valid with the call's first piece."""


@dataclass(frozen=True, slots=True)
class OwnCall:
    """A call that the server itself has run, or why it has not."""

    index: int
    """Among the own calls of its answer, all rounds together."""
    call_id: str
    name: str
    arguments: str
    """As the model wrote them."""
    result: Mapping[str, Any]
    """JSON values: `text`, `error`, `images` and what else the tool tells."""


@dataclass(slots=True)
class Pieces:
    """What a stretch of an answer adds to each of its parts."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPiece] = field(default_factory=list)
    """By index; at most one piece of each call."""
    own_calls: list[OwnCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls or self.own_calls)

    def add(self, later: Pieces) -> None:
        """Append what came later, whose calls are taken over."""
        self.content += later.content
        self.reasoning += later.reasoning
        for call in later.calls:
            if self.calls and self.calls[-1].index == call.index:
                self.calls[-1].arguments += call.arguments
            else:
                self.calls.append(call)
        self.own_calls += later.own_calls


class AnswerParser:
    """Reads one answer.

    Args:
        markup: what is read.
        stops: ends the answer at a stop string in its content; reasoning and calls are not searched.
    """

    # A state is a method. It consumes what it understands of the buffer, and returns whether another state has to look
    # at the rest; `is_last` says that nothing will follow the buffer.

    def __init__(self, markup: Markup, stops: StopStringFilter) -> None:
        self._stops = stops
        self._is_one_call = markup.is_one_call
        self._marks: tuple[str, ...] = (CALL_START,) if markup.has_tools else ()
        """That end a stretch of content."""
        self._state = {"none": self._content, "maybe": self._begin, "open": self._reasoning}[markup.reasoning]
        self._scanner = ArgumentsScanner()
        self._buffer = ""
        self._num_unsearched = 0
        """Characters of the buffer that are not searched for stop strings."""
        self._out = Pieces()
        self._is_after_mark = markup.reasoning == "open"
        """Line breaks that come next belong to a mark."""
        self._content_breaks = _LineBreaks()
        self._reasoning_breaks = _LineBreaks()
        self._num_calls = 0
        self._num_content = 0
        """Characters of content that have been given out."""
        self._was_wrapped = False
        self._is_call_over = False
        self.num_read = 0
        """Characters of the answer's text that have found their place."""
        self.passed: list[tuple[int, int]] = []
        """[start, end) of the text that is content, in ascending order; the end of it may be held back, or dropped."""

    @property
    def is_reasoning(self) -> bool:
        """The reasoning has begun and is not over."""
        return self._state == self._reasoning

    @property
    def is_stopped(self) -> bool:
        """A stop string was found, or the only call is complete; from then on nothing passes."""
        return self._stops.matched is not None or (self._is_one_call and self._is_call_over)

    @property
    def stop_string(self) -> str | None:
        """The one that ended the answer."""
        return self._stops.matched

    @property
    def has_calls(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str, *, is_searched: bool = True) -> Pieces:
        """Take the next text; returns what is certain by now. Unsearched text comes first, if there is any."""
        if not is_searched:
            self._num_unsearched += len(text)
        return self._run(text, is_last=False)

    def flush(self) -> Pieces:
        """The rest, at the end of the answer."""
        out = self._run("", is_last=True)
        out.content += self._content_breaks.push(self._stops.flush())
        if not self.has_calls and not self._was_wrapped:
            out.content += self._content_breaks.held
        return out

    def _run(self, text: str, *, is_last: bool) -> Pieces:
        self._buffer += text
        while not self.is_stopped and self._state(is_last):
            pass
        out, self._out = self._out, Pieces()
        self._num_content += len(out.content)
        return out

    # States

    def _begin(self, is_last: bool) -> bool:
        if self._opens_with(THINK_START):
            self._state = self._reasoning
            return True
        if self._may_open_with(THINK_START) and not is_last:
            return False
        self._state = self._content
        return True

    def _reasoning(self, is_last: bool) -> bool:
        self._skip_line_breaks()
        at = self._buffer.find(THINK_END)
        if at < 0:
            num_kept = 0 if is_last else num_begun(self._buffer, (THINK_END,))
            self._out.reasoning += self._reasoning_breaks.push(self._take(len(self._buffer) - num_kept))
            return False
        self._out.reasoning += self._reasoning_breaks.push(self._take(at))
        self._take_mark(len(THINK_END))
        self._state = self._after_reasoning
        return True

    def _after_reasoning(self, is_last: bool) -> bool:
        if self._opens_with(RESPONSE_START):
            self._marks += (RESPONSE_END,)
        elif self._may_open_with(RESPONSE_START) and not is_last:
            return False
        self._state = self._content
        return True

    def _content(self, is_last: bool) -> bool:
        self._skip_line_breaks()
        found = self._first(*self._marks)
        if found is None:
            num_kept = 0 if is_last else num_begun(self._buffer, self._marks)
            self._pass(len(self._buffer) - num_kept)
            return False
        at, mark = found
        self._pass(at)
        if mark == CALL_START:
            self._state = self._call
        else:
            self._take_mark(len(mark))
            self._marks = tuple(m for m in self._marks if m != mark)
            self._was_wrapped = True
        return True

    def _call(self, is_last: bool) -> bool:
        """The buffer begins with `<tool_call>`."""
        if header := HEADER.match(self._buffer):
            self._take(header.start("arguments"))
            self._give_call(header["name"])
            self._scanner = ArgumentsScanner()
            self._state = self._arguments
            return True
        end = self._buffer.find(CALL_END)
        if end < 0 and may_be_call(self._buffer) and not is_last:
            return False
        call = read_call(self._buffer[len(CALL_START) : end if end >= 0 else None])
        if call is None:
            self._pass(len(CALL_START))
        else:
            self._give_call(*call)
            self._take_mark(end + len(CALL_END) if end >= 0 else len(self._buffer))
            self._is_call_over = True
        self._state = self._content
        return True

    def _arguments(self, is_last: bool) -> bool:
        num_chars, is_over = self._scanner.scan(self._buffer)
        text = self._take(num_chars if is_over or not is_last else len(self._buffer))
        if text:
            self._out.add(Pieces(calls=[CallPiece(self._num_calls - 1, None, text)]))
        if is_over:
            self._is_call_over = True
            self._state = self._after_arguments
        return is_over

    def _after_arguments(self, is_last: bool) -> bool:
        """Whatever follows the arguments is dropped up to the call's end; the next call ends one without an end."""
        if found := self._first(CALL_START, CALL_END):
            at, mark = found
            self._take_mark(at if mark == CALL_START else at + len(mark))
        elif is_last:
            closing = CLOSING.match(self._buffer)
            assert closing
            self._take(closing.end())
        else:
            return False
        self._state = self._content
        return True

    # What states do to buffer and output

    def _first(self, *marks: str) -> tuple[int, str] | None:
        """Where the first of these stands in the buffer."""
        return min(((at, mark) for mark in marks if (at := self._buffer.find(mark)) >= 0), default=None)

    def _opens_with(self, mark: str) -> bool:
        """Consume line breaks and `mark`, if they are next."""
        rest = self._buffer.lstrip("\n")
        if not rest.startswith(mark):
            return False
        self._take_mark(len(self._buffer) - len(rest) + len(mark))
        return True

    def _may_open_with(self, mark: str) -> bool:
        """The buffer is too short to say."""
        return mark.startswith(self._buffer.lstrip("\n"))

    def _skip_line_breaks(self) -> None:
        if self._is_after_mark:
            rest = self._buffer.lstrip("\n")
            self._take(len(self._buffer) - len(rest))
            self._is_after_mark = not rest

    def _take_mark(self, num_chars: int) -> None:
        """Consume what ends with a mark."""
        self._take(num_chars)
        self._is_after_mark = True

    def _take(self, num_chars: int) -> str:
        taken, self._buffer = self._buffer[:num_chars], self._buffer[num_chars:]
        self._num_unsearched = max(0, self._num_unsearched - num_chars)
        self.num_read += len(taken)
        return taken

    def _pass(self, num_chars: int) -> None:
        """Let text through as content, up to the first stop string."""
        num_free, start = self._num_unsearched, self.num_read
        text = self._take(num_chars)
        if self.passed and self.passed[-1][1] == start:
            start, _ = self.passed.pop()
        self.passed.append((start, self.num_read))
        self._out.content += self._content_breaks.push(text[:num_free] + self._stops.push(text[num_free:]))

    def _give_call(self, name: str, arguments: str = "") -> None:
        offset = self._num_content + len(self._out.content)
        self._out.calls.append(CallPiece(self._num_calls, name, arguments, offset))
        self._num_calls += 1


class _LineBreaks:
    """Holds line breaks back until other text follows them."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, text: str) -> str:
        text = self.held + text
        shown = text.rstrip("\n")
        self.held = text[len(shown) :]
        return shown
