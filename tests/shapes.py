"""config.json of the published models, as far as their shapes go, and of a small one with all their features."""

from __future__ import annotations

from typing import Any

VL_28B: dict[str, Any] = {
    "model_type": "ernie4_5_moe_vl", "vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288,
    "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    "rope_theta": 500000, "freq_allocation": 20, "tie_word_embeddings": True, "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512], "moe_k": 6, "moe_num_shared_experts": 2, "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28], "moe_layer_interval": 1, "im_patch_id": 100295, "dtype": "bfloat16",
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14},
}  # fmt: skip
VL_424B = VL_28B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 54, "num_attention_heads": 64,
    "num_key_value_heads": 8, "tie_word_embeddings": False, "moe_intermediate_size": [3584, 1536], "moe_k": 8,
    "moe_num_shared_experts": 0, "moe_layer_start_index": [3, 3], "moe_layer_end_index": [53, 53],
}  # fmt: skip
TEXT_03B: dict[str, Any] = {
    "model_type": "ernie4_5", "vocab_size": 103424, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
TEXT_21B: dict[str, Any] = {
    "model_type": "ernie4_5_moe", "vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288,
    "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "tie_word_embeddings": True,
    "moe_num_experts": 64, "moe_intermediate_size": 1536, "moe_k": 6, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}  # fmt: skip
TEXT_300B = TEXT_21B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 54, "num_attention_heads": 64,
    "num_key_value_heads": 8, "tie_word_embeddings": False, "moe_intermediate_size": 3584, "moe_k": 8,
    "moe_num_shared_experts": 0, "moe_layer_start_index": 3, "moe_layer_end_index": 53,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "model_type": "ernie4_5_moe_vl", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "freq_allocation": 2,
    "tie_word_embeddings": False, "moe_num_experts": [8, 8], "moe_intermediate_size": [8, 4], "moe_k": 2,
    "moe_num_shared_experts": 2, "im_patch_id": 30, "dtype": "bfloat16",
    "vision_config": {"depth": 1, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2},
}  # fmt: skip
