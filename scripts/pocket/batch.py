"""Trees of samples to one batch of tensors.

A tree holds samples that begin alike: the trunk (a picture, mostly) is run once, and each sample's own tokens, its
branch, see the trunk and themselves. That is what each sample alone would see, at a fraction of the cost. All trees
of a batch lie one behind the other, without padding; attention alone needs rectangles, so segments (a trunk or a
branch) of like length are padded to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A picture or video of a tree."""

    row: int
    """Of its first placeholder token, within the tree."""
    grid_thw: tuple[int, int, int]
    patches: NDArray[np.uint8]
    """uint8 [t*h*w, 588] in merge-block order."""
    names: Ints
    """[t*h*w]: label of what stands at each patch, 0 for nothing, -1 for unknown."""
    colours: Ints
    """[t*h*w], likewise."""
    boxes: NDArray[np.float32]
    """[t*h*w, 4]: its edges relative to the patch's centre, in pixels / 64; NaN where nothing stands."""
    places: NDArray[np.float32]
    """[t*h*w, 4]: the same edges as fractions of the picture's width and height."""
    counts: Ints
    """[tokens]: centres of things within each token, -1 for unknown."""

    @property
    def num_tokens(self) -> int:
        t, h, w = self.grid_thw
        return max(1, t // 2) * h * w // 4


@dataclass(slots=True, eq=False)
class Tree:
    """Samples with a common beginning."""

    ids: list[int]
    positions: Ints
    """[3, n]."""
    segments: list[tuple[int, int]]
    """First and last token + 1 of the trunk (may be empty), then of each branch."""
    targets: list[tuple[int, int, float]] = field(default_factory=list)
    """(row, the token that follows it, weight)."""
    shown: list[Shown] = field(default_factory=list)
    pointers: list[tuple[int, tuple[int, ...], tuple[float, float, float, float]]] = field(default_factory=list)
    """(row that writes part of a box, rows of the picture's tokens that show what is in it, the box in fractions)."""


@dataclass(slots=True, eq=False)
class Rectangles:
    """Which rows attend to which: segments of like length, padded to rectangles of B segments, Q queries, K keys."""

    sizes: list[tuple[int, int, int]]
    """(B, Q, K) of each rectangle."""
    masks: list[Tensor]
    """float32 [B, 1, Q or 1, K] of each, 0 or a large negative number."""
    q_rows: Tensor
    """int64 [sum of B * Q]; padding is row 0."""
    k_rows: Tensor
    """int64 [sum of B * K]; padding is row 0."""
    places: Tensor
    """int64 [rows]: where each row is among `q_rows`; rows that attend to nothing are at 0."""


@dataclass(slots=True, eq=False)
class Pointers:
    """Rows that write boxes, and where they should look."""

    rows: Tensor
    """int64 [n]."""
    is_seen: Tensor
    """bool [n, N]: which rows of the batch they can attend to."""
    is_sought: Tensor
    """bool [n, N]: which of these show what the box frames."""
    boxes: Tensor
    """float32 [n, 4]: the box, as fractions of the picture's width and height."""


@dataclass(slots=True, eq=False)
class Batch:
    """What one step of training works on."""

    ids: Tensor
    positions: Tensor
    text_rows: Tensor
    vision_rows: Tensor
    pool_order: Tensor
    """Puts text rows followed by vision rows back into the order of tokens."""
    segments: Rectangles
    target_rows: Tensor
    target_ids: Tensor
    target_weights: Tensor
    media_rows: Tensor
    """Rows of placeholder tokens."""
    patches: Tensor
    """uint8 [P, 588], the last ones padding."""
    patch_places: Tensor
    """int64 [P, 2]: row and column of each patch."""
    frames: Rectangles
    first_frame: Tensor
    """Per placeholder token: which 2x2 block of patches is its first frame; `second_frame` its second."""
    second_frame: Tensor
    names: Tensor
    colours: Tensor
    boxes: Tensor
    places: Tensor
    counts: Tensor
    pointers: Pointers
    num_samples: int


NUM_TOKENS = 2048
"""Of every batch: what the trees leave free is padded, so that the shapes of most products never change."""

_ROUND = 256
"""Numbers of patches, placeholders and targets are padded to multiples of this, for the same reason."""


def make_batch(trees: Sequence[Tree], vision_pool: frozenset[int]) -> Batch:
    """Lay trees side by side; together they have at most `NUM_TOKENS` tokens."""
    num_free = NUM_TOKENS - sum(len(tree.ids) for tree in trees)
    assert num_free >= 0, f"{NUM_TOKENS - num_free} tokens in a batch of {NUM_TOKENS}"
    trees = [*trees, Tree([0] * num_free, np.zeros((3, num_free), np.int64), [(0, 0)])]
    starts = np.cumsum([0, *(len(tree.ids) for tree in trees)])
    ids = np.concatenate([np.asarray(tree.ids, np.int64) for tree in trees])
    is_vision = np.isin(ids, list(vision_pool))
    text_rows, vision_rows = np.flatnonzero(~is_vision), np.flatnonzero(is_vision)
    segments = [
        (_rows(tree.segments[0], start), _rows(segment, start))
        for tree, start in zip(trees, starts, strict=False)
        for segment in tree.segments
        if segment[1] > segment[0]
    ]
    trunks_first = [
        (own, own) if len(own) and np.array_equal(own, trunk) else (own, np.concatenate([trunk, own]))
        for trunk, own in segments
    ]
    targets = [
        (row + start, token, weight) for tree, start in zip(trees, starts, strict=False) for row, token, weight in tree.targets
    ]  # fmt: skip
    media = [(start, shown) for tree, start in zip(trees, starts, strict=False) for shown in tree.shown]
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(np.concatenate([tree.positions for tree in trees], 1)),
        text_rows=torch.from_numpy(text_rows),
        vision_rows=torch.from_numpy(vision_rows),
        pool_order=torch.from_numpy(np.argsort(np.concatenate([text_rows, vision_rows]))),
        segments=_rectangles(trunks_first, len(ids), is_causal=True),
        target_rows=_joined([np.array([t[0] for t in targets], np.int64)], (), np.int64, 0),
        target_ids=_joined([np.array([t[1] for t in targets], np.int64)], (), np.int64, 0),
        target_weights=_joined([np.array([t[2] for t in targets], np.float32)], (), np.float32, 0.0),
        pointers=_pointers(list(zip(trees, starts.tolist(), strict=False)), len(ids)),
        num_samples=sum(max(1, len(tree.segments) - 1) for tree in trees[:-1]),
        **_media_tensors(media),
    )


