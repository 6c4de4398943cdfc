"""Fills the weights of a module from a checkpoint, by a plan of copies, in several threads.

The whole plan is held against the headers before a byte is read. A part that lies in the file as it lies in the parameter
is read right into it; what has another dtype, is on another device, or is transposed goes through a small buffer, one per
thread; what is quantised on its way goes through one, too. So the host holds the parameters themselves, and beside them at most `num_threads` pieces of `PIECE_BYTES`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ernie_cluster.errors import CheckpointError
from ernie_cluster.model.checkpoint import DTYPES, PLAIN, Checkpoint, Entry, bytes_of
from ernie_cluster.model.quant import Codec
from ernie_cluster.model.storage import QuantisedWeight

PIECE_BYTES = 16 << 20
"""Most that one thread reads at a time; one row, or a transposed tensor, may be more."""

_QUANTISING = 32
"""Share of a piece that is quantised at once: the arithmetic takes several times its bytes, and likes a cache."""

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
    dtype: str = ""
    """That the checkpoint must have, a key of `DTYPES`; "" is any of `PLAIN`."""

    @property
    def rows(self) -> range:
        return range(self.shape[0])[self.part[0] if self.part else slice(None)]

    @property
    def columns(self) -> range:
        """Of the tensor as a matrix; a vector has one."""
        return range(math.prod(self.shape[1:]))[self.part[1] if len(self.part) > 1 else slice(None)]


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is read at once, and where it goes."""

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

    def take(self, checkpoint: Checkpoint, buffers: _Buffers) -> None:
        """Read it into its place; raises CheckpointError."""
        target = self.target
        is_direct = target.device.type == "cpu" and target.dtype == self.dtype and not self.is_transposed
        host = target if is_direct else buffers.give(self)
        checkpoint.read(self.entry, self.rows, self.columns, bytes_of(host))
        if not is_direct:
            target.copy_(host.T if self.is_transposed else host)


@dataclass(frozen=True, slots=True)
class _QuantisedPiece(_Piece):
    """Whole rows that become codes and scales; `target` is for the codes."""

    scales: Tensor
    codec: Codec
    kept: slice
    """Columns that this rank holds; the scale of a row is that of all."""

    def take(self, checkpoint: Checkpoint, buffers: _Buffers) -> None:
        host = buffers.give(self)
        checkpoint.read(self.entry, self.rows, self.columns, bytes_of(host))
        codes, scales = self.codec.quantise(host.to(self.target.device))
        if not scales.isfinite().all():
            raise CheckpointError(
                f"{self.entry.path}: {self.entry.name} holds numbers that are not finite, which no scale can hold"
            )
        rows = slice(0, len(self.rows))
        self.target.copy_(codes[self.codec.codes_part(rows, self.kept)])
        self.scales.copy_(scales[self.codec.scales_part(rows, self.kept)])


class _Buffers(threading.local):
    """A buffer for each thread, as large as its largest piece so far; pinned where it feeds a GPU."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def give(self, piece: _Piece) -> Tensor:
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
    """Read every copy's part of its tensor into its place; of what is quantised on the way, the rows that the part is of.

    Args:
        module: its parameters are filled, and its quantised weights.
        copies: each number of each in one of them.
        checkpoint: read by `num_threads` threads.
        progress: called as (bytes done, bytes in all) from this thread, after each piece.

    Raises:
        CheckpointError: a tensor is missing, of another shape than the configuration says or of a dtype that is not read,
            or a file is damaged.
    """
    weights = dict(module.named_parameters()) | quantised_weights(module)
    found = zip(copies, check(copies, checkpoint), strict=True)
    pieces = [piece for copy, entry in found for piece in _pieces(copy, entry, weights[copy.parameter])]
    pieces.sort(key=lambda p: (p.entry.path, p.entry.start, p.rows.start))
    buffers, done, total = _Buffers(), 0, sum(p.num_bytes for p in pieces)
    before = checkpoint.bytes_read

    def read(piece: _Piece) -> int:
        piece.take(checkpoint, buffers)
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
    if copy.dtype and entry.dtype != copy.dtype:
        raise CheckpointError(
            f"{entry.path}: {copy.source} is stored as {entry.dtype}, quantization_config of config.json says {copy.dtype}"
        )
    if not copy.dtype and entry.dtype not in PLAIN:
        raise CheckpointError(
            f"{entry.path}: {copy.source} is stored as {entry.dtype}; only {' and '.join(PLAIN)} are read here, "
            "use a checkpoint that is not quantised"
        )
    return entry


def _pieces(copy: Copy, entry: Entry, weight: nn.Parameter | QuantisedWeight) -> Iterator[_Piece]:
    """The copy in runs of whole rows."""
    if isinstance(weight, QuantisedWeight):
        yield from _quantised_pieces(copy, entry, weight)
        return
    target, rows, columns = weight.data[copy.index or ...], copy.rows, copy.columns
    assert target.numel() == len(rows) * len(columns), f"{copy} does not fit {list(target.shape)}"
    if copy.is_transposed:
        yield _Piece(entry, rows, columns, target, True)
        return
    target = target.view(len(rows), len(columns))
    step = _rows_at_once(len(columns), entry)
    for first in range(0, len(rows), step):
        yield _Piece(entry, rows[first : first + step], columns, target[first : first + step], False)


def _quantised_pieces(copy: Copy, entry: Entry, weight: QuantisedWeight) -> Iterator[_QuantisedPiece]:
    rows, kept, every = copy.rows, slice(copy.columns.start, copy.columns.stop), range(copy.shape[1])
    codes, scales = weight.codes.data[copy.index or ...], weight.scales.data[scales_index(copy, weight.codec) or ...]
    r = weight.codec.block[0]
    step = -(-_rows_at_once(len(every), entry) // (_QUANTISING * r)) * r
    for first in range(0, len(rows), step):
        run = slice(first, first + step)
        mine = scales[first // r : (first + step) // r]
        yield _QuantisedPiece(entry, rows[run], every, codes[run], False, mine, weight.codec, kept)


def _rows_at_once(num_columns: int, entry: Entry) -> int:
    return max(1, PIECE_BYTES // (num_columns * DTYPES[entry.dtype].itemsize))


def quantised_weights(module: nn.Module) -> dict[str, QuantisedWeight]:
    """By name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantisedWeight)}


def scales_index(copy: Copy, codec: Codec) -> tuple[int | slice, ...]:
    """Part of the scales that belongs to the part of a quantised weight that a copy fills."""
    r = codec.block[0]
    return tuple(slice(i.start // r, -(-i.stop // r)) if isinstance(i, slice) else i for i in copy.index)


def stored_copies(copies: Iterable[Copy], weights: Mapping[str, QuantisedWeight]) -> Iterator[Copy]:
    """The same plan for a checkpoint that holds codes, under the matrix's name, and scales beside them."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    for copy in copies:
        weight = weights.get(copy.parameter)
        if weight is None:
            yield copy
            continue
        codec, rows, columns = weight.codec, copy.rows, copy.columns
        part = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        yield Copy(
            copy.source,
            f"{copy.parameter}.codes",
            codec.codes_shape(*copy.shape),
            copy.index,
            codec.codes_part(*part),
            dtype=names[codec.dtype],
        )
        yield Copy(
            scales_name(copy.source),
            f"{copy.parameter}.scales",
            codec.scales_shape(*copy.shape),
            scales_index(copy, codec),
            codec.scales_part(*part),
            dtype="F32",
        )


def scales_name(source: str) -> str:
    """Of the scales, beside the codes of a tensor."""
    return f"{source}_scale"
