"""Moves the experts of one layer between ranks: their weights are exchanged as they are, bytes of any format.

The ranks have the weights in the format and on the device where they are needed; a checkpoint would have to be read, cut and
quantised again, on nodes whose disk may be slow. Beside the weights a rank holds what it sends and gets of one tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from ernie_cluster.config.experts import EMPTY, Table
from ernie_cluster.model.group import Group


class Move(NamedTuple):
    """One expert's way; source and target may be one rank."""

    source: int
    target: int
    to_slot: int
    from_slot: int


def moves(old: Table, new: Table) -> list[Move]:
    """What comes to slots whose expert changes, by source, target and slot; copies share the sending."""
    out = []
    for target, (had, wants) in enumerate(zip(old, new, strict=True)):
        for slot, expert in enumerate(wants):
            if expert in (EMPTY, had[slot]):
                continue
            holders = [target] if expert in had else [rank for rank, row in enumerate(old) if expert in row]
            source = holders[target % len(holders)]
            out.append(Move(source, target, slot, old[source].index(expert)))
    return sorted(out)


def relocate(pools: Iterable[nn.Module], old: Table, new: Table, ep: Group) -> None:
    """Bring this rank's weights from `old` to `new`; all ranks of the gang call it with the same tables.

    Args:
        pools: the experts of each modality, text first: every tensor has a slot per row of its first dimension.
        old, new: see `config.experts`.

    Raises:
        GangBroken: another rank is gone; the weights of this one are then of no use.
    """
    plan, first = moves(old, new), 0
    for pool in pools:
        tensors = [t.data for t in chain(pool.parameters(), pool.buffers())]
        last = first + len(tensors[0])
        some = [m for m in plan if first <= m.to_slot < last]
        sent, got = [m for m in some if m.source == ep.rank], [m for m in some if m.target == ep.rank]
        to, of = Counter(m.target for m in sent), Counter(m.source for m in got)
        leaving, coming = [m.from_slot - first for m in sent], [m.to_slot - first for m in got]
        for tensor in tensors if some else ():  # all ranks exchange, or none
            bytes_EB = tensor.view(len(tensor), -1).view(torch.uint8)
            rows = bytes_EB[torch.tensor(leaving, dtype=torch.int64)]
            came = ep.exchange(rows, [to[r] for r in range(ep.size)], [of[r] for r in range(ep.size)])
            bytes_EB[torch.tensor(coming, dtype=torch.int64)] = came
        first = last
