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


def test_smaller_weights_and_more_ranks_make_decode_faster() -> None:
    by_format = [decode(replace(SETTING, weights=FORMATS[f])) for f in ("bfloat16", "wint8", "wint4")]
    assert by_format == sorted(by_format, reverse=True)
    assert decode(LARGE, ParallelDims(8)) < decode(LARGE, ParallelDims(2))
    assert decode(replace(SETTING, kv="fp8"), context=32_768) < decode(context=32_768)


def test_fp8_multiplies_faster_and_integers_do_not() -> None:
    fp8, wint8 = (prefill(replace(SETTING, weights=FORMATS[f]), text=8192) for f in ("fp8", "wint8"))
    assert fp8 < wint8 == pytest.approx(prefill(text=8192))


def test_the_way_over_the_network_is_dearer() -> None:
    inside, across = (prefill(LARGE, dims, text=8192) for dims in (ParallelDims(4, 2), ParallelDims(4, 4)))
    slow_links = replace(LARGE, gpu=replace(GPUS["h100-80g"], link=GPUS["l40s-48g"].link))
    assert prefill(slow_links, ParallelDims(8), text=8192) > prefill(LARGE, ParallelDims(8), text=8192)
    assert across > inside / 2


def test_a_dense_model_has_no_experts_to_wait_for() -> None:
    dense = replace(SETTING, model=PUBLISHED["0.3b"])
    assert 0 < decode(dense) < decode()
    assert 0 < prefill(dense) < prefill()
