"""All files of the checkpoint but its weights: shape, tokenizer, template, preprocessing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ernie_cluster.cli.tiny_tokenizer import tokenizer_config, train_tokenizer

VOCAB = 1024
MAX_POSITIONS = 4096
PATCH, MERGE = 14, 2
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 192, 5, 6, 2, 32
DENSE = 512
EXPERTS, TOP_K, EXPERT_WIDTHS, SHARED_EXPERTS = 8, 2, (128, 64), 2
MROPE_SECTION = (4, 4, 8)
VIT_DEPTH, VIT_WIDTH, VIT_HEADS = 4, 128, 4


def write_files(folder: Path, texts: Iterable[str]) -> None:
    """Everything that `ChatProcessor.from_folder` reads.

    Args:
        folder: made if absent.
        texts: what the tokenizer is trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(VOCAB, texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = tokenizer_config(is_flat=False, max_length=MAX_POSITIONS)
    (folder / "chat_template.jinja").write_text(special.pop("chat_template"), encoding="utf-8")
    for name, content in {
        "tokenizer_config.json": special,
        "config.json": _config(tokenizer.get_vocab()),
        "generation_config.json": {"do_sample": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        **_preprocessing(),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "model_type": "ernie4_5_vl_moe",
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "image_token_id": ids["<|IMAGE_PLACEHOLDER|>"],
        "image_start_token_id": ids["<|IMAGE_START|>"],
        "image_end_token_id": ids["<|IMAGE_END|>"],
        "video_token_id": ids["<|VIDEO_PLACEHOLDER|>"],
        "video_start_token_id": ids["<|VIDEO_START|>"],
        "video_end_token_id": ids["<|VIDEO_END|>"],
        "text_config": {
            "model_type": "ernie4_5_vl_moe_text",
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": DENSE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": MAX_POSITIONS,
            "use_bias": False,
            "tie_word_embeddings": True,
            "moe_num_experts": EXPERTS,
            "moe_intermediate_size": list(EXPERT_WIDTHS),
            "moe_k": TOP_K,
            "moe_num_shared_experts": SHARED_EXPERTS,
            "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": list(MROPE_SECTION)},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "ernie4_5_vl_moe_vision",
            "depth": VIT_DEPTH,
            "hidden_size": VIT_WIDTH,
            "intermediate_size": 4 * VIT_WIDTH,
            "num_heads": VIT_HEADS,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_merge_size": 2,
            "in_channels": 3,
            "hidden_act": "quick_gelu",
        },
    }


def _preprocessing() -> dict[str, dict[str, Any]]:
    """Small pictures: 16 to 36 tokens each, 9 to 16 per pair of frames; 4 to 8 frames of a video."""
    image, frame = (112 * 112, 168 * 168), (84 * 84, 112 * 112)
    common = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": PATCH,
        "merge_size": MERGE,
    }
    image_processor = {**common, "size": {"shortest_edge": image[0], "longest_edge": image[1]}}
    video = {"fps": 2, "min_frames": 4, "max_frames": 8, "draw_on_frames": True}
    video_processor = {**common, "size": {"shortest_edge": frame[0], "longest_edge": frame[1]}, **video}
    return {
        "preprocessor_config.json": image_processor,
        "video_preprocessor_config.json": video_processor,
        "processor_config.json": {"image_processor": image_processor, "video_processor": video_processor},
    }
