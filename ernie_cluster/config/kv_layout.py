"""Shape and bytes of one KV block on one rank, derived from model x tensor parallelism.

Prefill and decode compare their layouts before the first hand-over. Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.errors import ConfigError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "fp8": 1}
"""Bytes per number of the types that a KV cache may have."""

SCALE_BYTES = {"int8": 2, "fp8": 2}
"""Bytes of the scale that the numbers of one token and head share, a bfloat16 behind them, by type that has one."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One rank's KV cache: `num_layers` x blocks of `block_size` tokens x K and V x heads x head_dim.

    ERNIE-4.5-VL-28B in bfloat16 has 28 layers and 4 KV heads of 128: 57,344 bytes per token at tp = 1.
    """

    num_layers: int
    num_kv_heads: int
    """KV heads on this rank."""
    head_dim: int
    """Numbers per token and head; where they have a scale, with its bytes."""
    block_size: int
    """Tokens per block."""
    dtype_bytes: int
    """Bytes per number."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"KV layout: {field.name} = {getattr(self, field.name)}; it must be at least 1")

    @property
    def block_bytes_per_layer(self) -> int:
        """K and V of one block in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.block_size * self.dtype_bytes

    @property
    def block_bytes(self) -> int:
        """K and V of one block in all layers."""
        return self.num_layers * self.block_bytes_per_layer

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token in all layers."""
        return self.block_bytes // self.block_size

    def num_tokens(self, cache_bytes: int) -> int:
        """Most tokens of one sequence in a cache of this size, whose first block no sequence gets; 0 if there is none."""
        return max(0, cache_bytes // self.block_bytes - 1) * self.block_size

    @classmethod
    def of_cache(cls, shape: Sequence[int], dtype_bytes: int) -> KVLayout:
        """Layout of a cache [layers, 2, num_blocks, block_size, kv_heads, head_dim]."""
        num_layers, _, _, block_size, num_kv_heads, head_dim = shape
        return cls(num_layers, num_kv_heads, head_dim, block_size, dtype_bytes)

    @classmethod
    def from_model(cls, model: ModelConfig, block_size: int, dtype: str, tp: int = 1) -> KVLayout:
        """Layout on each of `tp` ranks.

        Args:
            block_size: tokens per block.
            dtype: a key of `DTYPE_BYTES`.
            tp: ranks that share the heads; above `num_kv_heads` each head is held by several ranks.

        Raises:
            ConfigError: unknown dtype, or neither of `tp` and `num_kv_heads` divides the other.
        """
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"KV dtype {dtype!r} is not supported; use one of {', '.join(DTYPE_BYTES)}")
        return cls(
            num_layers=model.text.num_layers,
            num_kv_heads=len(kv_heads_of_rank(model.text.num_kv_heads, tp, tp_rank=0)),
            head_dim=model.text.head_dim + SCALE_BYTES.get(dtype, 0) // DTYPE_BYTES[dtype],
            block_size=block_size,
            dtype_bytes=DTYPE_BYTES[dtype],
        )


def kv_heads_of_rank(num_kv_heads: int, tp: int, tp_rank: int) -> range:
    """KV heads that a tensor-parallel rank holds: an equal run, or one head shared by neighbouring ranks.

    4 heads: tp 2 gives [0, 1] and [2, 3]; tp 8 gives head 0 to ranks 0 and 1, head 1 to ranks 2 and 3, ...

    Raises:
        ConfigError: neither of `tp` and `num_kv_heads` divides the other.
    """
    if tp < 1 or (num_kv_heads % tp and tp % num_kv_heads):
        raise ConfigError(
            f"tp = {tp} with {num_kv_heads} KV heads: one must divide the other, so that every rank holds whole heads"
        )
    assert 0 <= tp_rank < tp
    heads = max(1, num_kv_heads // tp)
    first = tp_rank * num_kv_heads // tp
    return range(first, first + heads)
