"""How weights are stored, and the bytes that a matrix takes then.

Experts and the decoder's other linear layers may be quantised; embedding, head, norms, ViT and resampler stay in the
plain type, routers in float32. `wint4` is FastDeploy's: experts in 4 bits, the other linear layers in 8. Scales are
float32: one per output row for integers, one per block of 128 x 128 for fp8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.quantization import METHODS

Kind = Literal["linear", "expert", "plain", "float32"]
"""What a matrix is to a format."""

_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Bits per number of each kind of matrix."""

    name: str
    plain_bits: int
    linear_bits: int
    expert_bits: int
    block: tuple[int, int] | None = None
    """(rows, columns) that share a scale, 0 = all columns; None = no scales."""

    @property
    def plain_bytes(self) -> int:
        """Bytes per number of what is not quantised, activations among it."""
        return self.plain_bits // 8

    @property
    def is_quantised(self) -> bool:
        return self.block is not None

    @property
    def is_fp8(self) -> bool:
        """Served on some GPUs only."""
        return self.name == "fp8"

    def num_bytes(self, kind: Kind, rows: int, columns: int) -> int:
        """Values of one matrix, rows rounded up to whole bytes. wint4, expert of 1536 x 2560: 1,966,080."""
        bits = {"linear": self.linear_bits, "expert": self.expert_bits, "plain": self.plain_bits, "float32": 32}[kind]
        return rows * (-(-columns * bits // 8))

    def scale_bytes(self, kind: Kind, rows: int, columns: int) -> int:
        """Its scales. fp8, 1536 x 2560: 12 x 20 blocks, 960 bytes."""
        if self.block is None or kind not in ("linear", "expert"):
            return 0
        block_rows, block_columns = self.block[0], self.block[1] or columns
        return -(-rows // block_rows) * (-(-columns // max(block_columns, 1))) * _SCALE_BYTES


FORMATS: Mapping[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat("float32", 32, 32, 32),
        WeightFormat("bfloat16", 16, 16, 16),
        *(WeightFormat(m.name, 16, m.linear_bits, m.expert_bits, m.block) for m in METHODS.values()),
    )
}
"""By name, most bytes first."""
