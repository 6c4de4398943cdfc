"""Shapes of the published models, for who has no checkpoint at hand: what their config.json say of sizes.

Source: transformers' defaults and Baidu's training configurations; the 424B's vision experts, head and dense layers were
found by its published number of parameters, which these sizes give exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_cluster.config.model import ModelConfig

_COMMON: dict[str, Any] = {"vocab_size": 103_424, "head_dim": 128, "tie_word_embeddings": True, "dtype": "bfloat16"}
_DENSE = _COMMON | {
    "model_type": "ernie4_5", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
    "num_attention_heads": 16, "num_key_value_heads": 2,
}  # fmt: skip
_SMALL = _COMMON | {
    "model_type": "ernie4_5_moe", "hidden_size": 2560, "intermediate_size": 12_288, "num_hidden_layers": 28,
    "num_attention_heads": 20, "num_key_value_heads": 4, "moe_num_experts": 64, "moe_intermediate_size": 1536, "moe_k": 6,
    "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
}  # fmt: skip
_LARGE = _COMMON | {
    "model_type": "ernie4_5_moe", "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 54,
    "num_attention_heads": 64, "num_key_value_heads": 8, "moe_num_experts": 64, "moe_intermediate_size": 3584, "moe_k": 8,
    "moe_num_shared_experts": 0, "moe_layer_start_index": 3, "tie_word_embeddings": False,
}  # fmt: skip
_VISION = {
    "model_type": "ernie4_5_moe_vl", "moe_num_experts": [64, 64], "im_patch_id": 100_295, "freq_allocation": 20,
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14},
}  # fmt: skip
_28B = ModelConfig.from_dict(_SMALL | _VISION | {"moe_intermediate_size": [1536, 512]})

PUBLISHED: Mapping[str, ModelConfig] = {
    "0.3b": ModelConfig.from_dict(_DENSE),
    "21b": ModelConfig.from_dict(_SMALL),
    "28b": _28B,
    "28b-thinking": _28B,
    "300b": ModelConfig.from_dict(_LARGE),
    "424b": ModelConfig.from_dict(_LARGE | _VISION | {"moe_intermediate_size": [3584, 1536]}),
}
"""By the short name that presets have, too. Without multi-token prediction, which is not served here."""
