"""The few calls of a GPU that moving bytes needs: memory, streams, marks in them, and cupy's NCCL and IPC.

`Gpu` is the seam and the only place with CUDA calls; the rest of the transport decides, waits and speaks to the peer,
and is tested with a twin in the CPU's memory. torch owns streams and memory, so that packing and sending share them;
cupy lends `cupy.cuda.nccl` and the handles of CUDA IPC. Both are imported when a GPU is there, not before.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from ernie_cluster.errors import ConfigError
from ernie_cluster.transport.base import Payload


class Mark(Protocol):
    """A point in a stream."""

    def is_done(self) -> bool:
        """Whether all work before it is done; never waits."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Memory of this GPU that another process can open."""

    data: torch.Tensor
    """uint8 [n]."""
    handle: bytes
    """What the other process opens it by."""


class Gpu(Protocol):
    """One GPU of this process. Nothing here waits for the device, and any thread may call it."""

    id: str
    """Another one for each GPU, the same in each process that sees it."""
    nccl: Any
    """`cupy.cuda.nccl`."""

    def bind(self) -> None:
        """Make this the current GPU of the calling thread."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the device."""
        ...

    def to_host(self, values: torch.Tensor) -> torch.Tensor:
        """Copy to host memory, on the current stream; the values are there when a later mark is done."""
        ...

    def payload(self, data: torch.Tensor) -> Payload:
        """Device bytes as packers and sinks take them: `torch.as_tensor` makes a view of it."""
        ...

    def new_stream(self) -> Any:
        """A stream that no other work waits for."""
        ...

    def on(self, stream: Any | None) -> AbstractContextManager[object]:
        """Work inside goes to `stream`; None is the stream that the engine computes on."""
        ...

    def pointer(self, stream: Any) -> int:
        """The stream as NCCL takes it."""
        ...

    def mark(self, stream: Any | None) -> Mark:
        """Mark the present end of a stream; None as in `on`."""
        ...

    def share(self, nbytes: int) -> Region:
        """New memory for another process to open; it goes with this process."""
        ...

    def open(self, handle: bytes, nbytes: int) -> int:
        """Pointer to a region of another process; raises the binding's own error when it cannot be seen from here."""
        ...

    def copy(self, pointer: int, source: torch.Tensor, stream: Any) -> None:
        """Write `source`, uint8 and contiguous, to memory that `open` has opened."""
        ...

    def close(self, pointer: int) -> None:
        """Give up what `open` returned."""
        ...


def import_cupy() -> Any:
    """cupy with NCCL; ConfigError with the remedy where it is missing."""
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as e:
        raise ConfigError(
            f"cupy cannot be imported ({e}); NCCL and CUDA IPC need it: pip install cupy-cuda13x, "
            "or cupy-cuda12x beside a torch for CUDA 12"
        ) from e
    if not getattr(nccl, "available", False):
        raise ConfigError(
            "cupy finds no NCCL library (libnccl.so.2): pip install nvidia-nccl-cu13, or nvidia-nccl-cu12 beside "
            "cupy-cuda12x"
        )
    return cupy


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def is_done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class CudaGpu:
    """A `Gpu` of CUDA.

    Args:
        device: where the model is.

    Raises:
        ConfigError: cupy or its NCCL is missing.
    """

    def __init__(self, device: torch.device) -> None:
        cupy = import_cupy()
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._runtime = cupy.cuda.runtime
        self.nccl: Any = cupy.cuda.nccl
        self.id = str(torch.cuda.get_device_properties(index).uuid)

    def bind(self) -> None:
        torch.cuda.set_device(self._device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def to_host(self, values: torch.Tensor) -> torch.Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def payload(self, data: torch.Tensor) -> Payload:
        return cast(Payload, data)

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._or_default(stream))

    def pointer(self, stream: torch.cuda.Stream) -> int:
        return int(stream.cuda_stream)

    def mark(self, stream: torch.cuda.Stream | None) -> Mark:
        return _CudaMark(self._or_default(stream).record_event())

    def share(self, nbytes: int) -> Region:
        self.bind()
        pointer = self._runtime.malloc(nbytes)  # torch's own allocator hands out parts, which have no handle
        data = self._at(pointer, nbytes)
        assert data.data_ptr() == pointer, "a view, not a copy"
        return Region(data, bytes(self._runtime.ipcGetMemHandle(pointer)))

    def open(self, handle: bytes, nbytes: int) -> int:
        self.bind()
        return int(self._runtime.ipcOpenMemHandle(handle))

    def copy(self, pointer: int, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        # not a tensor's copy: the memory is another GPU's, perhaps of one that this process does not see
        kind = self._runtime.memcpyDefault
        self._runtime.memcpyAsync(pointer, source.data_ptr(), source.numel(), kind, stream.cuda_stream)

    def close(self, pointer: int) -> None:
        self.bind()
        self._runtime.ipcCloseMemHandle(pointer)

    def _or_default(self, stream: torch.cuda.Stream | None) -> torch.cuda.Stream:
        return torch.cuda.default_stream(self._device) if stream is None else stream

    def _at(self, pointer: int, nbytes: int) -> torch.Tensor:
        """Memory of this device that torch did not allocate, as a tensor that does not own it."""

        class Raw:
            __cuda_array_interface__ = {  # noqa: RUF012  the protocol wants a plain dict
                "shape": (nbytes,),
                "typestr": "|u1",
                "data": (pointer, False),
                "version": 3,
            }

        return torch.as_tensor(Raw(), device=self._device)
