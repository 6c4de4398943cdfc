"""By what the vision encoder of a checkpoint is known: its weights, wherever the folder lies and whatever it is called.

Read with the standard library alone, from the headers of the safetensors files and samples of their tensors, so that
it takes a moment even for the largest model. Knows no tensor type.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ernie_cluster.errors import CheckpointError

_PARTS = ("vision_model.", "resampler_model.")
"""In the names of ViT and resampler."""
_MAX_HEADER_BYTES = 100_000_000  # as safetensors itself
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 1024


def encoder_id(folder: str | Path) -> str:
    """SHA-256 over names, types, shapes and samples of all tensors of ViT and resampler, in hexadecimal digits.

    Training changes all of a tensor, so samples tell: 16 pieces of 1 KiB, evenly spread.

    Raises:
        CheckpointError: no such tensors, or a file that cannot be read.
    """
    lines: list[str] = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                lines += _tensors(file)
        except (OSError, ValueError, LookupError, TypeError, struct.error) as e:
            raise CheckpointError(f"{path}: broken or truncated ({e}); download it again") from None
    if not lines:
        raise CheckpointError(f"{folder}: no *.safetensors file holds a vision encoder; name a checkpoint that sees")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _tensors(file: BinaryIO) -> Iterator[str]:
    """A line per tensor of the encoder."""
    (header_bytes,) = struct.unpack("<Q", file.read(8))
    if header_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {header_bytes} bytes")
    header = json.loads(file.read(header_bytes))
    for name, about in header.items():
        if any(part in name for part in _PARTS):
            start, end = about["data_offsets"]
            digest = hashlib.sha256(b"".join(_samples(file, 8 + header_bytes + start, end - start)))
            # transformers writes the vision tower under `model.`
            yield f"{name.removeprefix('model.')} {about['dtype']} {about['shape']} {digest.hexdigest()}"


def _samples(file: BinaryIO, start: int, num_bytes: int) -> Iterator[bytes]:
    size = min(_SAMPLE_BYTES, num_bytes)
    for at in sorted({(num_bytes - size) * i // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES)}):
        file.seek(start + at)
        sample = file.read(size)
        if len(sample) < size:
            raise ValueError("it ends too early")
        yield sample
