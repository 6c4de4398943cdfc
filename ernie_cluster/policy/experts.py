"""Where the experts of each layer should stand, from how much each was used: copies of hot ones, and even ranks.

Loads are what one expert cost its ranks together, in any unit that is the same for all, such as tokens x width. Tokens go to
an expert's copies in turn, so each copy bears an equal part. Tables are those of `config.experts`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from ernie_cluster.config.experts import EMPTY, Table


def rebalance(
    loads: Sequence[Sequence[float]], tables: Sequence[Table], num_pools: int, min_gain: float
) -> list[Table]:
    """A table for each layer; a layer that would gain too little keeps its own.

    Args:
        loads: [layers][experts], not negative.
        tables: where the experts stand now; each has a place at least.
        num_pools: modalities in the table, 1 or 2.
        min_gain: part of the fullest rank's load that a move must take off it, 0 to 1.
    """
    return [_layer(load, table, num_pools, min_gain) for load, table in zip(loads, tables, strict=True)]


def rank_loads(load: Sequence[float], table: Table) -> list[float]:
    """What each rank bears. Loads 6, 2 on ((0, 1), (0, -1)): [5.0, 3.0]."""
    copies = Counter(e for row in table for e in row)
    return [sum(load[e] / copies[e] for e in row if e != EMPTY) for row in table]


def _layer(load: Sequence[float], table: Table, num_pools: int, min_gain: float) -> Table:
    fullest, mean = max(rank_loads(load, table)), sum(load) / len(table)
    bound = fullest * (1 - min_gain)
    if mean >= bound:
        return table
    loosely, tightly = (_packed(load, table, num_pools, slack) for slack in (min_gain, None))
    loosely = _swapped(load, loosely, num_pools, mean * (1 + min_gain))
    least = max(rank_loads(load, tightly))
    best = loosely if max(rank_loads(load, loosely)) <= least * (1 + min_gain) else tightly
    return best if max(rank_loads(load, best)) < bound else table


def _packed(load: Sequence[float], table: Table, num_pools: int, slack: float | None) -> Table:
    """Copies by falling load, each on the emptiest rank.

    Args:
        slack: a copy stays where it is unless that makes the rank fuller than it need be by more than this part;
            None = none has to stay.
    """
    world, size, per_pool = len(table), len(table[0]) // num_pools, len(load) // num_pools
    copies = [n for p in range(num_pools) for n in _copies(load[p * per_pool : (p + 1) * per_pool], world, size)]
    parts = sorted(((load[e] / n, e) for e, n in enumerate(copies) for _ in range(n)), key=lambda p: (-p[0], p[1]))
    enough = 0.0 if slack is None else max(sum(load) / world, parts[0][0]) * (1 + slack)
    total, held = [0.0] * world, [set[int]() for _ in range(world)]
    room = [[size] * num_pools for _ in range(world)]
    moving = []

    def put(part: float, e: int, rank: int) -> None:
        total[rank] += part
        room[rank][e // per_pool] -= 1
        held[rank].add(e)

    for part, e in parts:
        homes = [r for r, row in enumerate(table) if e in row and e not in held[r] and total[r] + part <= enough]
        if slack is not None and homes:
            put(part, e, min(homes, key=total.__getitem__))
        else:
            moving.append((part, e))
    for part, e in moving:
        able = [r for r in range(world) if room[r][e // per_pool] and e not in held[r]]
        if able:  # else the ranks with room have it already, so it has one copy at least
            put(part, e, min(able, key=lambda r: (total[r], e not in table[r])))
    return tuple(_slots(row, some, num_pools, per_pool) for row, some in zip(table, held, strict=True))


def _swapped(load: Sequence[float], table: Table, num_pools: int, enough: float) -> Table:
    """The fullest rank changes one expert for a lighter one, or for an empty slot, until it bears `enough` at most."""
    rows, total, size = [list(row) for row in table], rank_loads(load, table), len(table[0]) // num_pools
    copies = Counter(e for row in table for e in row)
    part = {e: 0.0 if e == EMPTY else load[e] / n for e, n in copies.items()}
    for _ in range(len(rows) * len(rows[0])):
        full = total.index(max(total))
        choices = [
            (max(total[full] - less, total[rank] + less), b != EMPTY, rank, i, j)
            for rank, row in enumerate(rows)
            for i, a in enumerate(rows[full])
            if a not in row
            for j, b in enumerate(row[i // size * size : (i // size + 1) * size], i // size * size)
            if 0 < (less := part[a] - part[b]) < total[full] - total[rank] and (b == EMPTY or b not in rows[full])
        ]
        if total[full] <= enough or not choices:
            break
        _, _, rank, i, j = min(choices)
        rows[full][i], rows[rank][j] = rows[rank][j], rows[full][i]
        total = rank_loads(load, tuple(map(tuple, rows)))
    return tuple(map(tuple, rows))


def _copies(load: Sequence[float], world: int, size: int) -> list[int]:
    """How many of each expert of one pool: one, and one more wherever a copy bears most, while there are slots."""
    copies = [1] * len(load)
    heap = [(-part, e) for e, part in enumerate(load) if part and world > 1]
    heapq.heapify(heap)
    for _ in range(world * size - len(load)):
        if not heap:
            break
        _, e = heapq.heappop(heap)
        copies[e] += 1
        if copies[e] < world:
            heapq.heappush(heap, (-load[e] / copies[e], e))
    return copies


def _slots(row: Sequence[int], held: set[int], num_pools: int, per_pool: int) -> tuple[int, ...]:
    """A rank's slots: what stays, stays in its slot; what comes takes the first free ones of its pool."""
    size = len(row) // num_pools
    out = [e if e in held else EMPTY for e in row]
    for e in sorted(held - set(row)):
        out[out.index(EMPTY, e // per_pool * size)] = e
    return tuple(out)
