from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.inputs.positions import merged_grid, mrope_positions
from ernie_cluster.request import MediaKind


@dataclass(frozen=True)
class Run:
    kind: MediaKind
    offset: int
    num_tokens: int
    grid_thw: tuple[int, int, int]


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[Run]]:
    """Prompt length and media between stretches of text, possibly of length 0."""
    length, runs = 0, []
    for _ in range(draw(st.integers(0, 4))):
        length += draw(st.integers(0, 5))
        kind: MediaKind = draw(st.sampled_from(("image", "video")))
        frames = 1 if kind == "image" else 2 * draw(st.integers(1, 6))
        grid = (frames, 2 * draw(st.integers(1, 4)), 2 * draw(st.integers(1, 4)))
        t, h, w = merged_grid(kind, grid)
        runs.append(Run(kind, length, t * h * w, grid))
        length += t * h * w
    return length + draw(st.integers(0, 5)), runs


def naive(num_tokens: int, runs: list[Run]) -> list[list[int]]:
    """Token by token, straight from the rule: [t, h, w] of each."""
    out: list[list[int]] = []
    following = 0
    starts = {run.offset: run for run in runs}
    while len(out) < num_tokens:
        run = starts.get(len(out))
        if run is None:
            out.append([following] * 3)
            following += 1
            continue
        t, h, w = run.grid_thw
        frames = 1 if run.kind == "image" else t // 2
        base = following
        for i in range(run.num_tokens):
            row, column = i // (w // 2), i % (w // 2)
            out.append([base + row // (h // 2), base + row % (h // 2), base + column])
        following = base + max(frames, h // 2, w // 2)
    return out


@given(prompts())
def test_equals_the_rule_token_by_token(prompt: tuple[int, list[Run]]) -> None:
    num_tokens, runs = prompt
    positions = mrope_positions(num_tokens, runs)
    assert positions.dtype == np.int32
    assert positions.T.tolist() == naive(num_tokens, runs)


def test_example_of_the_docstring() -> None:
    positions = mrope_positions(9, [Run("image", 2, 6, (1, 4, 6))])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_text_behind_a_long_video_of_small_frames_starts_behind_its_last_time() -> None:
    positions = mrope_positions(37, [Run("video", 0, 36, (12, 4, 6))])
    assert positions[:, -1].tolist() == [6, 6, 6]


@pytest.mark.parametrize("span", [Run("image", 2, 5, (1, 4, 6)), Run("image", 8, 6, (1, 4, 6))])
def test_a_span_that_cannot_be_is_a_bug(span: Run) -> None:
    with pytest.raises(AssertionError):
        mrope_positions(9, [span])
