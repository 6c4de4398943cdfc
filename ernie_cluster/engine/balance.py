"""What a rank knows of the use of its gang's experts, and how the gang moves them between two steps.

Counts stay on the device and are read at most once a second, between two steps, when the device has nothing to do anyway.
Where experts should stand is decided by a rule that is handed in, on rank 0, from the tokens of all leaders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie_cluster.config.experts import EMPTY, ExpertUse, LayerExperts, Table
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.group import ALONE, Group, Place

_LOOK_S = 1.0
_WINDOW_S = 60.0
"""What is told of the use is of the last one or two of these."""

Rebalance = Callable[[Sequence[Sequence[float]], Sequence[Table], int], list[Table]]
"""(loads [layers][experts], tables of the layers, modalities) -> tables."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When experts move, and where to."""

    interval_steps: int
    """Steps between two decisions, at least 1."""
    rebalance: Rebalance


class Balancer:
    """Counts and tables of one rank. Called on the thread that steps; `use` and `layers` may be read by others.

    Args:
        decoder: of this rank, in its place.
        place: of this rank.
        rule: None = experts stay where they are.
    """

    def __init__(self, decoder: Decoder, place: Place = ALONE, rule: Rule | None = None) -> None:
        self._decoder, self._place = decoder, place
        self._rule = rule if decoder.sparse and place.ep.size > 1 else None
        self._layout = np.array(self.tables)
        self._steps = self._num_moves = 0
        self._decided = self._read()
        self._marks: deque[tuple[float, NDArray[np.int64]]] = deque(maxlen=2)
        self._looked_s = float("-inf")
        self._seen = self._decided
        self.use: ExpertUse | None = None
        """None in a model without experts, or before the first step."""

    @property
    def tables(self) -> list[Table]:
        """Where the experts of each sparse layer stand."""
        return [mlp.table for mlp in self._decoder.sparse]

    def layers(self) -> list[LayerExperts]:
        """Of every sparse layer, a second or so old. From any thread; while experts move some layers are ahead of others."""
        indices, seen = self._decoder.config.sparse_layers, self._seen.tolist()
        return [LayerExperts(*one) for one in zip(indices, map(tuple, seen), self.tables, strict=True)]

    def is_due(self, now_s: float) -> bool:
        """Asked between two steps; True on rank 0 when the gang should `decide` before the next one."""
        self._look(now_s)
        if self._rule is None or self._place.shard.rank > 0:
            return False
        return self._steps >= self._rule.interval_steps

    def stepped(self) -> None:
        """The gang runs another step."""
        self._steps += 1

    def decide(self) -> Tensor | None:
        """Where the experts should stand, int64 [layers, ranks, slots], the same on all leaders, who call this together.

        None when they stand well. Raises GangBroken.
        """
        counts, self._steps = self._read(), 0
        window = self._place.dp.add(torch.from_numpy(counts - self._decided))
        self._decided, tables = counts, self.tables
        if self._rule is not None and self._place.shard.rank == 0:
            costs = self._decoder.sparse[0].costs
            loads = window * torch.tensor(costs).repeat_interleave(window.shape[1] // len(costs))
            tables = self._rule.rebalance(loads.tolist(), tables, len(costs))
        wanted = self._place.dp.spread(torch.tensor(tables))
        return None if _tables(wanted) == self.tables else wanted

    def follow(self, tp: Group) -> None:
        """What a leader's followers do when it announces a move."""
        self.move(tp.spread(torch.zeros_like(torch.tensor(self.tables))))

    def move(self, wanted: Tensor) -> None:
        """Exchange weights layer by layer; all ranks of the gang call this with the same. Raises GangBroken."""
        for mlp, table in zip(self._decoder.sparse, _tables(wanted), strict=True):
            mlp.move(table, self._place.ep)
        self._layout = np.array(self.tables)
        self._num_moves += 1
        self._marks.clear()

    def _read(self) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = self._decoder.routed_LE.to("cpu", copy=True).numpy()
        return counts

    def _look(self, now_s: float) -> None:
        if now_s - self._looked_s < _LOOK_S or not self._decoder.sparse:
            return
        self._looked_s, self._seen = now_s, self._read()
        counts = self._seen
        if not self._marks or now_s - self._marks[-1][0] >= _WINDOW_S:
            self._marks.append((now_s, counts))
        recent, router = counts - self._marks[0][1], self._decoder.sparse[0].router
        costs = np.repeat(self._decoder.sparse[0].costs, router.num_experts)
        self.use = ExpertUse(
            imbalance(recent * costs, self._layout),
            hottest_share(recent, router.num_pools, router.top_k),
            tuple((counts[0].reshape(router.num_pools, -1).sum(1) // router.top_k).tolist()),
            self._num_moves,
        )


def imbalance(loads_LE: NDArray[np.int64], tables_LRS: NDArray[np.int64]) -> float:
    """Load of the fullest rank over the mean, of all layers together; 1 when there is none.

    Loads [[6, 2]] on [[[0, 1], [0, -1]]]: (3 + 2) / 4 = 1.25.
    """
    is_held = tables_LRS != EMPTY
    flat = np.where(is_held, tables_LRS, 0).reshape(len(tables_LRS), -1)
    copies = np.zeros_like(loads_LE)
    np.add.at(copies, (np.arange(len(flat))[:, None], flat), is_held.reshape(flat.shape))
    parts = np.take_along_axis(loads_LE / copies, flat, 1).reshape(tables_LRS.shape)
    ranks = (parts * is_held).sum(2)
    total = ranks.mean(1).sum()
    return float(ranks.max(1).sum() / total) if total else 1.0


def hottest_share(counts_LE: NDArray[np.int64], num_pools: int, top_k: int) -> float:
    """The largest part of one modality's tokens that chose one expert, in any layer."""
    pools = counts_LE.reshape(-1, num_pools, counts_LE.shape[1] // num_pools)
    tokens = np.maximum(pools.sum(2) // top_k, 1)
    return float((pools.max(2) / tokens).max(initial=0.0))


def _tables(wire: Tensor) -> list[Table]:
    return [tuple(map(tuple, table)) for table in wire.tolist()]
