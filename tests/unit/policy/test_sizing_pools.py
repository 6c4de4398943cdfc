"""Bytes of ranks, and the refusal of configurations that cannot work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.pool import PoolConfig, Role
from ernie_cluster.config.presets import ernie_28b_a3b, ernie_28b_a3b_thinking, ernie_424b_a47b, tiny_mixed
from ernie_cluster.config.published import PUBLISHED
from ernie_cluster.config.units import GIB
from ernie_cluster.errors import ConfigError
from ernie_cluster.inputs.images import PixelConfig
from ernie_cluster.policy.sizing import memory
from ernie_cluster.policy.sizing.check import check_fit, setting_of, size_deployment
from ernie_cluster.policy.sizing.formats import FORMATS
from ernie_cluster.policy.sizing.gpus import GPUS, gpu
from ernie_cluster.policy.sizing.pools import RankSizing, Setting, size_pool

SHAPES = {
    "ernie-4.5-vl-28b-a3b": PUBLISHED["28b"],
    "ernie-4.5-vl-28b-a3b-thinking": PUBLISHED["28b"],
    "ernie-4.5-vl-424b-a47b": PUBLISHED["424b"],
    "tiny": PUBLISHED["0.3b"],
}
SETTING = Setting(
    PUBLISHED["28b"], EngineConfig(max_batch_tokens=4096, max_num_seqs=64), FORMATS["bfloat16"], "bfloat16", GPUS["h100-80g"]
)  # fmt: skip


def with_engine(config: ClusterConfig, **changes: object) -> ClusterConfig:
    (model,) = config.models
    return replace(config, models=(replace(model, engine=replace(model.engine, **changes)),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "kinds"),
    [
        (ernie_28b_a3b, ["h100-80g", "a100-80g", "h200-141g"]),
        (ernie_28b_a3b_thinking, ["h100-80g", "a100-80g"]),
        (ernie_424b_a47b, ["h200-141g", "b200-180g"]),
    ],
)
def test_presets_fit_on_the_gpus_they_were_made_for(preset: object, kinds: list[str]) -> None:
    for kind in kinds:
        check_fit(preset("-"), SHAPES, [GPUS[kind]], None)  # type: ignore[operator]


def test_what_fits_on_no_gpu_is_refused_with_what_to_change() -> None:
    with pytest.raises(
        ConfigError, match=r"a47b' does not fit: prefill \(tp 8 x dp 1\), rank 0: weights 105.9 .* larger"
    ):
        check_fit(ernie_424b_a47b("-"), SHAPES, [GPUS["a100-40g"], GPUS["h100-80g"]], None)
    greedy = with_engine(ernie_28b_a3b("-"), kv_cache_bytes=40 * GIB)
    with pytest.raises(
        ConfigError, match=r"KV 42.9 = .* more than 85.5 GB of h100-80g; set engine.kv_cache_bytes to at most"
    ):
        check_fit(greedy, SHAPES, [GPUS["h100-80g"]], None)


def test_the_amount_of_kv_that_is_named_fits() -> None:
    greedy = with_engine(ernie_28b_a3b("-"), kv_cache_bytes=40 * GIB)
    with pytest.raises(ConfigError) as refused:
        check_fit(greedy, SHAPES, [GPUS["h100-80g"]], None)
    mib = int(str(refused.value).rpartition("at most ")[2].partition("MiB")[0])
    check_fit(with_engine(greedy, kv_cache_bytes=mib << 20), SHAPES, [GPUS["h100-80g"]], None)
    with pytest.raises(ConfigError):
        check_fit(with_engine(greedy, kv_cache_bytes=(mib + 1) << 20), SHAPES, [GPUS["h100-80g"]], None)


def test_one_kind_that_fits_is_enough_and_unknown_ones_are_not_judged() -> None:
    check_fit(ernie_424b_a47b("-"), SHAPES, [GPUS["h200-141g"], GPUS["a100-40g"]], None)
    check_fit(ernie_424b_a47b("-"), SHAPES, [], None)


def test_pools_without_gpus_share_the_memory_of_the_machines() -> None:
    config = tiny_mixed("-")
    pools = tuple(p for p in config.models[0].pools if p.role == "mixed")
    config = replace(config, models=(replace(config.models[0], pools=pools),))
    check_fit(config, SHAPES, [], GIB)
    with pytest.raises(ConfigError, match=r"without GPUs need 0.8 GB .* these machines have 0.5 GB of memory"):
        check_fit(config, SHAPES, [], GIB // 2)
    check_fit(ernie_28b_a3b("-"), SHAPES, [], GIB)  # its pools have GPUs


def test_gpus_that_the_engine_shall_not_use_are_not_counted() -> None:
    (model,) = with_engine(ernie_28b_a3b("-"), device="cpu").models
    assert {p.memory_bytes for p in size_deployment(model, SETTING)} == {None}


def test_on_cpu_all_bytes_are_the_hosts() -> None:
    (on_cpu, on_gpu) = (size_pool(SETTING, PoolConfig("decode", num_gpus=gpus)) for gpus in (0.0, 1.0))
    assert on_cpu.problem == ""
    assert on_cpu.heaviest.reserve == 0
    assert on_cpu.host_bytes > on_cpu.heaviest.total + on_cpu.kv_cache_bytes
    assert on_gpu.host_bytes < on_gpu.heaviest.total / 5


@pytest.mark.parametrize(("role", "num_gpus", "more"), [("decode", 0.0, 5), ("decode", 1.0, 5), ("vision", 1.0, 0)])
def test_memory_behind_the_kv_cache_is_the_hosts(role: Role, num_gpus: float, more: int) -> None:
    pool = PoolConfig(role, num_gpus=num_gpus)
    without = size_pool(SETTING, pool)
    bigger = size_pool(replace(SETTING, engine=replace(SETTING.engine, host_cache_bytes=5 * GIB)), pool)
    assert bigger.host_bytes - without.host_bytes == more * GIB
    assert bigger.problem == without.problem


def test_kv_tokens_are_whole_blocks_without_the_first_and_per_group() -> None:
    engine = EngineConfig(kv_cache_bytes=101 * 16 * 57_344 + 5)
    setting = replace(SETTING, engine=engine)
    one = size_pool(setting, PoolConfig("mixed", num_gpus=1))
    assert one.kv_layout is not None
    assert (one.kv_layout.bytes_per_token, one.kv_tokens, one.concurrency(800)) == (57_344, 1600, 2)
    four = size_pool(setting, PoolConfig("mixed", num_gpus=1, tp=2, dp=2))  # half the heads on each: 203 blocks
    assert (four.kv_tokens, four.concurrency(3000)) == (2 * 201 * 16, 2)
    assert size_pool(setting, PoolConfig("vision", num_gpus=1)).kv_tokens == 0


@pytest.mark.parametrize(
    ("kv", "num_bytes"), [("bfloat16", 221_184), ("fp8", 112_320), ("int8", 112_320), ("float32", 442_368)]
)
def test_bytes_of_kv_per_token(kv: str, num_bytes: int) -> None:
    model = PUBLISHED["424b"]
    assert memory.kv_layout(model, 16, kv, tp=1).bytes_per_token == num_bytes
    assert 8 * memory.kv_layout(model, 16, kv, tp=8).bytes_per_token == num_bytes


def test_activations_grow_with_tokens_and_pictures_and_shrink_with_tp() -> None:
    def decoder(tokens: int, tp: int) -> int:
        engine = EngineConfig(max_batch_tokens=tokens, max_num_seqs=64)
        return memory.decoder_activation_bytes(PUBLISHED["424b"], engine, ParallelDims(tp), 2, has_vision_experts=True)

    assert decoder(256, 8) < decoder(4096, 8) < decoder(8192, 8)
    assert decoder(4096, 8) <= decoder(4096, 1)
    vision = PUBLISHED["28b"].vision
    assert vision is not None
    assert memory.num_patches(vision, memory.IMAGE_MAX_PIXELS, 0) == 6177 * 4
    assert memory.num_patches(vision, memory.IMAGE_MAX_PIXELS, 180) == 180 * 1196 * 4
    assert memory.vision_activation_bytes(vision, 6177 * 4, 2) == pytest.approx(0.89e9, rel=0.01)


def test_docstrings_figure_of_the_28b() -> None:
    engine = EngineConfig(max_batch_tokens=4096, max_num_seqs=64)
    peak = memory.decoder_activation_bytes(PUBLISHED["28b"], engine, ParallelDims(), 2, has_vision_experts=True)
    assert peak == pytest.approx(1.07e9, rel=0.01)


def test_largest_pictures_are_those_of_the_processor() -> None:
    defaults = PixelConfig()
    assert (defaults.max_pixels, defaults.video_max_pixels) == (memory.IMAGE_MAX_PIXELS, memory.VIDEO_FRAME_PIXELS)


def test_host_memory_while_loading_is_far_below_the_checkpoint() -> None:
    assert memory.host_bytes(PUBLISHED["424b"], "prefill", 2, has_gpu=True) < 8 * GIB


@pytest.mark.parametrize(
    ("pool", "setting", "words"),
    [
        (PoolConfig("mixed", tp=3), SETTING, r"num_heads % tp = 20 % 3 = 2"),
        (PoolConfig("vision"), replace(SETTING, model=PUBLISHED["21b"]), "text-only model has no vision encoder"),
        (PoolConfig("mixed", num_gpus=1), replace(SETTING, gpu=None), "num_gpus = 1, so name its kind"),
    ],
)
def test_a_pool_that_makes_no_sense(pool: PoolConfig, setting: Setting, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        size_pool(setting, pool)


@pytest.mark.parametrize(("key", "value"), [("image_max_pixels", 0), ("video_frames", -1)])
def test_a_setting_that_makes_no_sense(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{key} = {value} must be at least"):
        replace(SETTING, **{key: value})


def test_an_unknown_gpu_is_no_key_error() -> None:
    with pytest.raises(ConfigError):
        gpu("")


def test_decode_replicas_that_may_prefill_are_as_heavy_as_those_that_do() -> None:
    (model,) = ernie_28b_a3b("-").models
    shape, kind = PUBLISHED["28b"], GPUS["h100-80g"]

    def heaviest(model: ModelDeployment) -> dict[str, RankSizing]:
        return {p.role: p.heaviest for p in size_deployment(model, setting_of(model, shape, kind))}

    fixed, able = heaviest(model), heaviest(replace(model, switch_roles=True))
    assert "vision_experts" not in fixed["decode"].weights
    assert able["decode"].weights == able["prefill"].weights
    assert able["decode"].activations >= fixed["decode"].activations
    assert {**able, "decode": fixed["decode"]} == fixed
