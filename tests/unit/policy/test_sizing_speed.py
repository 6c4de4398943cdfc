"""Laws of the rooflines, and one figure by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.published import PUBLISHED
from ernie_cluster.policy.sizing import speed
from ernie_cluster.policy.sizing.formats import FORMATS
from ernie_cluster.policy.sizing.gpus import GPUS
from ernie_cluster.policy.sizing.pools import Setting
from ernie_cluster.policy.sizing.speed import Prompt

ENGINE = EngineConfig(max_batch_tokens=4096)
SETTING = Setting(PUBLISHED["28b"], ENGINE, FORMATS["bfloat16"], "bfloat16", GPUS["h100-80g"])
LARGE = replace(SETTING, model=PUBLISHED["424b"])
ONE = ParallelDims()


def decode(setting: Setting = SETTING, dims: ParallelDims = ONE, batch: int = 8, context: int = 4096) -> float:
    return speed.decode_step_s(setting, dims, "decode", batch, context)


def prefill(setting: Setting = SETTING, dims: ParallelDims = ONE, text: int = 1024, image: int = 0) -> float:
    return speed.prefill_s(setting, dims, "prefill", Prompt(text, image))


def test_a_lone_token_reads_the_active_weights_once() -> None:
    active = 2 * (440_401_920 + 94_371_840 + 637_009_920 + 264_765_440 + 6 / 64 * 20_384_317_440)
    assert decode(batch=1, context=1) == pytest.approx(active / (3.35e12 * speed.BANDWIDTH_FRACTION), rel=0.01)


def test_a_large_batch_reads_all_text_experts_and_its_kv() -> None:
    more = decode(batch=256, context=8192) - decode(batch=256, context=4096)
    assert more == pytest.approx(256 * 4096 * 57_344 / (3.35e12 * speed.BANDWIDTH_FRACTION), rel=1e-6)
    assert decode(batch=256, context=1) > 2 * 20_384_317_440 / 3.35e12


def test_more_work_takes_longer() -> None:
    assert decode(batch=1) < decode(batch=8) < decode(batch=64) < decode(batch=64, context=16_384)
    assert prefill(text=512) <= prefill(text=1024) < prefill(text=8192) < prefill(text=32_768)
    assert speed.encode_s(SETTING, 256) < speed.encode_s(SETTING, 6177)
    assert decode(batch=64) / 64 < decode(batch=1)  # that is what batching is for


def test_tokens_of_pictures_are_cheaper_than_words() -> None:
    assert prefill(image=6000) < prefill(text=7024)


@pytest.mark.parametrize("work", [decode, prefill])
def test_better_gpus_are_not_slower(work: object) -> None:
    seconds = [
        work(replace(LARGE, gpu=GPUS[k]), ParallelDims(8)) for k in ("a100-80g", "h100-80g", "h200-141g", "b200-180g")
    ]  # type: ignore[operator]
    assert seconds == sorted(seconds, reverse=True)


def test_more_ranks_make_decode_faster() -> None:
    assert decode(LARGE, ParallelDims(8)) < decode(LARGE, ParallelDims(2))


@pytest.mark.parametrize("name", ["wint8", "wint4", "fp8"])
def test_fewer_bits_save_memory_and_no_time(name: str) -> None:
    """The numbers go over memory more often than before, and each token's experts are unpacked for itself."""
    form = FORMATS[name]
    fewer = replace(SETTING, weights=form)
    passes = speed.UNPACKED_PASSES * 2
    experts = 6 / 64 * 20_384_317_440 * (form.expert_bits / 8 + passes)
    others = (440_401_920 + 94_371_840 + 637_009_920) * (form.linear_bits / 8 + passes)
    alone = decode(fewer, batch=1, context=1)
    # the head stays plain; scales aside
    assert alone == pytest.approx((experts + others + 2 * 264_765_440) / (3.35e12 * speed.BANDWIDTH_FRACTION), rel=0.02)
    assert alone > decode(batch=1, context=1)
    many = decode(fewer, batch=64, context=1) - decode(fewer, batch=16, context=1)
    assert many < 0.1 * alone, "they are unpacked once"
    assert prefill(fewer, text=512) > prefill(text=512)


def test_kv_of_eight_bits_is_read_as_what_it_is_unpacked_to() -> None:
    eight = replace(SETTING, kv="fp8")
    more = decode(eight, batch=256, context=8192) - decode(eight, batch=256, context=4096)
    plain = decode(batch=256, context=8192) - decode(batch=256, context=4096)
    assert more / plain == pytest.approx(speed.UNPACKED_PASSES + (128 + 2) / 256)


def test_the_way_over_the_network_is_dearer() -> None:
    inside, across = (prefill(LARGE, dims, text=8192) for dims in (ParallelDims(4, 2), ParallelDims(4, 4)))
    slow_links = replace(LARGE, gpu=replace(GPUS["h100-80g"], link=GPUS["l40s-48g"].link))
    assert prefill(slow_links, ParallelDims(8), text=8192) > prefill(LARGE, ParallelDims(8), text=8192)
    assert across > inside / 2


def test_a_dense_model_has_no_experts_to_wait_for() -> None:
    dense = replace(SETTING, model=PUBLISHED["0.3b"])
    assert 0 < decode(dense) < decode()
    assert 0 < prefill(dense) < prefill()
