"""The inside of one tool call, `{"name": ..., "arguments": {...}}`, as JSON text that may arrive in pieces.

Arguments are passed on as the model wrote them, so that they need not be complete to be passed on. Knows no answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

CALL_START = "<tool_call>"
CALL_END = "</tool_call>"

HEADER = re.compile(
    CALL_START + r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\<\x00-\x1f]+)"\s*,\s*"arguments"\s*:\s*(?P<arguments>\{)'
)
"""A call up to the first letter of its arguments, in the order that the prompt shows to the model. It holds no `<` of
its own, so it is complete before a `CALL_END` can be."""

CLOSING = re.compile(r"\s*\}?\s*")
"""What stands between the arguments and `CALL_END`."""

_OUTSIDE = re.compile(r'["{}\[\]]|' + CALL_END)
_INSIDE = re.compile(r'\\.|"|\n' + CALL_END, re.DOTALL)


def may_be_call(text: str) -> bool:
    """Whether a call can still come of an answer's text that begins with `CALL_START`."""
    return text[len(CALL_START) :].lstrip()[:1] in ("", "{")


def read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments (an object, as JSON text) of a whole call without its tags; None when it is not one.

    Here keys may stand in any order and arguments may be absent, or JSON text within JSON.
    """
    try:
        call = json.loads(text)
        arguments = call.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if isinstance(arguments, dict) and isinstance(call["name"], str) and call["name"]:
            return call["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, LookupError, AttributeError, RecursionError):
        pass
    return None


class ArgumentsScanner:
    """Finds the end of a call's arguments, counting brackets.

    A `CALL_END` ends them as well where it cannot be theirs: outside of strings, and in a string after a line break,
    which JSON strings do not hold. A call with a quote or bracket too few thus does not swallow the rest.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False

    def scan(self, text: str) -> tuple[int, bool]:
        """Scan the text that follows what earlier calls accepted.

        Returns:
            How many of its characters are the arguments' for certain, and whether the arguments end with them. The
            characters after these are to be given again, with more behind them.
        """
        done = 0
        while match := (_INSIDE if self._in_string else _OUTSIDE).search(text, done):
            mark = match.group()
            if mark.endswith(CALL_END):
                return match.start(), True
            done = match.end()
            if mark == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if mark in "{[" else -1
                if self._depth == 0:
                    return done, True
        marks = ("\n" + CALL_END, "\\?") if self._in_string else (CALL_END,)
        return len(text) - num_begun(text[done:], marks), False


def num_begun(text: str, marks: Iterable[str]) -> int:
    """Characters at the end of `text` that may be the beginning of one of `marks`: "a</th" has 4 of "</think>"."""
    return max(
        (n for mark in marks if mark[0] in text[-len(mark) :] for n in range(len(mark)) if text.endswith(mark[:n])),
        default=0,
    )
