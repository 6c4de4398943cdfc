"""Checkpoint tensors -> parameters, read lazily and straight to their place.

The names are the hub's. A `Copy` says which slice of which parameter takes which tensor, so the whole plan can be
checked before a byte is read. Only the tensors of a replica's role are opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ernie_cluster.config.model import ExpertPool, ModelConfig, TextConfig
from ernie_cluster.errors import CheckpointError
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.vision import VisionEncoder


@dataclass(frozen=True, slots=True)
class Copy:
    """One checkpoint tensor and where it goes."""

    source: str
    """Name in the checkpoint."""
    parameter: str
    """Name in the module."""
    index: tuple[int | slice, ...] = ()
    """Part of the parameter that it fills; () is all of it."""
    is_transposed: bool = False
    """The checkpoint holds the transpose."""


class Checkpoint:
    """A folder of safetensors files; a tensor is read when it is asked for.

    Raises:
        CheckpointError: no safetensors, a broken index, a missing tensor, a truncated file; named each time.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as e:
                raise CheckpointError(f"{index}: not a safetensors index: {e}") from None
            self._files = weight_map
        else:
            files = sorted(self.folder.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{self.folder}: no *.safetensors files; download the checkpoint again")
            self._files = {}
            for file in files:
                with self._open(file.name) as handle:
                    self._files.update(dict.fromkeys(handle.keys(), file.name))
        # transformers writes the vision tower under `model.`
        self._files.update(
            {
                name.removeprefix("model."): file
                for name, file in self._files.items()
                if name.startswith("model.vision_model.")
            }
        )
        self._handles: dict[str, safe_open] = {}
        self.bytes_read = 0

    def _open(self, file: str) -> safe_open:
        path = self.folder / file
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: named by the index but not there; download the checkpoint again") from None
        except SafetensorError as e:
            raise CheckpointError(f"{path}: broken or truncated: {e}; download it again") from None

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> Tensor:
        """One tensor, on CPU."""
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing; is this a checkpoint of another model?")
        if file not in self._handles:
            self._handles[file] = self._open(file)
        handle = self._handles[file]
        try:
            tensor: Tensor = handle.get_tensor(name)  # type: ignore[no-untyped-call]
        except SafetensorError:
            prefixed = f"model.{name}"
            try:
                tensor = handle.get_tensor(prefixed)  # type: ignore[no-untyped-call]
            except SafetensorError as e:
                raise CheckpointError(f"{self.folder / file}: tensor {name!r} cannot be read: {e}") from None
        self.bytes_read += tensor.nbytes
        return tensor

    def close(self) -> None:
        self._handles.clear()


def decoder_copies(config: ModelConfig, *, has_vision_experts: bool) -> Iterator[Copy]:
    """Where every tensor of the decoder goes."""
    text = config.text
    yield Copy("model.embed_tokens.weight", "embed")
    yield Copy("model.norm.weight", "norm")
    if not text.tie_word_embeddings:
        yield Copy("lm_head.weight", "head")
    for i in range(text.num_layers):
        source, target = f"model.layers.{i}", f"layers.{i}"
        yield Copy(f"{source}.input_layernorm.weight", f"{target}.input_norm")
        yield Copy(f"{source}.post_attention_layernorm.weight", f"{target}.post_attention_norm")
        yield from _attention(text, f"{source}.self_attn", f"{target}.attention")
        if i in text.sparse_layers:
            yield from _sparse(text, f"{source}.mlp", f"{target}.mlp", has_vision_experts)
        else:
            yield from _gated(f"{source}.mlp", f"{target}.mlp", text.intermediate_size)


def _attention(text: TextConfig, source: str, target: str) -> Iterator[Copy]:
    start = 0
    for name, heads in (("q", text.num_heads), ("k", text.num_kv_heads), ("v", text.num_kv_heads)):
        end = start + heads * text.head_dim
        yield Copy(f"{source}.{name}_proj.weight", f"{target}.qkv", (slice(start, end),))
        start = end
    yield Copy(f"{source}.o_proj.weight", f"{target}.out")


def _gated(source: str, target: str, width: int, index: tuple[int, ...] = ()) -> Iterator[Copy]:
    yield Copy(f"{source}.gate_proj.weight", f"{target}.gate_up", (*index, slice(0, width)))
    yield Copy(f"{source}.up_proj.weight", f"{target}.gate_up", (*index, slice(width, 2 * width)))
    yield Copy(f"{source}.down_proj.weight", f"{target}.down", index)


def _sparse(text: TextConfig, source: str, target: str, has_vision_experts: bool) -> Iterator[Copy]:
    pools: list[ExpertPool] = [p for p in (text.text_experts, text.vision_experts) if p is not None]
    bias = f"{source}.moe_statics.e_score_correction_bias"
    # the checkpoint's bias has a row per modality that the model knows, whatever this replica holds
    for number, pool in enumerate(pools[: 2 if has_vision_experts else 1]):
        first = number * pools[0].num_experts
        rows = slice(first, first + pool.num_experts)
        gate = f"{source}.gate.weight" + ("" if number == 0 else f"_{number}")
        yield Copy(gate, f"{target}.router.weight", (rows,), is_transposed=text.router_is_transposed)
        for e in range(pool.num_experts):
            expert = f"{source}.experts.{first + e}"
            yield from _gated(expert, f"{target}.pools.{number}", pool.intermediate_size, (e,))
    yield Copy(bias, f"{target}.router.bias")
    if text.shared_intermediate_size:
        yield from _gated(f"{source}.shared_experts", f"{target}.shared", text.shared_intermediate_size)


def vision_copies(config: ModelConfig) -> Iterator[Copy]:
    """Where every tensor of ViT and resampler goes."""
    assert config.vision is not None
    yield Copy("vision_model.patch_embed.proj.weight", "tower.patch_embed")
    for i in range(config.vision.depth):
        source, target = f"vision_model.blocks.{i}", f"tower.blocks.{i}"
        for theirs, ours in (("norm1", "norm1"), ("norm2", "norm2"), ("attn.qkv", "qkv"), ("attn.proj", "proj"),
                             ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2")):  # fmt: skip
            yield from _biased(f"{source}.{theirs}", f"{target}.{ours}")
    yield from _biased("vision_model.ln", "tower.ln")
    for part in ("spatial", "temporal"):
        for number, ours in ((0, "fc1"), (2, "fc2"), (3, "ln")):
            yield from _biased(f"model.resampler_model.{part}_linear.{number}", f"resampler.{part}.{ours}")
    yield from _biased("model.resampler_model.mlp", "resampler.mlp")
    yield Copy("model.resampler_model.after_norm.weight", "resampler.after_norm")


def _biased(source: str, target: str) -> Iterator[Copy]:
    yield Copy(f"{source}.weight", f"{target}.weight")
    yield Copy(f"{source}.bias", f"{target}.bias")


def no_progress(done: int, total: int) -> None:
    """Nobody watches."""


def load(module: nn.Module, copies: list[Copy], checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
    """Fill `module` from `checkpoint`; `progress(done, total)` is called after each tensor.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the configuration says.
    """
    parameters = dict(module.named_parameters())
    for done, copy in enumerate(copies, start=1):
        target = parameters[copy.parameter].data[copy.index or ...]
        tensor = checkpoint.get(copy.source)
        if copy.is_transposed:
            tensor = tensor.T
        if copy.parameter.endswith("router.bias"):  # the text row alone on decode replicas
            tensor = tensor.reshape(-1, target.shape[-1])[: target.shape[0]]
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {copy.source} has shape {list(tensor.shape)}, config.json says {list(target.shape)}"
            )
        target.copy_(tensor)
        progress(done, len(copies))


def load_decoder(
    decoder: Decoder,
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    has_vision_experts: bool,
    progress: Callable[[int, int], None] = no_progress,
) -> None:
    """Fill a decoder; raises CheckpointError."""
    load(decoder, list(decoder_copies(config, has_vision_experts=has_vision_experts)), checkpoint, progress)


def load_vision(
    encoder: VisionEncoder,
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    progress: Callable[[int, int], None] = no_progress,
) -> None:
    """Fill ViT and resampler; raises CheckpointError."""
    load(encoder, list(vision_copies(config)), checkpoint, progress)


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Random weights of a sensible size, for benchmarks and tests without a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if name.endswith(("norm", "after_norm", "ln.weight", "norm1.weight", "norm2.weight")):
            p.fill_(1.0)
        elif name.endswith("bias"):
            p.zero_()
        else:
            scale = 1.0 if name == "embed" else p.shape[-1] ** -0.5
            p.uniform_(-scale * 3**0.5, scale * 3**0.5, generator=generator)