def _rows(segment: tuple[int, int], start: int) -> Ints:
    return np.arange(segment[0], segment[1]) + start


def _pointers(trees: list[tuple[Tree, int]], num_rows: int) -> Pointers:
    pointers = [(tree, start, *pointer) for tree, start in trees for pointer in tree.pointers]
    is_seen, is_sought = (torch.zeros(len(pointers), num_rows, dtype=torch.bool) for _ in range(2))
    for i, (tree, start, row, sought, _) in enumerate(pointers):
        first = next(first for first, end in tree.segments[1:] if first <= row < end)
        is_seen[i, start : start + tree.segments[0][1]] = True
        is_seen[i, start + first : start + row + 1] = True
        is_sought[i, [start + r for r in sought]] = True
    rows = torch.tensor([start + row for _, start, row, _, _ in pointers], dtype=torch.int64)
    boxes = torch.tensor([box for *_, box in pointers], dtype=torch.float32).view(-1, 4)
    return Pointers(rows, is_seen, is_sought & is_seen, boxes)


def _media_tensors(media: list[tuple[int, Shown]]) -> dict[str, Any]:
    shown = [s for _, s in media]
    frames: list[Ints] = []
    rows, firsts, seconds, places = [], [], [], []
    num_patches = 0
    for start, s in media:
        t, h, w = s.grid_thw
        blocks = np.arange(t * h * w // 4).reshape(t, -1) + num_patches // 4
        firsts.append((blocks if t == 1 else blocks[0::2]).reshape(-1))
        seconds.append((blocks if t == 1 else blocks[1::2]).reshape(-1))
        rows.append(np.arange(s.num_tokens) + start + s.row)
        places += [patch_places(h, w)] * t
        frames += list((np.arange(t * h * w) + num_patches).reshape(t, -1))
        num_patches += t * h * w
    return {
        "media_rows": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])),
        "patches": _joined([s.patches for s in shown], (588,), np.uint8, 0),
        "patch_places": _joined(places, (2,), np.int64, 0),
        "frames": _rectangles([(r, r) for r in frames], _rounded(num_patches), is_causal=False),
        "first_frame": _joined(firsts, (), np.int64, 0),
        "second_frame": _joined(seconds, (), np.int64, 0),
        "names": _joined([s.names for s in shown], (), np.int64, -1),
        "colours": _joined([s.colours for s in shown], (), np.int64, -1),
        "boxes": _joined([s.boxes for s in shown], (4,), np.float32, np.nan),
        "places": _joined([s.places for s in shown], (4,), np.float32, np.nan),
        "counts": _joined([s.counts for s in shown], (), np.int64, -1),
    }


