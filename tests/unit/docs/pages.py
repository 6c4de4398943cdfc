"""The documents as data: their headings, links and fenced blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]

_FENCE = re.compile(r"(?P<indent> *)(?P<fence>```+)(?P<info>[^`]*)")
_HEADING = re.compile(r"#{1,6} +(?P<text>.+?) *#*")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]*)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    """Relative to the repository."""
    line: int
    """Of its opening fence, from 1."""
    info: tuple[str, ...]
    """What follows the fence: the language, then marks of ours."""
    text: str

    @property
    def language(self) -> str:
        return self.info[0] if self.info else ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Page:
    """One document."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self._parsed[1]

    @property
    def prose(self) -> list[tuple[int, str]]:
        """(line number, line) of all that stands in no fenced block."""
        return self._parsed[0]

    @property
    def links(self) -> Iterator[tuple[int, str]]:
        """(line number, target); what stands in `code` is none."""
        for number, line in self.prose:
            for found in _LINK.finditer(re.sub(r"`[^`]*`", "code", line)):
                yield number, found["target"]

    @property
    def anchors(self) -> set[str]:
        """What `#...` may say, as GitHub makes it of headings; one that comes again gets a number."""
        found: dict[str, int] = {}
        for _, line in self.prose:
            if (heading := _HEADING.fullmatch(line)) is None:
                continue
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading["text"]).lower()
            anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            times = found[anchor] = found.get(anchor, -1) + 1
            if times:
                found[f"{anchor}-{times}"] = 0
        return set(found)

    @property
    def _parsed(self) -> tuple[list[tuple[int, str]], tuple[Block, ...]]:
        return _parse(self.name, self.path.read_text(encoding="utf-8"))


@cache
def _parse(name: str, text: str) -> tuple[list[tuple[int, str]], tuple[Block, ...]]:
    prose, blocks = [], []
    opened: tuple[re.Match[str], int, list[str]] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        fence = _FENCE.fullmatch(line)
        if opened is None:
            if fence is None:
                prose.append((number, line))
            else:
                opened = fence, number, []
        elif fence is not None and not fence["info"] and len(fence["fence"]) >= len(opened[0]["fence"]):
            first, start, body = opened
            indent = len(first["indent"])
            blocks.append(
                Block(name, start, tuple(first["info"].split()), "".join(f"{each[indent:]}\n" for each in body))
            )
            opened = None
        else:
            opened[2].append(line)
    assert opened is None, f"{name}:{opened[1]}: this block has no end"
    return prose, tuple(blocks)


def pages() -> list[Page]:
    """All that a user is meant to read."""
    paths = [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "k8s/README.md",
        ROOT / "loadtests/README.md",
    ]
    return [Page(path) for path in paths]


def blocks(*languages: str) -> list[Block]:
    """Of all pages, those in these languages."""
    return [block for page in pages() for block in page.blocks if block.language in languages]
