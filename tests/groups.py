"""Groups of ranks that are threads of one process: quick enough for laws."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.model.group import Alone, Group, Place

_PATIENCE_S = 100.0

T = TypeVar("T")


class _Table:
    """What each rank has laid down, for all to see."""

    def __init__(self, size: int) -> None:
        self.laid: list[tuple[Tensor, Sequence[int]]] = [(torch.empty(0), ())] * size
        self.barrier = threading.Barrier(size, timeout=_PATIENCE_S)


class ThreadGroup:
    """One rank among threads."""

    def __init__(self, table: _Table, rank: int) -> None:
        self._table, self.rank, self.size = table, rank, len(table.laid)

    def add(self, x: Tensor) -> Tensor:
        total = torch.stack([t for t, _ in self._all(x)]).sum(0)
        return self._after(total)

    def exchange(self, x: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        parts = [torch.split(t, list(counts))[self.rank] for t, counts in self._all(x, to)]
        assert [len(part) for part in parts] == list(of), "counts of sender and receiver differ"
        return self._after(torch.cat(parts))

    def spread(self, x: Tensor) -> Tensor:
        return self._after(self._all(x)[0][0].clone())

    def _all(self, x: Tensor, to: Sequence[int] = ()) -> list[tuple[Tensor, Sequence[int]]]:
        self._table.laid[self.rank] = (x.clone(), to)
        self._table.barrier.wait()
        return self._table.laid

    def _after(self, x: Tensor) -> Tensor:
        """Nobody lays down anything new before all have taken."""
        self._table.barrier.wait()
        return x


def together(work: Callable[[Place], T], dims: ParallelDims) -> list[T]:
    """What `work` gives on each rank of a gang whose ranks are threads; raises the first error of any."""
    world = _Table(dims.world)
    rows, columns = ([_Table(size) for _ in range(count)] for size, count in ((dims.tp, dims.dp), (dims.dp, dims.tp)))
    errors: list[BaseException] = []

    def run(rank: int) -> T | None:
        where = dims.coordinates(rank)
        tp: Group = ThreadGroup(rows[where.dp_rank], where.tp_rank) if dims.tp > 1 else Alone()
        dp: Group = ThreadGroup(columns[where.tp_rank], where.dp_rank) if dims.dp > 1 else Alone()
        try:
            return work(Place(Shard(dims, rank), tp, dp, ThreadGroup(world, rank) if dims.world > 1 else Alone()))
        except BaseException as e:
            errors.append(e)
            for table in (world, *rows, *columns):
                table.barrier.abort()
            return None

    with ThreadPoolExecutor(dims.world) as pool:
        out = list(pool.map(run, range(dims.world)))
    if errors:
        raise errors[0]
    return out  # type: ignore[return-value]
