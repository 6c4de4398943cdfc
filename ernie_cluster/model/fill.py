"""Fills the parameters of a module from a checkpoint, by a plan of copies, in several threads.

The whole plan is held against the headers before a byte is read. A part that lies in the file as it lies in the parameter
is read right into it; what has another dtype, is on another device, or is transposed goes through a small buffer, one per
thread. So the host holds the parameters themselves, and beside them at most `num_threads` pieces of `PIECE_BYTES`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ernie_cluster.errors import CheckpointError
from ernie_cluster.model.checkpoint import DTYPES, Checkpoint, Entry, bytes_of

PIECE_BYTES = 16 << 20
"""Most that one thread reads at a time; one row, or a transposed tensor, may be more."""

NUM_THREADS = 4
"""Enough to keep a disk busy; two read from memory as fast as four on two cores."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One checkpoint tensor, the part of it that a rank takes, and where that goes."""

    source: str
    """Name in the checkpoint."""
    parameter: str
    """Name in the module."""
    shape: tuple[int, ...]
    """Of the tensor in the checkpoint, whole; follows from the model's configuration."""
    index: tuple[int | slice, ...] = ()
    """Part of the parameter that it fills; () is all of it."""
    part: tuple[slice, ...] = ()
    """Rows, or rows and columns, of the tensor that are taken; () is all of it."""
    is_transposed: bool = False
    """The checkpoint holds the transpose."""

    @property
    def rows(self) -> range:
        return range(self.shape[0])[self.part[0] if self.part else slice(None)]

    @property
    def columns(self) -> range:
        """Of the tensor as a matrix; a vector has one."""
        return range(math.prod(self.shape[1:]))[self.part[1] if len(self.part) > 1 else slice(None)]


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is read at once."""

    entry: Entry
    rows: range
    columns: range
    target: Tensor
    """[rows, columns], or its transpose; a view of the parameter."""
    is_transposed: bool

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]

    @property
    def num_bytes(self) -> int:
        return len(self.rows) * len(self.columns) * self.dtype.itemsize


class _Buffers(threading.local):
    """A buffer for each thread, as large as its largest piece so far; pinned where it feeds a GPU."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, piece: _Piece) -> Tensor:
        """[rows, columns] in the file's dtype, until the thread's next call."""
        if self._bytes.numel() < piece.num_bytes:
            self._bytes = torch.empty(piece.num_bytes, dtype=torch.uint8, device="cpu", pin_memory=piece.target.is_cuda)
        return self._bytes[: piece.num_bytes].view(piece.dtype).view(len(piece.rows), len(piece.columns))


def no_progress(done: int, total: int) -> None:
    """Nobody watches."""


def fill(
    module: nn.Module,
    copies: Sequence[Copy],
    checkpoint: Checkpoint,
    *,
    progress: Callable[[int, int], None] = no_progress,
    num_threads: int = NUM_THREADS,
) -> None:
    """Read every copy's part of its tensor, and nothing else, into its place.

    Args:
        module: its parameters are filled.
        copies: each number of each parameter in one of them.
        checkpoint: read by `num_threads` threads.
        progress: called as (bytes done, bytes in all) from this thread, after each piece.

    Raises:
        CheckpointError: a tensor is missing, of another shape than the configuration says or of a dtype that is not read,
            or a file is damaged.
    """
    parameters = dict(module.named_parameters())
    found = zip(copies, check(copies, checkpoint), strict=True)
    pieces = [piece for copy, entry in found for piece in _pieces(copy, entry, parameters[copy.parameter])]
    pieces.sort(key=lambda p: (p.entry.path, p.entry.start, p.rows.start))
    buffers, done, total = _Buffers(), 0, sum(p.num_bytes for p in pieces)
    before = checkpoint.bytes_read

    def read(piece: _Piece) -> int:
        _read(piece, checkpoint, buffers)
        return piece.num_bytes

    with ThreadPoolExecutor(num_threads, thread_name_prefix="weights") as pool:
        for num_bytes in pool.map(read, pieces):  # the first error cancels what has not begun
            done += num_bytes
            progress(done, total)
    assert checkpoint.bytes_read - before == total, "more or less was read than the plan says"


def check(copies: Sequence[Copy], checkpoint: Checkpoint) -> list[Entry]:
    """The tensor of each copy; raises CheckpointError for the first that is not as the plan expects."""
    return [_checked(copy, checkpoint) for copy in copies]


def _checked(copy: Copy, checkpoint: Checkpoint) -> Entry:
    entry = checkpoint.entry(copy.source)
    if entry.shape != copy.shape:
        raise CheckpointError(
            f"{entry.path}: {copy.source} has shape {list(entry.shape)}, config.json says {list(copy.shape)}"
        )
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{entry.path}: {copy.source} is stored as {entry.dtype}; only {' and '.join(DTYPES)} are read here, "
            "use a checkpoint that is not quantised"
        )
    return entry


def _pieces(copy: Copy, entry: Entry, parameter: nn.Parameter) -> Iterator[_Piece]:
    """The copy in runs of whole rows."""
    target, rows, columns = parameter.data[copy.index or ...], copy.rows, copy.columns
    assert target.numel() == len(rows) * len(columns), f"{copy} does not fit {list(target.shape)}"
    if copy.is_transposed:
        yield _Piece(entry, rows, columns, target, True)
        return
    target = target.view(len(rows), len(columns))
    row_bytes = len(columns) * DTYPES[entry.dtype].itemsize
    step = max(1, PIECE_BYTES // row_bytes)
    for first in range(0, len(rows), step):
        yield _Piece(entry, rows[first : first + step], columns, target[first : first + step], False)


def _read(piece: _Piece, checkpoint: Checkpoint, buffers: _Buffers) -> None:
    target = piece.target
    is_direct = target.device.type == "cpu" and target.dtype == piece.dtype and not piece.is_transposed
    host = target if is_direct else buffers.take(piece)
    checkpoint.read(piece.entry, piece.rows, piece.columns, bytes_of(host))
    if not is_direct:
        target.copy_(host.T if piece.is_transposed else host)
