"""Writes a tiny random checkpoint with every structural feature of ERNIE-4.5-VL, for demos and tests.

    python -m ernie_cluster.cli.tiny_checkpoint FOLDER

Kept from the family: two expert pools with different widths, shared experts, one dense layer, grouped-query
attention, 3-D rotary positions, a ViT whose head size differs from the decoder's, a resampler, the names, shapes and
dtypes of the published tensors, the leading token ids (0 <unk>, 1 <s>, 2 </s>, 3..12 digits) and the special tokens.
The weights are large enough that the output depends on routing, positions and pixels. What it says means nothing.

Form "flat" is the config.json of the remote-code repositories (`ernie4_5_moe_vl`); "nested" is that of
transformers (`ernie4_5_vl_moe`), where video patches have a token of their own. The tensors are the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from ernie_cluster.cli.tiny_tokenizer import tokenizer_config, train_tokenizer

HIDDEN, DENSE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 256, 4, 4, 2, 32
EXPERTS, TOP_K, EXPERT_WIDTHS, SHARED_EXPERTS = 8, 2, (64, 32), 2
MROPE_SECTION = (6, 6, 4)
VIT_DEPTH, VIT_WIDTH, VIT_HEADS, PATCH, MERGE = 2, 64, 2, 14, 2
VOCAB, MAX_POSITIONS = 2048, 4096

Form = Literal["flat", "nested"]


def write_tiny_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tie: bool = True,
    max_shard_bytes: int = 1_000_000,
    form: Form = "flat",
) -> Path:
    """Write a whole checkpoint folder; the same arguments give the same bytes.

    Args:
        folder: made if absent; a tiny checkpoint that is there already is replaced.
        seed: of the weights.
        dtype: "float32" or "bfloat16"; the routers are float32 in both, as published.
        tie: the output head shares the embedding, as in the 28B; else `lm_head.weight` is written, as in the 424B.
        max_shard_bytes: most tensor bytes per *.safetensors file; a larger single tensor gets its own file.
        form: which of the two published forms config.json takes.

    Returns:
        `folder` as a Path.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("model*.safetensors*"), out / "processor_config.json"):
        stale.unlink(missing_ok=True)
    tokenizer = train_tokenizer(VOCAB)
    ids = tokenizer.get_vocab()
    tokenizer.save(str(out / "tokenizer.json"))
    config = _flat_config(ids, dtype, tie) if form == "flat" else _nested_config(ids, dtype, tie)
    _write_json(out / "config.json", config)
    generation = {"do_sample": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    _write_json(out / "generation_config.json", generation)
    for name, content in _preprocessor_files(form).items():
        _write_json(out / name, content)
    _write_json(out / "tokenizer_config.json", tokenizer_config(is_flat=form == "flat", max_length=MAX_POSITIONS))
    _write_shards(out, _weights(seed, getattr(torch, dtype), tie), max_shard_bytes)
    return out


def _weights(seed: int, dtype: torch.dtype, tie: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its published name, CPU; linear weights are [out, in] but for the routers, [in, out]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(dtype)

    def linear(name: str, out: int, fan_in: int, bias: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{name}.weight", normal(out, fan_in, std=1.5 * fan_in**-0.5)
        if bias:
            yield f"{name}.bias", normal(out, std=0.1)

    def norm(name: str, width: int, bias: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{name}.weight", normal(width, std=0.1, mean=1.0)
        if bias:
            yield f"{name}.bias", normal(width, std=0.1)

    def gated_mlp(name: str, width: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from linear(f"{name}.gate_proj", width, HIDDEN)
        yield from linear(f"{name}.up_proj", width, HIDDEN)
        yield from linear(f"{name}.down_proj", HIDDEN, width)

    def experts(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        for router in ("gate.weight", "gate.weight_1"):
            yield f"{name}.{router}", normal(HIDDEN, EXPERTS, std=1.5 * HIDDEN**-0.5).float()
        yield f"{name}.moe_statics.e_score_correction_bias", normal(2, EXPERTS, std=0.05).float()
        for expert in range(2 * EXPERTS):
            yield from gated_mlp(f"{name}.experts.{expert}", EXPERT_WIDTHS[expert // EXPERTS])
        yield from gated_mlp(f"{name}.shared_experts", SHARED_EXPERTS * EXPERT_WIDTHS[0])

    yield "model.embed_tokens.weight", normal(VOCAB, HIDDEN, std=1.0)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        yield from norm(f"{name}.input_layernorm", HIDDEN)
        for proj, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            yield from linear(f"{name}.self_attn.{proj}", heads * HEAD_DIM, HIDDEN)
        yield from linear(f"{name}.self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)
        yield from norm(f"{name}.post_attention_layernorm", HIDDEN)
        yield from gated_mlp(f"{name}.mlp", DENSE) if layer == 0 else experts(f"{name}.mlp")
    yield from norm("model.norm", HIDDEN)
    if not tie:
        yield from linear("lm_head", VOCAB, HIDDEN)

    yield from linear("vision_model.patch_embed.proj", VIT_WIDTH, 3 * PATCH**2)
    for block in range(VIT_DEPTH):
        name = f"vision_model.blocks.{block}"
        yield from norm(f"{name}.norm1", VIT_WIDTH, bias=True)
        yield from linear(f"{name}.attn.qkv", 3 * VIT_WIDTH, VIT_WIDTH, bias=True)
        yield from linear(f"{name}.attn.proj", VIT_WIDTH, VIT_WIDTH, bias=True)
        yield from norm(f"{name}.norm2", VIT_WIDTH, bias=True)
        yield from linear(f"{name}.mlp.fc1", 4 * VIT_WIDTH, VIT_WIDTH, bias=True)
        yield from linear(f"{name}.mlp.fc2", VIT_WIDTH, 4 * VIT_WIDTH, bias=True)
    yield from norm("vision_model.ln", VIT_WIDTH, bias=True)

    merged = VIT_WIDTH * MERGE**2
    for stage, fan_in in (("spatial", merged), ("temporal", 2 * merged)):
        name = f"model.resampler_model.{stage}_linear"
        yield from linear(f"{name}.0", merged, fan_in, bias=True)
        yield from linear(f"{name}.2", merged, merged, bias=True)
        yield from norm(f"{name}.3", merged, bias=True)
    yield from linear("model.resampler_model.mlp", HIDDEN, merged, bias=True)
    yield from norm("model.resampler_model.after_norm", HIDDEN)


def _write_shards(out: Path, tensors: Iterator[tuple[str, torch.Tensor]], max_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = total = 0
    for name, tensor in tensors:
        if shards[-1] and used + tensor.nbytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
        total += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _common_config(ids: dict[str, int], tie: bool) -> dict[str, Any]:
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "tie_word_embeddings": tie,
        "image_start_token_id": ids["<|IMAGE_START|>"],
        "image_end_token_id": ids["<|IMAGE_END|>"],
        "video_start_token_id": ids["<|VIDEO_START|>"],
        "video_end_token_id": ids["<|VIDEO_END|>"],
    }


def _text_config() -> dict[str, Any]:
    return {
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
        "moe_intermediate_size": list(EXPERT_WIDTHS),
        "moe_k": TOP_K,
        "moe_num_shared_experts": SHARED_EXPERTS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


_VIT_CONFIG = {
    "depth": VIT_DEPTH,
    "hidden_size": VIT_WIDTH,
    "num_heads": VIT_HEADS,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "in_channels": 3,
    "hidden_act": "quick_gelu",
}


def _flat_config(ids: dict[str, int], dtype: str, tie: bool) -> dict[str, Any]:
    return {
        "model_type": "ernie4_5_moe_vl",
        "torch_dtype": dtype,
        **_common_config(ids, tie),
        **_text_config(),
        "rope_theta": 500000,
        "rope_3d": True,
        "rope_scaling": {"type": "default", "mrope_section": MROPE_SECTION},
        "freq_allocation": MROPE_SECTION[2],
        "moe_num_experts": [EXPERTS, EXPERTS],
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [LAYERS + 1, LAYERS],  # beyond the last layer, as published
        "moe_layer_interval": 1,
        "im_patch_id": ids["<|IMAGE_PLACEHOLDER|>"],
        "pixel_hidden_size": VIT_WIDTH,
        "spatial_conv_size": MERGE,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
        "vision_config": {**_VIT_CONFIG, "model_type": "DFNRope_vision_transformer", "embed_dim": VIT_WIDTH, "mlp_ratio": 4},
    }  # fmt: skip


def _nested_config(ids: dict[str, int], dtype: str, tie: bool) -> dict[str, Any]:
    return {
        "model_type": "ernie4_5_vl_moe",
        "dtype": dtype,
        **_common_config(ids, tie),
        "image_token_id": ids["<|IMAGE_PLACEHOLDER|>"],
        "video_token_id": ids["<|VIDEO_PLACEHOLDER|>"],
        "text_config": {
            **_text_config(),
            "model_type": "ernie4_5_vl_moe_text",
            "tie_word_embeddings": tie,
            "moe_num_experts": EXPERTS,
            "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": MROPE_SECTION},
        },
        "vision_config": {**_VIT_CONFIG, "model_type": "ernie4_5_vl_moe_vision", "intermediate_size": 4 * VIT_WIDTH, "temporal_merge_size": 2},
    }  # fmt: skip


def _preprocessor_files(form: Form) -> dict[str, dict[str, Any]]:
    """File name -> content; as small as keeps every path: 4 to 64 tokens per image, 4 to 16 per pair of frames."""
    token = (PATCH * MERGE) ** 2
    image, video = (4 * token, 64 * token), (4 * token, 16 * token)
    common = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": PATCH,
        "merge_size": MERGE,
    }
    if form == "flat":
        bounds = {"min_pixels": image[0], "max_pixels": image[1]}
        video_bounds = {"video_min_pixels": video[0], "video_max_pixels": video[1]}
        return {"preprocessor_config.json": {**common, **bounds, **video_bounds}}
    image_processor = {**common, "size": {"shortest_edge": image[0], "longest_edge": image[1]}}
    video_processor = {**common, "size": {"shortest_edge": video[0], "longest_edge": video[1]}}
    return {
        "preprocessor_config.json": image_processor,
        "processor_config.json": {"image_processor": image_processor, "video_processor": video_processor},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Write one checkpoint; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write a tiny random ERNIE-4.5-VL checkpoint.")
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--form", default="flat", choices=("flat", "nested"))
    parser.add_argument("--untied", action="store_true", help="write a separate output head, as the 424B has")
    args = parser.parse_args()
    write_tiny_checkpoint(args.folder, dtype=args.dtype, tie=not args.untied, form=args.form)


if __name__ == "__main__":
    main()
