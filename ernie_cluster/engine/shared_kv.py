"""One KV cache for the tensor-parallel ranks of a host.

Each rank computes on its own heads; the leader sees them all, so hand-overs need not know how many ranks there are.
The memory has no name and goes with the last process that has it mapped.
"""

from __future__ import annotations

import mmap
import os

import torch

from ernie_cluster.errors import ConfigError
from ernie_cluster.model.group import Place
from ernie_cluster.model.step import KVCache
from ernie_cluster.transport.staging import create_memory, host_id

_LONGEST_NOTE = 512


def share_kv(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> KVCache:
    """An empty cache; every rank of the tensor-parallel group calls this at the same time.

    Args:
        place: of this rank.
        shape: [layers, 2, num_blocks, block_size, kv_heads, row] with the heads of all ranks.
        dtype: of K and V.

    Raises:
        ConfigError: the ranks are on different hosts.
        GangBroken: another rank is gone.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    note = torch.zeros(_LONGEST_NOTE, dtype=torch.uint8)
    own = -1
    if place.tp.rank == 0:
        own = create_memory(nbytes)
        said = f"{host_id()}|/proc/{os.getpid()}/fd/{own}".encode()
        note[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    host, _, path = bytes(place.tp.spread(note).tolist()).rstrip(b"\0").decode().partition("|")
    is_here = host == host_id()
    file = own if own >= 0 else os.open(path, os.O_RDWR) if is_here else -1
    try:
        # a sum, which all wait for: the leader may close its descriptor once everybody has opened it
        if place.tp.add(torch.tensor([int(not is_here)])).item():
            raise ConfigError(f"the {place.tp.size} ranks of a tensor-parallel group on CPU must be on one host")
        data = torch.frombuffer(mmap.mmap(file, nbytes), dtype=dtype).view(shape)
    finally:
        if file >= 0:
            os.close(file)
    heads = place.shard.kv_heads(shape[4])
    return KVCache(data, slice(heads.start, heads.stop))
