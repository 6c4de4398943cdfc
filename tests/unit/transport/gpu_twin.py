"""A GPU in the CPU's memory: what the transport asks of one, for several threads or processes."""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ernie_cluster.transport.base import Payload
from ernie_cluster.transport.gpu import Mark, Region
from tests.unit.transport.nccl_twin import EventMark, Mishaps, Stream, TwinNccl


class TwinGpu:
    """A `gpu.Gpu`."""

    def __init__(self, gpu_id: str = "twin", mishaps: Mishaps | None = None) -> None:
        self.id, self.mishaps = gpu_id, mishaps or Mishaps()
        self.nccl: Any = TwinNccl(self.mishaps)
        self.opened: dict[int, torch.Tensor] = {}
        self.stands_still = False
        """Marks of the engine's stream are never done."""

    def bind(self) -> None:
        pass

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def to_host(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    def payload(self, data: torch.Tensor) -> Payload:
        return data.numpy()

    def new_stream(self) -> Stream:
        return Stream()

    def on(self, stream: Stream | None) -> AbstractContextManager[object]:
        return nullcontext()

    def pointer(self, stream: Stream) -> int:
        return self.nccl.pointer(stream)  # type: ignore[no-any-return]

    def mark(self, stream: Stream | None) -> Mark:
        if stream is not None:
            return stream.mark()
        mark = EventMark()
        if not self.stands_still:
            mark.event.set()
        return mark

    def share(self, nbytes: int) -> Region:
        path = f"/proc/{os.getpid()}/fd/{os.memfd_create('twin')}"
        return Region(torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8), path.encode())

    def open(self, handle: bytes, nbytes: int) -> int:
        self.mishaps.meet("open")
        data = torch.from_file(handle.decode(), shared=True, size=nbytes, dtype=torch.uint8)
        self.opened[data.data_ptr()] = data
        return data.data_ptr()

    def copy(self, pointer: int, source: torch.Tensor, stream: Stream) -> None:
        def work() -> None:
            self.mishaps.meet("copy")
            ctypes.memmove(pointer, source.data_ptr(), source.numel())

        stream.put(work)

    def close(self, pointer: int) -> None:
        del self.opened[pointer]
