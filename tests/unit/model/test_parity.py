"""The model against transformers' implementation, float32, on a tiny checkpoint with the hub's tensor names.

transformers 5.23 gives the text after a video other positions than the model's own code does (it leaves out the time
axis), so both sides are given the positions of the original rule.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.batch import BatchBuilder
from ernie_cluster.engine.scheduler import Schedule
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.model.build import build_decoder, num_parameters
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.step import KVCache
from ernie_cluster.model.weights import load_decoder
from ernie_cluster.request import GenerationRequest, MediaInput
from tests import tiny

TOLERANCE = 1e-4

PROMPTS: dict[str, list[int | MediaInput]] = {
    "text": [5, 900, 77, 1040, 12, 3, 400, 41, 260, 1999],
    "one image": [50, 60, tiny.make_image(1, (1, 6, 8)), 70, 80, 90],
    "two images": [50, tiny.make_image(1, (1, 6, 8)), 60, 61, tiny.make_image(2, (1, 10, 4)), 70],
    "video": [50, tiny.make_image(3, (4, 4, 6)), 70, 80],
    "long video of small frames": [50, tiny.make_image(4, (12, 4, 6)), 70, 80, 90],
    "image and video": [tiny.make_image(5, (1, 2, 2)), 7, tiny.make_image(6, (2, 2, 4)), 9],
}


@functools.cache
def reference() -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny.tiny_folder("nested"), dtype=torch.float32).eval()


def reference_inputs(request: GenerationRequest) -> dict[str, Any]:
    """The same prompt as transformers wants it: videos have a placeholder of their own there."""
    config = ModelConfig.from_folder(tiny.tiny_folder("nested"))
    special = config.token_ids
    assert special is not None
    ids = request.prompt_token_ids.astype(np.int64).copy()
    kinds = np.zeros_like(ids)
    for media in request.media:
        is_video = media.kind == "video"
        kinds[media.offset : media.end] = 2 if is_video else 1
        if is_video:
            ids[media.offset : media.end] = special.video_patch
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(request.positions.astype(np.int64))[:, None],
        "mm_token_type_ids": torch.from_numpy(kinds)[None],
        "moe_mm_token_type_ids": torch.from_numpy(np.isin(ids, sorted(special.vision_pool)).astype(np.int64))[None],
    }
    mean = np.repeat([0.48145466, 0.4578275, 0.40821073], 196).astype(np.float32)
    std = np.repeat([0.26862954, 0.26130258, 0.27577711], 196).astype(np.float32)
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        of_kind = [m for m in request.media if m.kind == kind]
        if of_kind:
            patches = np.concatenate([m.patches for m in of_kind if m.patches is not None])
            inputs[pixels] = torch.from_numpy((patches.astype(np.float32) / 255 - mean) / std)
            inputs[grid] = torch.tensor([m.grid_thw for m in of_kind])
    return inputs


@torch.no_grad()
def all_logits(request: GenerationRequest, decoder: Any = None) -> torch.Tensor:
    """Our logits of every prompt token, in one step."""
    sequence = Sequence(request, [])
    num = request.num_prompt_tokens
    sequence.blocks = list(range(1, 2 + num // tiny.BLOCK_SIZE))
    sequence.embeds = {i: tiny.encode(m) for i, m in enumerate(request.media)}
    special = tiny.tiny_config().token_ids
    assert special is not None
    builder = BatchBuilder(tiny.BLOCK_SIZE, special.vision_pool, tiny.CPU)
    step = builder.build(Schedule(chunks=[(sequence, num)]))
    every_row = type(step)(**{f: getattr(step, f) for f in step.__slots__} | {"logits_rows": torch.arange(num)})
    kv = KVCache.allocate(4, len(sequence.blocks) + 1, tiny.BLOCK_SIZE, 2, 32, torch.float32, tiny.CPU)
    return (decoder or tiny.tiny_decoder())(every_row, kv)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_equal_transformers(name: str) -> None:
    request = tiny.make_request(PROMPTS[name])
    with torch.no_grad():
        expected = reference()(**reference_inputs(request)).logits[0]
    ours = all_logits(request)
    assert expected.abs().max() > 1  # the checkpoint is lively enough to tell right from wrong
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    request = tiny.make_request(PROMPTS[name], max_tokens=12)
    worker, outcomes = tiny.make_worker()
    tiny.run_mixed(worker, [request])
    outcomes.drain()
    inputs = reference_inputs(request)
    expected: list[int] = []
    with torch.no_grad():  # without a cache: the plainest reference there is
        for _ in range(12):
            token = int(reference()(**inputs).logits[0, -1].argmax())
            expected.append(token)
            position = inputs["position_ids"].max().reshape(1, 1, 1).expand(3, 1, 1) + 1
            inputs["position_ids"] = torch.cat([inputs["position_ids"], position], 2)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            for key in ("mm_token_type_ids", "moe_mm_token_type_ids"):
                inputs[key] = torch.cat([inputs[key], torch.zeros(1, 1, dtype=torch.long)], 1)
    assert outcomes.tokens[request.request_id] == expected


def test_picture_changes_the_answer() -> None:
    """Guards the tests above against a checkpoint whose pictures do not matter."""
    first, second = (tiny.make_request([50, tiny.make_image(seed), 70]) for seed in (1, 2))
    assert not torch.allclose(all_logits(first)[-1], all_logits(second)[-1], atol=0.1)


def test_vision_embeddings_equal_transformers() -> None:
    request = tiny.make_request(PROMPTS["two images"])
    inputs = reference_inputs(request)
    with torch.no_grad():
        features = reference().model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    got = torch.cat([tiny.encode(m) for m in request.media])
    expected = features.pooler_output if hasattr(features, "pooler_output") else features
    torch.testing.assert_close(got, torch.cat(list(expected)), atol=TOLERANCE, rtol=TOLERANCE)


def test_decode_role_gives_the_same_text_logits() -> None:
    """Generated tokens are text: leaving the vision experts out changes nothing for them."""
    request = tiny.make_request(PROMPTS["text"])
    got = all_logits(request, tiny.tiny_decoder("decode"))
    torch.testing.assert_close(got, all_logits(request), atol=TOLERANCE, rtol=0)
    assert num_parameters(tiny.tiny_decoder("decode")) < num_parameters(tiny.tiny_decoder("prefill"))


def test_untied_head_is_loaded() -> None:
    folder = tiny.tiny_folder("flat", tie=False)
    config = ModelConfig.from_folder(folder)
    decoder = build_decoder(config, "mixed", dtype=torch.float32, device=tiny.CPU)
    load_decoder(decoder, config, Checkpoint(folder), has_vision_experts=True)
    assert not torch.equal(decoder.head, decoder.embed)
    torch.testing.assert_close(decoder.head, Checkpoint(folder).get("lm_head.weight"), atol=0, rtol=0)
