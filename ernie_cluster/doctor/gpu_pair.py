"""Two GPUs meet by NCCL: a sum over both, which must be right, and bytes from one to the other.

May block for ever where there is no way between them: to be run in a process that its caller can kill.
"""

from __future__ import annotations

import time

import torch

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport.gpu import Gpu
from ernie_cluster.transport.nccl_pair import UniqueId

NUM_SUMMED = 1 << 20
BULK_BYTES = 256 << 20
NUM_SENT = 4
"""Times that the bulk goes over; the first opens the links and is not counted."""

_POLL_S = 0.001


def meet(gpu: Gpu, uid: UniqueId, rank: int) -> float:
    """Bytes per second from rank 0 to rank 1, as this end saw it.

    Args:
        gpu: of this process.
        uid: of rank 0's `get_unique_id`, for this pair only.
        rank: 0 or 1.

    Raises:
        TransferFailed: the sum is wrong.
    """
    gpu.bind()
    nccl, stream = gpu.nccl, gpu.new_stream()
    comm = nccl.NcclCommunicator(2, uid, rank)
    try:
        with gpu.on(stream):
            values = gpu.allocate(NUM_SUMMED * 4).view(torch.int32)
            values.fill_(rank + 1)
        pointer = values.data_ptr()
        comm.allReduce(pointer, pointer, NUM_SUMMED, nccl.NCCL_INT32, nccl.NCCL_SUM, gpu.pointer(stream))
        _wait(gpu, stream)
        if not (values == 3).all().item():
            raise TransferFailed(f"an all-reduce of 1 and 2 over NCCL does not give 3 on rank {rank}; replace the link")
        bulk, start_s = gpu.allocate(BULK_BYTES), 0.0
        for i in range(NUM_SENT):
            if i == 1:
                _wait(gpu, stream)
                start_s = time.perf_counter()
            pass_on = comm.send if rank == 0 else comm.recv
            pass_on(bulk.data_ptr(), BULK_BYTES, nccl.NCCL_UINT8, 1 - rank, gpu.pointer(stream))
        _wait(gpu, stream)
        return (NUM_SENT - 1) * BULK_BYTES / (time.perf_counter() - start_s)
    finally:
        comm.abort()


def _wait(gpu: Gpu, stream: object) -> None:
    mark = gpu.mark(stream)
    while not mark.is_done():
        time.sleep(_POLL_S)
