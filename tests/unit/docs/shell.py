"""Shell text as the commands that it would run. Knows quotes, comments, `\\`, `&&`, pipes, redirections and `$(...)`.

Of a `console` block the lines after `$ ` are commands, the others are what they print.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.unit.docs.pages import Block, blocks

SUBSTITUTED = "substituted"
"""What stands for the output of `$(...)`."""

_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_ENDS = {"&&", "||", "|", ";", "&"}
_REDIRECTIONS = {">", ">>", "<", ">&"}


@dataclass(frozen=True)
class Command:
    """One program and its arguments."""

    where: str
    words: tuple[str, ...]
    environment: tuple[str, ...] = ()
    """Assignments before the program."""

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def arguments(self) -> list[str]:
        return list(self.words[1:])

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def commands_of(block: Block) -> list[Command]:
    """Everything that a block runs."""
    text = block.text
    if block.language == "console":
        text = "".join(f"{line[2:]}\n" for line in text.splitlines() if line.startswith("$ "))
    return [command for line in whole_lines(text) for command in commands(line, str(block))]


def whole_lines(text: str) -> Iterator[str]:
    """Lines, joined where a quote stays open or the last character says so."""
    held = ""
    for line in text.splitlines():
        if line.endswith("\\"):
            held += line[:-1] + " "
            continue
        held += line
        try:
            is_empty = not shlex.split(held, comments=True)
        except ValueError:  # a quote is open
            held += "\n"
            continue
        if not is_empty:
            yield held
        held = ""
    assert not held.strip(), f"a quote stays open in {held!r}"


def commands(line: str, where: str) -> Iterator[Command]:
    """The commands of one whole line, those within `$(...)` included."""
    for inner in _SUBSTITUTION.findall(line):
        yield from commands(inner, where)
    lexer = shlex.shlex(_SUBSTITUTION.sub(SUBSTITUTED, line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    is_target = False
    for token in [*lexer, ";"]:
        if token in _ENDS:
            if words:
                yield _command(words, where)
            words = []
        elif token in _REDIRECTIONS:
            if words and words[-1].isdigit():
                words.pop()
            is_target = True
        elif is_target:
            is_target = False
        else:
            words.append(token)


def _command(words: list[str], where: str) -> Command:
    count = next((i for i, word in enumerate(words) if not _ASSIGNMENT.fullmatch(word)), len(words))
    assert count < len(words), f"{where}: {words} runs nothing; write `export NAME=value`"
    return Command(where, tuple(words[count:]), tuple(words[:count]))


def all_commands() -> list[Command]:
    """Of all documents."""
    return [command for block in blocks("sh", "console") for command in commands_of(block)]
