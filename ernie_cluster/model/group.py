"""Ranks that compute one step together: what they exchange inside it.

A rank calls the same collectives in the same order as its peers, in every step, also when it has nothing to do.
`Alone` is the group of a single rank, `TorchGroup` one over `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from ernie_cluster.config.parallel import WHOLE, Shard
from ernie_cluster.errors import GangBroken


class Group(Protocol):
    """Some ranks, numbered from 0. Every call raises GangBroken when a peer is gone or too late."""

    @property
    def rank(self) -> int:
        """This one's number."""

    @property
    def size(self) -> int:
        """How many there are, at least 1."""

    def add(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, any shape, the same on all; may reuse the memory of `x`."""

    def exchange(self, x: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        """Rows that the others have for this rank, by rank.

        Args:
            x: [sum(to), ...]: rows for rank 0, then for rank 1, and so on.
            to: how many rows go to each rank.
            of: how many come from each.

        Returns:
            [sum(of), ...].
        """

    def spread(self, x: Tensor) -> Tensor:
        """Rank 0's `x`; the others pass a tensor of its shape and dtype, which is filled."""


class Alone:
    """One rank: nothing to exchange."""

    rank, size = 0, 1

    def add(self, x: Tensor) -> Tensor:
        return x

    def exchange(self, x: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        return x

    def spread(self, x: Tensor) -> Tensor:
        return x


class TorchGroup:
    """Collectives of a process group: gloo on CPU, NCCL on GPUs.

    Args:
        handle: of `torch.distributed`.
    """

    def __init__(self, handle: distributed.ProcessGroup) -> None:
        self._handle = handle
        self.rank, self.size = handle.rank(), handle.size()

    def add(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with _told():
            distributed.all_reduce(x, group=self._handle)
        return x

    def exchange(self, x: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        out = x.new_empty(sum(of), *x.shape[1:])
        with _told():
            distributed.all_to_all_single(out, x.contiguous(), list(of), list(to), group=self._handle)
        return out

    def spread(self, x: Tensor) -> Tensor:
        with _told():
            distributed.broadcast(x, group=self._handle, group_src=0)
        return x


class _told:
    """Errors of the library become ours."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise GangBroken(f"a rank of this gang is gone or too late: {error}") from error


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place in its gang."""

    shard: Shard = WHOLE
    """Its number, and what it holds."""
    tp: Group = field(default_factory=Alone)
    """Ranks with the same tokens, each with a share of the heads and columns."""
    dp: Group = field(default_factory=Alone)
    """Ranks with the same share and other tokens."""
    ep: Group = field(default_factory=Alone)
    """All ranks of the gang, each with a share of the experts."""


ALONE = Place()


def open_store(host: str, timeout_s: float) -> Any:
    """Where the ranks of a new gang find each other, on a port that the system chooses (`.port`)."""
    return distributed.TCPStore(  # type: ignore[attr-defined]
        host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def join(store: Any, shard: Shard, device: torch.device, timeout_s: float) -> Place:
    """Take a place in a gang; returns once all ranks are there. A process can be in one gang.

    Args:
        store: made by `open_store`, or its (host, port).
        shard: what this process holds.
        device: decides the library of its tensors: NCCL for GPUs; gloo on CPU, where commands travel in any case.
        timeout_s: of this call and of every collective later.

    Raises:
        GangBroken: not all ranks came in time.
    """
    bound = timedelta(seconds=timeout_s)
    with _told():
        if isinstance(store, tuple):
            store = distributed.TCPStore(  # type: ignore[attr-defined]
                store[0], store[1], is_master=False, timeout=bound
            )
        dims, backend = shard.dims, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=shard.rank, world_size=dims.world, timeout=bound)
        rows = [[dims.rank(dp, tp) for tp in range(dims.tp)] for dp in range(dims.dp)]
        columns = [list(column) for column in zip(*rows, strict=True)]
        world, tp, dp = distributed.group.WORLD, _subgroup(rows, bound), _subgroup(columns, bound)
    assert world is not None
    return Place(shard, tp, dp, TorchGroup(world) if dims.world > 1 else Alone())


def _subgroup(ranks: list[list[int]], bound: timedelta) -> Group:
    """The one of these groups, all of one size, that this process is in."""
    if len(ranks[0]) == 1:
        return Alone()
    handle, _ = distributed.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
        ranks, timeout=bound
    )
    assert handle is not None
    return TorchGroup(handle)


def leave() -> None:
    """Give the gang's connections back."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
