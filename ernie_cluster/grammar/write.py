"""Grammars as text: what an answer must look like, in the Lark dialect of llguidance.

A *body* is the right-hand side of a rule. `grammar` puts what may come before it in front. All text is written here;
whether it is any good is for `check` to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_WHITESPACE = r" ?|\n[ \t]{0,24}"
"""Between the marks of JSON: none, a space, or a new line and what it is indented by. A model in doubt takes all it may."""


def json_body(schema: Mapping[str, Any]) -> str:
    """JSON that fits a schema."""
    options = {"x-guidance": {"whitespace_pattern": _WHITESPACE}}
    return "%json " + json.dumps({**schema, **options}, ensure_ascii=False)


def regex_body(regex: str) -> str:
    """Text that a regular expression matches from its first to its last letter."""
    out, letters = "", iter(regex)
    for letter in letters:
        if letter == "\\":
            letter += next(letters, "")
        out += {"/": r"\/", "\n": r"\n", "\\\n": r"\n", "\r": r"\r"}.get(letter, letter)
    return f"/{out}/"


def choice_body(choices: Sequence[str]) -> str:
    """One of these."""
    return " | ".join(map(_literal, choices))


def calls_body(tools: Mapping[str, Mapping[str, Any]], *, at_most_one: bool) -> str:
    """Calls of tools, as the chat template writes them, with its new lines around them or without; at least one.

    Args:
        tools: name -> schema of the arguments, which are an object.
        at_most_one: exactly one call.
    """
    calls = " | ".join(
        " ".join(
            (
                _literal(f'<tool_call>\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '),
                json_body(schema),
                _literal("}\n</tool_call>"),
            )
        )
        for name, schema in tools.items()
    )
    line = _literal("\n")
    more = "" if at_most_one else f"({line} ({calls}))*"
    return f"({line} {line}?)? ({calls}) {more} {line}?"


def grammar(*bodies: str, after_thinking: bool = False) -> str:
    """A whole grammar.

    Args:
        bodies: the answer is one of these.
        after_thinking: the answer begins inside the model's reasoning, which is free up to its `</think>`.
    """
    start = " | ".join(f"({body})" for body in bodies)
    if not after_thinking:
        return f"start: {start}\n"
    return f"start: thinking /\\n{{0,4}}/ ({start})\nthinking[lazy]: /(.|\\n)*<\\/think>/\n"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
