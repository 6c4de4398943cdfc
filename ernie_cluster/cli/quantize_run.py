"""From a checkpoint to one with its decoder's matrices in 8 or 4 bits.

What it writes is, bit for bit, what loading the plain checkpoint with the same `quantization` holds. Tensors are read and
quantised one by one, so memory holds a file of the result and one tensor.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ernie_cluster.cli.hub import FILES
from ernie_cluster.cli.progress import Bar
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.quantization import Method, quantization_entry
from ernie_cluster.config.units import GIB, MIB
from ernie_cluster.errors import CheckpointError, ConfigError
from ernie_cluster.model.build import build_decoder, torch_dtype
from ernie_cluster.model.checkpoint import INDEX, Checkpoint
from ernie_cluster.model.fill import check, quantised_weights, scales_name
from ernie_cluster.model.quant import Codec
from ernie_cluster.model.weights import check_names, decoder_copies, vision_copies

FILE_BYTES = 4 * GIB
"""Most tensor bytes in one file of the result; a larger tensor has one to itself."""

_RUN_BYTES = 64 * MIB
"""Of a tensor, that are quantised at once: the arithmetic takes several times as much."""


def quantise(folder: Path, out: Path, method: Method, *, file_bytes: int = FILE_BYTES) -> tuple[int, int]:
    """Write `folder` quantised to `out`, which appears when it is whole.

    Returns:
        Bytes of all tensors before and after.

    Raises:
        CheckpointError: `folder` is no checkpoint of this family, or damaged; or `out` cannot be written.
        ConfigError: `folder` is quantised already, its sizes do not fit the method, or `out` is not empty.
    """
    check_out(out)
    config = ModelConfig.from_folder(folder)
    if config.quantization != "none":
        raise ConfigError(
            f"{folder}: its weights are {config.quantization} already; quantise the checkpoint that it was made from"
        )
    draft = out.with_name(f"{out.name}.part")
    with Checkpoint(folder) as checkpoint:
        codecs = _codecs(config, checkpoint, method)
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            writer = _Writer(draft, file_bytes)
            for name, tensor in _quantised(checkpoint, codecs):
                writer.add(name, tensor)
            writer.close()
            _write_rest(folder, draft, method)
            draft.replace(out)
        except OSError as e:
            raise CheckpointError(f"{out}: cannot be written: {e.strerror or e}") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return checkpoint.bytes_read, writer.num_bytes


def check_out(out: Path) -> None:
    """Raise ConfigError unless nothing is there that would be lost."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; name a folder that is not there yet, or an empty one")


def _codecs(config: ModelConfig, checkpoint: Checkpoint, method: Method) -> dict[str, Codec]:
    """Of each tensor that is to be quantised; raises as `quantise` does before anything is read."""
    ParallelDims().check_blocks(config, method)
    meta, dtype = torch.device("meta"), torch_dtype(config.dtype)
    weights = quantised_weights(build_decoder(config, "mixed", dtype=dtype, device=meta, quantization=method.name))
    copies = list(decoder_copies(config, has_vision_experts=config.is_multimodal))
    check([*copies, *(vision_copies(config) if config.is_multimodal else ())], checkpoint)
    check_names(config, checkpoint)
    return {copy.source: weights[copy.parameter].codec for copy in copies if copy.parameter in weights}


def _quantised(checkpoint: Checkpoint, codecs: dict[str, Codec]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result, in the order in which the checkpoint's files hold them."""
    names = sorted(checkpoint.names, key=lambda name: (checkpoint.file_of(name), checkpoint.entry(name).start))
    bar = Bar("tensors", len(names))
    try:
        for name in names:
            numbers, codec = checkpoint.get(name), codecs.get(name)
            if codec is None:
                yield name, numbers
            else:
                codes, scales = _by_runs(numbers, codec)
                if not scales.isfinite().all():
                    raise CheckpointError(
                        f"{checkpoint.file_of(name)}: {name} holds numbers that are not finite, which no scale can hold"
                    )
                yield name, codes
                yield scales_name(name), scales
            bar.step()
    finally:
        bar.close()


def _by_runs(numbers: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """What `codec.quantise` gives, by way of less memory."""
    r = codec.block[0]
    step = max(1, _RUN_BYTES // (numbers.shape[1] * numbers.itemsize) // r) * r
    runs = (numbers[first : first + step] for first in range(0, len(numbers), step))
    codes, scales = zip(*map(codec.quantise, runs), strict=True)
    return torch.cat(codes), torch.cat(scales)


class _Writer:
    """Safetensors files of bounded size, and their index.

    Args:
        folder: empty.
        file_bytes: most tensor bytes of a file.
    """

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._tensors: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._tensors and sum(t.nbytes for t in self._tensors.values()) + tensor.nbytes > self._file_bytes:
            self._flush()
        self._tensors[name] = tensor
        self.num_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, the names that count the files, and the index."""
        self._flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, start=1):
            file = f"model-{number:05}-of-{len(self._files):05}.safetensors"
            self._draft(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")

    def _flush(self) -> None:
        self._files.append(list(self._tensors))
        save_file(self._tensors, self._draft(len(self._files)), metadata={"format": "pt"})
        self._tensors = {}

    def _draft(self, number: int) -> Path:
        return self._folder / f"{number}.part"


def _write_rest(folder: Path, out: Path, method: Method) -> None:
    """Tokenizer, template and settings as they are, and a config.json that says how the weights are stored."""
    for path in itertools.chain.from_iterable(folder.glob(pattern) for pattern in FILES):
        if path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
            shutil.copy(path, out / path.name)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"] = quantization_entry(method)
    (out / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
