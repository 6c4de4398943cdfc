"""A folder of safetensors files: what is in it, and any part of a tensor, straight into the reader's memory.

A file's header is held against the file before a byte of its tensors is read, so damage is told at once, with file and
tensor. Files are read, not mapped: many threads read at the same time, a file that shrinks is an error instead of a
signal, and nothing but what was asked for stays in this process's memory. Knows no model.
"""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ernie_cluster.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Types that can be read, by their name in a header."""

PLAIN = ("BF16", "F32")
"""Those of numbers; the others hold codes of quantised ones."""

_MOST_HEADER_BYTES = 100_000_000  # Source: the bound of the safetensors library
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor, as the header of its file describes it."""

    name: str
    path: Path
    """The file."""
    dtype: str
    """As the header says it, see `DTYPES`."""
    shape: tuple[int, ...]
    start: int
    """Where its first byte lies in the file."""
    num_bytes: int

    @property
    def num_columns(self) -> int:
        """Numbers per row, which are neighbours in the file; 1 for a vector."""
        return math.prod(self.shape[1:])


class Checkpoint:
    """The tensors of one folder, by name; only files that are asked for are opened.

    Args:
        folder: with *.safetensors, and model.safetensors.index.json where there are several.

    Raises:
        CheckpointError: no safetensors, a broken index, or a damaged file; the message names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        """Of tensors, by all threads together."""
        self._lock = threading.Lock()
        self._files: dict[str, tuple[FileIO, dict[str, Entry]]] = {}
        index = self.folder / INDEX
        stored = _read_index(index) if index.exists() else self._read_headers()
        self.names = frozenset(stored)
        """Of all tensors, as the files spell them."""
        self._places = {name: (file, name) for name, file in stored.items()}
        # transformers writes the vision tower under `model.`
        for name, file in stored.items():
            if name.startswith("model.vision_model."):
                self._places[name.removeprefix("model.")] = (file, name)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def file_of(self, name: str) -> Path:
        """The file that a tensor is said to be in."""
        return self.folder / self._places[name][0]

    def entry(self, name: str) -> Entry:
        """Where a tensor is.

        Raises:
            CheckpointError: it is missing, or its file is absent or damaged.
        """
        if name not in self._places:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing; is this a checkpoint of another model?")
        file, stored = self._places[name]
        entries = self._open(file)[1]
        if stored not in entries:
            raise CheckpointError(
                f"{self.folder / file}: tensor {stored!r} is not in it, though {INDEX} says so; {_AGAIN}"
            )
        return entries[stored]

    def read(self, entry: Entry, rows: range, columns: range, out: memoryview) -> None:
        """Part of a tensor, row after row; for any number of threads.

        Args:
            entry: of this checkpoint.
            rows, columns: runs, within the tensor as [shape[0], num_columns].
            out: bytes, as many as the part has; filled.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """
        file = self._files[entry.path.name][0]
        item = entry.num_bytes // max(1, math.prod(entry.shape))
        row_bytes = entry.num_columns * item
        start = entry.start + rows.start * row_bytes + columns.start * item
        if len(columns) == entry.num_columns:
            _fill(file, start, out, entry)
        else:
            width = len(columns) * item
            for row in range(len(rows)):
                _fill(file, start + row * row_bytes, out[row * width : (row + 1) * width], entry)
        with self._lock:
            self.bytes_read += len(out)

    def get(self, name: str) -> Tensor:
        """One whole tensor, on CPU; raises CheckpointError."""
        entry = self.entry(name)
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {name!r} is stored as {entry.dtype}; use {' or '.join(DTYPES)}"
            )
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.read(entry, range(entry.shape[0]), range(entry.num_columns), bytes_of(tensor))
        return tensor

    def close(self) -> None:
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def _read_headers(self) -> dict[str, str]:
        """File of each tensor where no index tells it."""
        stored: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            for name in self._open(path.name)[1]:
                if name in stored:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is in {stored[name]}, too; remove the file that does not belong here"
                    )
                stored[name] = path.name
        if not stored:
            raise CheckpointError(f"{self.folder}: no *.safetensors files; download the checkpoint again")
        return stored

    def _open(self, name: str) -> tuple[FileIO, dict[str, Entry]]:
        if name not in self._files:
            path = self.folder / name
            try:
                file = FileIO(path)
            except FileNotFoundError:
                raise CheckpointError(f"{path}: named by {INDEX} but not there; {_AGAIN}") from None
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from None
            self._files[name] = file, _read_header(path, file)
        return self._files[name]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}: not a safetensors index: {type(e).__name__}: {e}; {_AGAIN}") from None
    for name, file in files.items():
        if not file or Path(file).name != file:
            raise CheckpointError(f"{path}: tensor {name!r} is said to be in {file!r}, which is no file of this folder")
    return files


def _read_header(path: Path, file: FileIO) -> dict[str, Entry]:
    """What a file holds: eight bytes with the header's length, the header as JSON, then the tensors."""
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
        if size < 8 or (8 + length > size and length <= _MOST_HEADER_BYTES):
            raise CheckpointError(f"{path}: truncated: {size} bytes do not hold its header; {_AGAIN}")
        if length > _MOST_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file: it begins with a header of {length} bytes")
        header: Any = json.loads(os.pread(file.fileno(), length, 8))
        items = header.items()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path}: its header is damaged: {e}; {_AGAIN}") from None
    return {name: _entry(path, name, fields, 8 + length, size) for name, fields in items if name != "__metadata__"}


def _entry(path: Path, name: str, fields: Any, data: int, size: int) -> Entry:
    """One line of a header; `data` is where the tensors of a file of `size` bytes begin."""
    try:
        dtype, shape = str(fields["dtype"]), tuple(fields["shape"])
        first, end = fields["data_offsets"]
        is_sound = all(type(n) is int and n >= 0 for n in (*shape, first, end)) and first <= end
        if dtype in DTYPES:
            is_sound = is_sound and end - first == math.prod(shape) * DTYPES[dtype].itemsize
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise CheckpointError(f"{path}: its header is damaged at tensor {name!r}; {_AGAIN}")
    if data + end > size:
        raise CheckpointError(f"{path}: truncated: tensor {name!r} ends at byte {data + end} of {size}; {_AGAIN}")
    return Entry(name, path, dtype, shape, data + first, end - first)


def _fill(file: FileIO, start: int, out: memoryview, entry: Entry) -> None:
    """Read until `out` is full; other threads run meanwhile."""
    while out:
        try:
            got = os.preadv(file.fileno(), [out], start)
        except OSError as e:
            raise CheckpointError(f"{entry.path}: tensor {entry.name!r} cannot be read: {e.strerror}") from None
        if not got:
            raise CheckpointError(f"{entry.path}: truncated while it was read, in tensor {entry.name!r}; {_AGAIN}")
        out, start = out[got:], start + got
