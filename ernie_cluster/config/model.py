"""Shape of a model, read from the checkpoint's own config.json.

Four forms are understood: flat `ernie4_5_moe_vl` (remote code), nested `ernie4_5_vl_moe` (transformers), and the
text-only `ernie4_5` and `ernie4_5_moe`. Defaults for absent keys are those of transformers 5.23
`models/ernie4_5*/configuration_*.py`. Knows no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ernie_cluster.config.quantization import Quantization, stored_quantization
from ernie_cluster.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class ExpertPool:
    """The experts of one modality."""

    num_experts: int
    intermediate_size: int
    """Width of one expert."""
    top_k: int


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of a dense layer's MLP."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """Rotary frequencies for height, width, time; sums to head_dim / 2. All-text models: any split gives the same."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    use_bias: bool
    sparse_layers: frozenset[int]
    """Layers with experts; the others have one dense MLP."""
    text_experts: ExpertPool | None
    vision_experts: ExpertPool | None
    """None in text-only models."""
    shared_intermediate_size: int
    """Width of the always-on MLP beside the experts; 0 when there is none."""
    norm_min: float
    """Lower bound of the sum by which expert weights are renormalised."""
    router_is_transposed: bool
    """Router weights are stored [hidden, experts] (VL models) instead of [experts, hidden]."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if sum(self.mrope_section) * 2 != self.head_dim:
            raise ConfigError(
                f"mrope_section {list(self.mrope_section)} sums to {sum(self.mrope_section)}, not to head_dim / 2 = {self.head_dim // 2}"
            )
        if self.mrope_section[0] != self.mrope_section[1]:
            raise ConfigError(
                f"mrope_section {list(self.mrope_section)}: height and width alternate, so their counts must be equal"
            )


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """ViT and resampler."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    in_channels: int
    spatial_merge_size: int
    temporal_merge_size: int
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers per patch: channels x height x width."""
        return self.in_channels * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of a spatially merged block, the resampler's width."""
        return self.hidden_size * self.spatial_merge_size**2


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Special tokens of a vision-language model."""

    image_patch: int
    video_patch: int
    """The same as `image_patch` in the original checkpoints; transformers-native ones have their own."""
    image_start: int
    image_end: int
    video_start: int
    video_end: int

    @property
    def vision_pool(self) -> frozenset[int]:
        """Prompt tokens that the vision experts work on: patches, and the START and END around them."""
        return frozenset(
            (self.image_patch, self.video_patch, self.image_start, self.image_end, self.video_start, self.video_end)
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model of the family."""

    text: TextConfig
    vision: VisionConfig | None
    """None in text-only models."""
    token_ids: TokenIds | None
    dtype: str
    """Storage type of the weights: "bfloat16" or "float32". The router is float32 always."""
    quantization: Quantization = "none"
    """How the decoder's matrices are stored, of which `dtype` says nothing then."""

    @property
    def is_multimodal(self) -> bool:
        return self.vision is not None

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` of a checkpoint folder.

        Raises:
            CheckpointError: no such file, not JSON, not of this family, or a key is missing.
        """
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: not found; `model` must name a folder with config.json and *.safetensors"
            ) from None
        except ValueError as e:
            raise CheckpointError(f"{path}: not valid JSON: {e}") from None
        try:
            return cls.from_dict(raw)
        except KeyError as e:
            raise CheckpointError(f"{path}: key {e.args[0]!r} is missing") from None
        except (TypeError, ValueError, AttributeError) as e:
            raise CheckpointError(f"{path}: a value is of the wrong kind: {e}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from the content of config.json; raises ConfigError when the model is not of this family."""
        kind = raw.get("model_type")
        reader = {
            "ernie4_5_moe_vl": _flat_vl,
            "ernie4_5_vl_moe": _nested_vl,
            "ernie4_5_moe": _text_moe,
            "ernie4_5": _text_dense,
        }.get(str(kind))
        if reader is None:
            raise ConfigError(
                f"model_type {kind!r} is not served here; known: ernie4_5_moe_vl, ernie4_5_vl_moe, ernie4_5_moe, ernie4_5"
            )
        return replace(reader(raw), quantization=stored_quantization(raw))


def _pair(value: Any) -> tuple[int, int]:
    """(text, vision) of a key that holds one number for both or a list of two."""
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[-1])
    return int(value), int(value)


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype {name!r} is not supported; use bfloat16 or float32")
    return name


def _rope_theta(raw: Mapping[str, Any]) -> float:
    return float((raw.get("rope_parameters") or {}).get("rope_theta") or raw.get("rope_theta") or 500000.0)


def _head_dim(raw: Mapping[str, Any]) -> int:
    return int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])


def _mrope_section(raw: Mapping[str, Any], head_dim: int) -> tuple[int, int, int]:
    for key in ("rope_parameters", "rope_scaling"):
        section = (raw.get(key) or {}).get("mrope_section")
        if section:
            return int(section[0]), int(section[1]), int(section[2])
    time = int(raw.get("freq_allocation") or (20 if head_dim == 128 else 0))
    side = (head_dim // 2 - time) // 2
    return side, side, head_dim // 2 - 2 * side


def _sparse_layers(raw: Mapping[str, Any]) -> frozenset[int]:
    num_layers = int(raw["num_hidden_layers"])
    kinds = raw.get("mlp_layer_types")
    if kinds:
        return frozenset(i for i, kind in enumerate(kinds) if kind == "sparse")
    start = min(_pair(raw.get("moe_layer_start_index", 1)))
    end_value = raw.get("moe_layer_end_index", -1)
    end = max(_pair(end_value if end_value not in (None, -1) else num_layers - 1))
    interval = int(raw.get("moe_layer_interval", 1))
    return frozenset(i for i in range(num_layers) if (i + 1) % interval == 0 and start <= i <= end)


def _text(raw: Mapping[str, Any], *, has_experts: bool, has_vision: bool, router_is_transposed: bool) -> TextConfig:
    head_dim = _head_dim(raw)
    text_experts = vision_experts = None
    shared = 0
    if has_experts:
        count, width = _pair(raw.get("moe_num_experts", 64)), _pair(raw.get("moe_intermediate_size", (1536, 512)))
        top_k = int(raw.get("moe_k", 6))
        text_experts = ExpertPool(count[0], width[0], top_k)
        vision_experts = ExpertPool(count[1], width[1], top_k) if has_vision else None
        shared = width[0] * int(raw.get("moe_num_shared_experts", 2) or 0)
    return TextConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=int(raw["num_attention_heads"]),
        num_kv_heads=int(raw.get("num_key_value_heads") or raw["num_attention_heads"]),
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
        rope_theta=_rope_theta(raw),
        mrope_section=_mrope_section(raw, head_dim),
        max_position_embeddings=int(raw.get("max_position_embeddings", 131072)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", True)),
        use_bias=bool(raw.get("use_bias", False)),
        sparse_layers=_sparse_layers(raw) if has_experts else frozenset(),
        text_experts=text_experts,
        vision_experts=vision_experts,
        shared_intermediate_size=shared,
        norm_min=float(raw.get("moe_norm_min", 1e-12)),
        router_is_transposed=router_is_transposed,
    )


def _vision(raw: Mapping[str, Any], spatial: int, temporal: int) -> VisionConfig:
    hidden = int(raw.get("hidden_size") or raw.get("embed_dim") or 1280)
    return VisionConfig(
        depth=int(raw.get("depth", 32)),
        hidden_size=hidden,
        intermediate_size=int(raw.get("intermediate_size") or hidden * raw.get("mlp_ratio", 4)),
        num_heads=int(raw.get("num_heads", 16)),
        patch_size=int(raw.get("patch_size", 14)),
        in_channels=int(raw.get("in_channels") or raw.get("in_chans") or 3),
        spatial_merge_size=spatial,
        temporal_merge_size=temporal,
        layer_norm_eps=1e-6,
    )


def _flat_vl(raw: Mapping[str, Any]) -> ModelConfig:
    patch = int(raw["im_patch_id"])
    return ModelConfig(
        text=_text(raw, has_experts=True, has_vision=True, router_is_transposed=True),
        vision=_vision(
            raw["vision_config"], int(raw.get("spatial_conv_size", 2)), int(raw.get("temporal_conv_size", 2))
        ),
        token_ids=TokenIds(
            image_patch=patch,
            video_patch=patch,
            image_start=int(raw.get("image_start_token_id", 101304)),
            image_end=int(raw.get("image_end_token_id", 101305)),
            video_start=int(raw.get("video_start_token_id", 101306)),
            video_end=int(raw.get("video_end_token_id", 101307)),
        ),
        dtype=_dtype(raw),
    )


def _nested_vl(raw: Mapping[str, Any]) -> ModelConfig:
    text, vision = dict(raw["text_config"]), raw["vision_config"]
    text.setdefault("tie_word_embeddings", raw.get("tie_word_embeddings", True))
    if not text.get("mlp_layer_types"):  # this form's own default: only layer 0 is dense
        text["mlp_layer_types"] = ["dense"] + ["sparse"] * (int(text["num_hidden_layers"]) - 1)
    return ModelConfig(
        text=_text(text, has_experts=True, has_vision=True, router_is_transposed=True),
        vision=_vision(vision, int(vision.get("spatial_merge_size", 2)), int(vision.get("temporal_merge_size", 2))),
        token_ids=TokenIds(
            image_patch=int(raw.get("image_token_id", 100295)),
            video_patch=int(raw.get("video_token_id", 103367)),
            image_start=int(raw.get("image_start_token_id", 101304)),
            image_end=int(raw.get("image_end_token_id", 101305)),
            video_start=int(raw.get("video_start_token_id", 101306)),
            video_end=int(raw.get("video_end_token_id", 101307)),
        ),
        dtype=_dtype(raw),
    )


def _text_moe(raw: Mapping[str, Any]) -> ModelConfig:
    text = _text(raw, has_experts=True, has_vision=False, router_is_transposed=False)
    return ModelConfig(text=text, vision=None, token_ids=None, dtype=_dtype(raw))


def _text_dense(raw: Mapping[str, Any]) -> ModelConfig:
    # this form's own default, where head_dim * heads is not hidden_size: 128 * 16 beside 1024 in the 0.3B
    text = _text({"head_dim": 128, **raw}, has_experts=False, has_vision=False, router_is_transposed=False)
    return ModelConfig(text=text, vision=None, token_ids=None, dtype=_dtype(raw))
