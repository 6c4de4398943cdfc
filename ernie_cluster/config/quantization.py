"""In how many bits the decoder's matrices are held: the methods, and what a checkpoint says of itself.

    wint8   experts and the other linear layers in 8 bits
    wint4   experts in 4 bits, the other linear layers in 8
    fp8     both in e4m3 floats, by blocks of 128 x 128

These are the ERNIE family's own recipes: weight-only, symmetric. Embedding, head, norms, ViT and resampler stay in the
model's type, routers in float32. Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ernie_cluster.errors import ConfigError

Quantization = Literal["none", "wint8", "wint4", "fp8"]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to hold weights."""

    name: Quantization
    linear_bits: int
    """Of a number of attention, dense MLPs and shared experts."""
    expert_bits: int
    block: tuple[int, int]
    """(rows, columns) that share a scale, 0 = all columns. Rows are outputs."""

    @property
    def is_fp8(self) -> bool:
        return self.name == "fp8"


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("wint8", 8, 8, (1, 0)),
        Method("fp8", 8, 8, (128, 128)),
        Method("wint4", 8, 4, (1, 0)),
    )
}
"""All but none, by name, most bytes first."""

FIRST_WITH_FP8 = (9, 0)
"""Compute capability of Hopper, the first that `fp8` runs on."""

_OURS = "ernie_cluster"


def quantization_entry(method: Method) -> dict[str, Any]:
    """`quantization_config` of a config.json whose weights are stored by a method."""
    return {"quant_method": _OURS, "format": method.name, "block": list(method.block)}


def stored_quantization(raw: Mapping[str, Any]) -> Quantization:
    """How the weights beside a config.json are stored; raises ConfigError for a form that is not read here."""
    entry = raw.get("quantization_config") or raw.get("quantization")
    if not entry:
        return "none"
    maker, name = (entry.get("quant_method"), entry.get("format")) if isinstance(entry, Mapping) else (entry, None)
    if maker != _OURS or name not in METHODS or entry != quantization_entry(METHODS[str(name)]):
        raise ConfigError(
            f"quantization_config {entry!r} is not read here; use the checkpoint in bfloat16, and quantization: "
            f"{', '.join(METHODS)} or `ernie-cluster quantize`"
        )
    return METHODS[str(name)].name


def choose_method(wish: Quantization | Literal["auto"], stored: Quantization) -> Method | None:
    """The method of a model's weights, None for plain ones.

    Args:
        wish: of the configuration; auto is the checkpoint's own.
        stored: of the checkpoint.

    Raises:
        ConfigError: the checkpoint is quantised, and not so.
    """
    if stored != "none" and wish not in ("auto", stored):
        raise ConfigError(
            f"quantization = {wish}, but the checkpoint is stored as {stored}: remove the key, or name the checkpoint "
            "that it was made from"
        )
    return METHODS.get(stored if wish == "auto" else wish)
