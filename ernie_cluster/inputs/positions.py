"""3-D positions of a prompt's tokens: what the decoder's rotary embedding turns into angles.

Text moves all three axes together. The patches of a picture or video spread over a (time, height, width) grid that
begins where the text stopped, and the text after it goes on behind the largest position on any axis. This is the rule
the models were trained with; transformers 5.23 looks at height and width only, which differs after long videos of
small frames. Knows no tokens and no pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.request import MediaKind


class MediaSpan(Protocol):
    """What is needed of a `MediaInput`."""

    @property
    def kind(self) -> MediaKind: ...
    @property
    def offset(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def grid_thw(self) -> tuple[int, int, int]: ...


def merged_grid(
    kind: MediaKind, grid_thw: tuple[int, int, int], spatial_merge: int = 2, temporal_merge: int = 2
) -> tuple[int, int, int]:
    """Grid in tokens of a grid in patches: an image [1, 8, 6] gives (1, 4, 3), a video [6, 4, 4] gives (3, 2, 2)."""
    t, h, w = grid_thw
    return (t if kind == "image" else t // temporal_merge), h // spatial_merge, w // spatial_merge


def mrope_positions(
    num_tokens: int, spans: Sequence[MediaSpan], *, spatial_merge: int = 2, temporal_merge: int = 2
) -> NDArray[np.int32]:
    """Temporal, height and width position of every prompt token.

    Args:
        num_tokens: prompt length N, placeholders included.
        spans: pictures and videos in prompt order, not overlapping, each with as many tokens as its merged grid.
        spatial_merge: patches per token along height and along width.
        temporal_merge: frames per token of a video.

    Returns:
        int32 [3, N]. Two text tokens, an image of 1x2x3 tokens and one more text token give
        t 0 1 2 2 2 2 2 2 5, h 0 1 2 2 2 3 3 3 5, w 0 1 2 3 4 2 3 4 5.
    """
    out = np.empty((3, num_tokens), np.int32)
    done = position = 0
    for span in spans:
        grid = merged_grid(span.kind, span.grid_thw, spatial_merge, temporal_merge)
        end = span.offset + span.num_tokens
        assert done <= span.offset < end <= num_tokens, f"span [{span.offset}, {end}) is out of order"
        assert span.num_tokens == grid[0] * grid[1] * grid[2], f"{span.num_tokens} tokens for grid {grid}"
        start = position + span.offset - done
        out[:, done : span.offset] = np.arange(position, start)
        out[:, span.offset : end] = start + np.indices(grid).reshape(3, -1)
        done, position = end, start + max(grid)
    out[:, done:] = np.arange(position, position + num_tokens - done)
    return out
