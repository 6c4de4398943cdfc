"""One served model: its checkpoint, its pools and their engines."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.checks import check_positive, check_range, check_unique
from ernie_cluster.config.engine import GPU_BLOCK_TOKENS, EngineConfig
from ernie_cluster.config.pool import PoolConfig, Role
from ernie_cluster.config.quantization import Method, Quantization, choose_method
from ernie_cluster.config.scaling import Targets
from ernie_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelDeployment:
    """One served model.

    That a model with pictures has a vision pool can be checked only beside its checkpoint: see `check_media`.
    """

    name: str
    """What clients put into the field `model`; letters, digits and any of `. _ : / @ + -`."""
    path: str
    """Checkpoint folder with config.json, tokenizer and *.safetensors, the same on every node; or a repository of the
    Hugging Face hub as `owner/name` or `owner/name@revision`, which `serve` fetches into the hub's cache."""
    pools: tuple[PoolConfig, ...]
    """One per role: mixed, or prefill and decode, or all three; and vision where pictures are to be served."""
    engine: EngineConfig = EngineConfig()
    """The same for all pools."""
    quantization: Literal["auto", Quantization] = "auto"
    """How the decoder's matrices are held, in all pools alike: none, wint8, wint4 (experts in 4 bits, the rest in 8) or fp8
    (Hopper); auto = as the checkpoint stores them. A plain checkpoint is quantised while it is loaded."""
    switch_roles: bool = False
    """Whether its engine replicas may change between prefill, decode and mixed while they run, by the autoscaler or an
    operator. Decode replicas then load all experts, as the others do; the pools need not be alike, each replica keeps the
    ranks that it was started with."""
    targets: Targets = Targets()
    """What the autoscaler keeps replicas for."""
    floor: int = 1
    """Engine replicas (prefill, decode, mixed) that no other model and no lull may take, at least 0."""
    idle_to_zero_s: float | None = None
    """After this long without a request all replicas stop, where `floor` and every min_replicas are 0; the next request waits
    until they are back. None = never."""
    image_min_pixels: int | None = None
    """Smaller pictures are enlarged to this, at least 1; None = the checkpoint's preprocessor_config.json."""
    image_max_pixels: int | None = None
    """Larger pictures are shrunk to this, at least `image_min_pixels`; None = the checkpoint's own."""

    def deployment_name(self, role: Role) -> str:
        """Serve's name of a pool, in `serve status` and in the `deployments` of its file; no slash may be in it."""
        return f"{self.name}-{role}".replace("/", "_")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.:/@+-]+", self.name):
            raise ConfigError(f"name = {self.name!r} must be letters, digits or any of . _ : / @ + -")
        if not self.path:
            raise ConfigError("path is empty; name a checkpoint folder")
        self._check_pools()
        self._check_quantization()
        check_range(self, 0, "floor")
        if self.idle_to_zero_s is not None:
            check_positive(self, "idle_to_zero_s")
        check_range(self, 1, "image_min_pixels", "image_max_pixels")
        if self.image_min_pixels and self.image_max_pixels and self.image_max_pixels < self.image_min_pixels:
            raise ConfigError(
                f"image_max_pixels = {self.image_max_pixels} must be at least image_min_pixels = {self.image_min_pixels}"
            )

    def _check_pools(self) -> None:
        check_unique("pool role", [p.role for p in self.pools])
        roles = {p.role for p in self.pools}
        missing = {"prefill", "decode"} - roles
        if len(missing) == 1:
            lone = ({"prefill", "decode"} & roles).pop()
            raise ConfigError(f"pools of {self.name!r}: {lone} needs {missing.pop()} beside it; add it, or use mixed")
        if missing and "mixed" not in roles:
            raise ConfigError(f"pools of {self.name!r}: {sorted(roles)} cannot serve; add mixed, or prefill and decode")
        for pool in self.pools:
            if self.engine.device == "cuda" and not pool.num_gpus:
                raise ConfigError(
                    f"pools of {self.name!r}: {pool.role} has num_gpus = 0 but engine.device is cuda; "
                    "give it GPUs, or set device to auto"
                )
            self._check_blocks(pool)

    def _check_blocks(self, pool: PoolConfig) -> None:
        has_gpu = pool.num_gpus > 0 and self.engine.device != "cpu" and self.engine.dtype != "float32"
        if has_gpu and pool.role != "vision" and self.engine.block_size % GPU_BLOCK_TOKENS:
            raise ConfigError(
                f"engine.block_size = {self.engine.block_size} of {self.name!r}: {pool.role} has GPUs, whose attention takes "
                f"blocks of a multiple of {GPU_BLOCK_TOKENS} tokens; set it to {GPU_BLOCK_TOKENS}"
            )

    def _check_quantization(self) -> None:
        """One for all pools. KV and tokens of one pool are continued by another; with other weights there, an answer would
        depend on which replicas took part in it, and one that goes on after a failure would change."""
        for pool in self.pools:
            if pool.quantization not in ("auto", self.quantization):
                raise ConfigError(
                    f"pools of {self.name!r}: {pool.role} has quantization = {pool.quantization}, the model has "
                    f"{self.quantization}; KV that one pool computes is continued by another, so all pools need the same "
                    "weights: set quantization on the model, or serve it under two names"
                )

    def pool(self, role: Role) -> PoolConfig | None:
        """The pool of this role, or None."""
        return next((p for p in self.pools if p.role == role), None)

    def method(self, stored: Quantization) -> Method | None:
        """How its weights are held, None for plain ones, beside a checkpoint that is stored so.

        Raises:
            ConfigError: the two differ, or a pool runs where the method does not.
        """
        try:
            method = choose_method(self.quantization, stored)
        except ConfigError as e:
            raise ConfigError(f"model {self.name!r}: {e}") from None
        on_cpu = [p.role for p in self.pools if p.role != "vision" and (not p.num_gpus or self.engine.device == "cpu")]
        if method is not None and method.is_fp8 and on_cpu:
            raise ConfigError(
                f"model {self.name!r}: quantization = fp8 needs Hopper GPUs or newer ones, and pool {on_cpu[0]} runs on CPU; "
                "use wint8 or wint4"
            )
        return method

    def check_media(self, *, is_multimodal: bool) -> None:
        """Hold the pools against the checkpoint.

        Raises:
            ConfigError: a vision pool for a model without eyes. (A multimodal model without one serves text only.)
        """
        if self.pool("vision") and not is_multimodal:
            raise ConfigError(
                f"pools of {self.name!r}: the checkpoint {self.path} is text-only; remove the vision pool"
            )

    def missing(self, roles: Collection[Role]) -> list[Role]:
        """What it lacks to serve everything that it could, where replicas of these roles are ready."""
        missing: list[Role] = ["vision"] if self.has_vision_pool and "vision" not in roles else []
        if "mixed" not in roles:
            homes = {p.role for p in self.pools}
            needed: tuple[Role, ...] = ("prefill", "decode") if "prefill" in homes else ("mixed",)
            missing += [r for r in needed if r not in roles]
        return missing

    @property
    def version(self) -> str:
        """The same for replicas that may continue each other's KV and answers: of the same weights, in the same form."""
        engine = self.engine
        form = (self.path, self.quantization, engine.block_size, engine.dtype, engine.kv_dtype)
        return hashlib.sha256(repr(form).encode()).hexdigest()[:12]

    @property
    def has_vision_pool(self) -> bool:
        """Whether pictures can be served."""
        return self.pool("vision") is not None
