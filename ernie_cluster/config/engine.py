"""What an engine is allowed to hold and to use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.checks import check_positive, check_range
from ernie_cluster.config.emulate import EmulateConfig
from ernie_cluster.config.units import MIB
from ernie_cluster.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]

GPU_BLOCK_TOKENS = 256
"""KV blocks on a GPU are a multiple of so many tokens: the pages that torch's paged attention takes."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: the same for all replicas of a model. Sizes are per rank."""

    block_size: int = 16
    """Tokens per KV block, at least 1; a multiple of 256 where a pool that computes in bfloat16 has GPUs."""
    kv_cache_bytes: int = 256 * MIB
    """Bytes of KV cache per rank, at least 1; what does not fill a block is not used."""
    max_batch_tokens: int = 2048
    """Tokens per step, prefill chunks included; at least `max_num_seqs`, as each running sequence takes one."""
    max_num_seqs: int = 64
    """Sequences that run at the same time, at least 1."""
    enable_prefix_cache: bool = True
    """Keep full blocks of finished prompts and share them with prompts that begin alike."""
    host_cache_bytes: int = 0
    """Host memory per rank, beside its KV cache, for blocks of prompts that the cache has no room for any more: a prompt
    that begins with them copies them back instead of computing them. That helps where copying is faster, as it is between
    a GPU and pinned memory, and prompts come back. 0 = none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and KV; auto is the checkpoint's own."""
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Of K and V: int8 or fp8 (e4m3) take half of bfloat16's room, with a scale for each token and head; auto is `dtype`."""
    device: Device = "auto"
    """auto: cuda where the replica was given a GPU, else cpu."""
    num_threads: int = 0
    """CPU threads per rank; 0 = as many as the cores that the replica was given."""
    cuda_graphs: bool = True
    """Record decode steps as CUDA graphs, which takes seconds at the start; on GPUs only, in bfloat16, with dp = 1."""
    kv_placement: Literal["auto", "shared", "split"] = "auto"
    """Where `tp` ranks hold KV: shared = one memory with all heads, on the CPU of one host; split = each rank its own
    heads; auto = split on GPUs, else shared."""
    max_model_len: int | None = None
    """Most tokens of one sequence, prompt and output together, at least 2; None = the model's own bound."""
    step_timeout_s: float = 120.0
    """A step that takes longer hangs, or the encoding of a picture: its rank, a collective that waits for a stuck one, a driver.
    Then the requests there go on elsewhere, and the replica is replaced. Far above any that ends."""
    poison_freed_blocks: bool = False
    """For tests and debugging: overwrite KV blocks that nobody holds with NaN, on every rank, and stop an engine whose logits
    are NaN; so a block that is read after it was freed shows. Costs a write of each block when it is freed and one when it
    is handed out."""
    emulate: EmulateConfig | None = None
    """Make steps last as long as on hardware that is not here, to rehearse with a small model; None = as fast as they are."""

    def threads(self, num_cpus: float) -> int:
        """CPU threads of a rank that was given `num_cpus` cores."""
        return self.num_threads or max(1, int(num_cpus))

    def dtype_of(self, checkpoint_dtype: str) -> str:
        """Type of weights that are not quantised, and of activations, for a checkpoint stored as `checkpoint_dtype`."""
        return checkpoint_dtype if self.dtype == "auto" else self.dtype

    def kv_dtype_of(self, checkpoint_dtype: str) -> str:
        """Type of KV, as `KVLayout.from_model` takes it."""
        return self.dtype_of(checkpoint_dtype) if self.kv_dtype == "auto" else self.kv_dtype

    def __post_init__(self) -> None:
        check_range(self, 1, "block_size", "kv_cache_bytes", "max_batch_tokens", "max_num_seqs")
        check_range(self, 0, "num_threads", "host_cache_bytes")
        check_range(self, 2, "max_model_len")
        check_positive(self, "step_timeout_s")
        if self.host_cache_bytes and not self.enable_prefix_cache:
            raise ConfigError(
                f"host_cache_bytes = {self.host_cache_bytes} with enable_prefix_cache = false: nothing would be kept there; "
                "set host_cache_bytes to 0 or enable_prefix_cache to true"
            )
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens = {self.max_batch_tokens} must be at least max_num_seqs = {self.max_num_seqs}: "
                "each running sequence takes one token of every step"
            )
