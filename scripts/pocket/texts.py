"""What the tokenizer is trained on: the texts of some thousand lessons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lessons import draw_group
from trees import expected_text

NUM_GROUPS = 1500
"""Enough that every phrase comes up."""


def corpus() -> Iterator[str]:
    """Questions, answers and tool lists of the first lessons, and the template's own words."""
    for seed in range(NUM_GROUPS):
        for sample in draw_group(seed):
            for message in sample.messages:
                yield from _strings(message.get("content"))
            yield expected_text(sample)
            if sample.tools:
                yield json.dumps(list(sample.tools))
            yield "User: Picture 1:\nAssistant: \n\n"


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    else:
        yield from (part["text"] for part in content or () if part["type"] == "text")