def _joined(parts: Sequence[NDArray[Any]], shape: tuple[int, ...], dtype: Any, fill: float) -> Tensor:
    """One behind the other, then filled up to a multiple of `_ROUND` rows, at least one."""
    num = sum(map(len, parts))
    padding = np.full((_rounded(num) - num, *shape), fill, dtype)
    return torch.from_numpy(np.concatenate([*parts, padding]))


def _rounded(num: int) -> int:
    return max(1, -(-num // _ROUND)) * _ROUND


def patch_places(height: int, width: int) -> Ints:
    """[h*w, 2] row and column of a frame's patches in merge-block order."""
    order = np.indices((height, width)).reshape(2, height // 2, 2, width // 2, 2)
    return order.transpose(0, 1, 3, 2, 4).reshape(2, -1).T.astype(np.int64)


_NEVER = -1e4
_STEP = 16
"""Segments are padded to multiples of this."""
_WASTE = 1.35
"""A rectangle is closed when its longest segment would be this many times its shortest."""


def _rectangles(segments: list[tuple[Ints, Ints]], num_rows: int, *, is_causal: bool) -> Rectangles:
    """Of segments of (queries, keys). If causal, queries are the last of the keys, and see keys up to themselves."""
    out = Rectangles([], [], torch.empty(0), torch.empty(0), torch.zeros(num_rows, dtype=torch.int64))
    all_q, all_k, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for group in _grouped(segments):
        q_rows, k_rows = _padded([q for q, _ in group]), _padded([k for _, k in group])
        (num, q_len), k_len = q_rows.shape, k_rows.shape[1]
        out.sizes.append((num, q_len, k_len))
        last = torch.tensor([len(k) - (len(q) if is_causal else 1) for q, k in group])[:, None, None]
        query = torch.arange(q_len)[None, :, None] if is_causal else 0
        out.masks.append(torch.where(torch.arange(k_len)[None, None] <= last + query, 0.0, _NEVER)[:, None])
        for i, (q, _) in enumerate(group):
            out.places[torch.from_numpy(q)] = start + i * q_len + torch.arange(len(q))
        all_q.append(q_rows.reshape(-1))
        all_k.append(k_rows.reshape(-1))
        start += num * q_len
    out.q_rows, out.k_rows = torch.from_numpy(np.concatenate(all_q)), torch.from_numpy(np.concatenate(all_k))
    return out


def _grouped(segments: list[tuple[Ints, Ints]]) -> list[list[tuple[Ints, Ints]]]:
    """Segments whose queries take the same number of steps, and whose keys are not much longer than the shortest."""
    groups: list[list[tuple[Ints, Ints]]] = []
    bounds = (0, 0.0)
    for q, k in sorted(segments, key=lambda s: (_steps(s[0]), len(s[1]))):
        if not groups or _steps(q) != bounds[0] or len(k) > bounds[1]:
            groups.append([])
            bounds = (_steps(q), len(k) * _WASTE + _STEP)
        groups[-1].append((q, k))
    return groups


def _steps(rows: Ints) -> int:
    return -(-len(rows) // _STEP)


def _padded(rows: list[Ints]) -> Ints:
    longest = max(map(_steps, rows)) * _STEP
    table = np.zeros((len(rows), longest), np.int64)
    for i, r in enumerate(rows):
        table[i, : len(r)] = r
    return table
