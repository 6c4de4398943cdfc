"""Text-only members of the family: dense as the 0.3B, with experts as the 21B and 300B, against transformers' classes."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie_cluster.cli.tiny_tokenizer import tokenizer_config, train_tokenizer
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.errors import ConfigError, InvalidRequest
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.positions import mrope_positions
from ernie_cluster.model.build import Role, build_decoder, num_parameters
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.request import GenerationRequest, SamplingParams
from tests import tiny
from tests.shapes import TEXT_03B, TEXT_21B, TEXT_300B

META = torch.device("meta")
VOCAB, STEPS = 2048, 12
KINDS = ("dense", "experts", "untied experts")
PROMPT = [5, 900, 77, 1040, 12, 3, 400, 41, 260, 1999]

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"moe_num_experts": 8, "moe_intermediate_size": 32, "moe_k": 2, "moe_layer_start_index": 1}


@functools.cache
def reference(kind: str) -> Any:
    """A random model that says something else at each step, and whose choice of experts depends on its bias."""
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM

    torch.manual_seed(7)
    if kind == "dense":
        model = Ernie4_5ForCausalLM(Ernie4_5Config(**COMMON, head_dim=32))
    else:
        shared = 0 if "untied" in kind else 2
        config = Ernie4_5_MoeConfig(
            **COMMON, **EXPERTS, moe_num_shared_experts=shared, tie_word_embeddings="untied" not in kind
        )
        model = Ernie4_5_MoeForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate.weight"):
                    parameter.normal_(std=0.2)
                elif "e_score_correction_bias" in name:
                    parameter.normal_(std=0.1)
    return model.float().eval()


@functools.cache
def folder_of(kind: str) -> str:
    """The same model as a checkpoint folder, as transformers writes it, in several files."""
    folder = Path(tempfile.mkdtemp(prefix="ernie-text-")) / kind.replace(" ", "-")
    reference(kind).save_pretrained(folder, max_shard_size="200KB")
    train_tokenizer(VOCAB).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(is_flat=False, max_length=512)))
    return str(folder)


def request(prompt: list[int]) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"r{len(prompt)}",
        model="text",
        prompt_token_ids=np.array(prompt, np.int32),
        positions=mrope_positions(len(prompt), []),
        sampling=SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True),
        eos_token_ids=(2,),
    )


def worker(kind: str, role: Role) -> tuple[Worker, tiny.Outcomes]:
    folder = folder_of(kind)
    config, outcomes = ModelConfig.from_folder(folder), tiny.Outcomes()
    runner = Runner.load(folder, config, role, dtype="float32", device=tiny.CPU, num_blocks=64, block_size=4)
    settings = WorkerSettings(
        block_size=4,
        max_batch_tokens=8,  # the prompt takes two chunks
        max_num_seqs=4,
        enable_prefix_cache=True,
        reserve_output_tokens=8,
        lease_timeout_s=20.0,
        piece_bytes=1 << 20,
        can_encode=True,
    )
    return Worker(runner, config, settings, outcomes, tiny.tiny_compiler), outcomes


@torch.no_grad()
def greedy(kind: str, prompt: list[int]) -> list[int]:
    """What transformers says, without a cache."""
    ids = list(prompt)
    for _ in range(STEPS):
        ids.append(int(reference(kind)(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_transformers(kind: str) -> None:
    engine, outcomes = worker(kind, "mixed")
    requests = [request(PROMPT), request(PROMPT[:3])]
    tiny.run_mixed(engine, requests)
    outcomes.drain()
    for prompt, made in zip((PROMPT, PROMPT[:3]), requests, strict=True):
        expected = greedy(kind, prompt)
        assert len(set(expected)) > STEPS // 3, "the model is lively enough to tell right from wrong"
        assert outcomes.tokens[made.request_id] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_roles_of_a_text_model_hold_the_same(kind: str) -> None:
    config = ModelConfig.from_folder(folder_of(kind))
    sizes = {num_parameters(build_decoder(config, r, dtype=torch.float32, device=META)) for r in ("prefill", "decode")}
    assert sizes == {sum(p.numel() for p in reference(kind).parameters())}


def test_names_are_those_of_the_hub() -> None:
    with Checkpoint(folder_of("experts")) as checkpoint:
        assert checkpoint.entry("model.layers.1.mlp.gate.weight").shape == (8, 64)  # not transposed, as in the 21B
        assert checkpoint.entry("model.layers.1.mlp.moe_statics.e_score_correction_bias").shape == (1, 8)
        assert checkpoint.entry("model.layers.3.mlp.experts.7.down_proj.weight").shape == (64, 32)
        assert checkpoint.entry("model.layers.0.mlp.gate_proj.weight").shape == (96, 64)


@pytest.mark.parametrize(
    ("raw", "total"), [(TEXT_03B, 360_748_032), (TEXT_21B, 21_825_437_888), (TEXT_300B, 299_484_163_264)]
)
def test_full_size_models_have_the_published_number_of_parameters(raw: dict[str, object], total: int) -> None:
    decoder = build_decoder(ModelConfig.from_dict(raw), "prefill", dtype=torch.bfloat16, device=META)
    assert num_parameters(decoder) == total


def test_pools_of_a_text_model_are_prefill_and_decode() -> None:
    path = folder_of("dense")
    sees = ModelConfig.from_folder(path).is_multimodal
    blind = ModelDeployment("text", path, (PoolConfig("prefill"), PoolConfig("decode")))
    blind.check_media(is_multimodal=sees)
    with pytest.raises(ConfigError, match=r"'text'.*text-only; remove the vision pool"):
        replace(blind, pools=(*blind.pools, PoolConfig("vision"))).check_media(is_multimodal=sees)


def test_a_picture_is_refused_by_the_name_of_the_model() -> None:
    processor = ChatProcessor.from_folder(folder_of("dense"), served_name="ernie-text")
    sampling = SamplingParams(max_tokens=1)
    text = [{"role": "user", "content": "Hello"}]
    assert processor.chat(text, request_id="a", sampling=sampling).num_prompt_tokens > 0
    url = {"url": "data:image/png;base64,AAAA"}
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    with pytest.raises(InvalidRequest, match="ernie-text reads text only") as caught:
        processor.chat(picture, request_id="b", sampling=sampling)
    assert caught.value.param == "messages[0].content[0]"
