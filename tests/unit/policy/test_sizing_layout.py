"""Which models fit on which GPUs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.published import PUBLISHED
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.sizing.formats import FORMATS
from ernie_cluster.policy.sizing.gpus import GPUS, gpu, of_ray_types
from ernie_cluster.policy.sizing.layout import Layout, Wish, gangs, nearest, place
from ernie_cluster.policy.sizing.pools import Setting

ENGINE = EngineConfig(max_batch_tokens=4096, max_num_seqs=64, max_model_len=32_768)


def wish(
    model: str,
    kind: str,
    count: int,
    weights: str = "bfloat16",
    layout: Layout = "mixed",
    dims: ParallelDims | None = None,
    kv: str = "bfloat16",
) -> Wish:
    setting = Setting(PUBLISHED[model], ENGINE, FORMATS[weights], kv, gpu(kind), fills_kv=True)
    return Wish(setting, count, layout, dims)


def fits(*args: object, **more: object) -> bool:
    return not place(wish(*args, **more)).problem  # type: ignore[arg-type]


# GPUs that FastDeploy's pages ask for at least, and those that the sums ask for; 0 = does not fit on a node of 8.
# Kinds stand for their memory: A30 -> rtx4090-24g, L20 -> l40s-48g, H800 -> h100-80g, H20 -> h200-141g.
OFFICIAL = [
    # one deviation: the same pages run it on one RTX 4090 with 32K of context, as we say
    ("28b", "rtx4090-24g", "wint4", 2, 2), ("28b", "rtx4090-24g", "wint8", 2, 2), ("28b", "rtx4090-24g", "bfloat16", 4, 4),
    ("28b", "l40s-48g", "wint4", 1, 1), ("28b", "l40s-48g", "wint8", 1, 1), ("28b", "l40s-48g", "bfloat16", 2, 2),
    ("28b", "h100-80g", "wint4", 1, 1), ("28b", "h100-80g", "wint8", 1, 1), ("28b", "h100-80g", "bfloat16", 1, 1),
    ("28b", "h200-141g", "wint4", 1, 1), ("28b", "h200-141g", "wint8", 1, 1), ("28b", "h200-141g", "bfloat16", 1, 1),
    # deviations: its pages know the 424B with tensor parallelism of 8 only, which is no bound of memory:
    # 221 GB (wint4) are 55 GB on each of 4, 110 GB on each of 2; 426 GB (wint8) are 107 GB on each of 4
    ("424b", "h100-80g", "wint4", 8, 4), ("424b", "h200-141g", "wint4", 8, 2), ("424b", "h200-141g", "wint8", 8, 4),
    ("424b", "h100-80g", "wint8", 8, 8), ("424b", "h100-80g", "bfloat16", 0, 0), ("424b", "h200-141g", "bfloat16", 8, 8),
    ("300b", "h100-80g", "wint4", 4, 4), ("300b", "h100-80g", "wint8", 8, 8), ("300b", "h100-80g", "bfloat16", 0, 0),
    ("300b", "h100-80g", "fp8", 8, 8),
    ("21b", "h100-80g", "bfloat16", 1, 1), ("21b", "h200-141g", "bfloat16", 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("model", "kind", "weights", "official", "ours"), OFFICIAL)
def test_least_number_of_gpus(model: str, kind: str, weights: str, official: int, ours: int) -> None:
    least = next((n for n in range(1, 9) if fits(model, kind, n, weights)), 0)
    assert least == ours
    assert ours <= official  # whatever is run officially, fits


@pytest.mark.parametrize(
    ("model", "kind", "count", "weights", "is_fit"),
    [
        ("424b", "h100-80g", 8, "bfloat16", False),
        ("424b", "a100-80g", 8, "bfloat16", False),
        ("424b", "h100-80g", 8, "wint4", True),
        ("424b", "a100-80g", 8, "wint4", True),
        ("424b", "h100-80g", 16, "bfloat16", True),  # vLLM's recipe, too
        ("28b", "h100-80g", 1, "bfloat16", True),
        ("28b", "a100-80g", 1, "bfloat16", True),
        ("28b", "a100-40g", 1, "bfloat16", False),
    ],
)
def test_known_cases(model: str, kind: str, count: int, weights: str, is_fit: bool) -> None:
    assert fits(model, kind, count, weights) == is_fit


@settings(max_examples=12, deadline=None)
@given(
    model=st.sampled_from(["28b", "424b", "21b"]),
    kind=st.sampled_from(sorted(GPUS)),
    weights=st.sampled_from(["bfloat16", "wint8", "wint4"]),
    layout=st.sampled_from(["mixed", "split"]),
    kv=st.sampled_from(["bfloat16", "fp8"]),
)
def test_more_gpus_never_hold_fewer_tokens(model: str, kind: str, weights: str, layout: Layout, kv: str) -> None:
    held = 0
    for count in [*range(2, 19), 24, 31, 32, 33, 64]:
        placement = place(wish(model, kind, count, weights, layout, kv=kv))
        tokens = 0 if placement.problem else placement.kv_tokens
        assert tokens >= held, f"{count} GPUs"
        held = tokens


@settings(max_examples=15, deadline=None)
@given(
    model=st.sampled_from(sorted(PUBLISHED)),
    kind=st.sampled_from(sorted(GPUS)),
    weights=st.sampled_from(["bfloat16", "wint4"]),
    layout=st.sampled_from(["mixed", "split"]),
    count=st.integers(2, 40),
)
def test_a_placement_keeps_within_its_gpus(model: str, kind: str, weights: str, layout: Layout, count: int) -> None:
    placement = place(wish(model, kind, count, weights, layout))
    if placement.problem:
        return
    assert sum(p.num_gpus for p in placement.pools) + placement.num_idle <= count + 1e-6
    for pool in placement.pools:
        assert pool.memory_bytes is not None
        assert pool.heaviest.total + pool.kv_cache_bytes <= pool.memory_bytes
        assert pool.kv_layout is None or pool.concurrency(ENGINE.max_model_len or 0) >= 1
    vision = [p for p in placement.pools if p.role == "vision"]
    assert len(vision) == (PUBLISHED[model].vision is not None)


REFUSED = [
    wish("424b", "h100-80g", 8),
    wish("424b", "a100-80g", 8, "wint8", "split"),
    wish("28b", "rtx4090-24g", 1),
    wish("28b", "l40s-48g", 1),
    wish("300b", "h100-80g", 8),
    wish("424b", "h200-141g", 8, dims=ParallelDims(4)),
]


def applied(refused: Wish, options: str) -> Wish:
    """The wish with the options of one proposal."""
    values = dict(re.findall(r"--([\w-]+) (\S+)", options))
    setting = refused.setting
    if "quantization" in values:
        setting = replace(setting, weights=FORMATS[values["quantization"]])
    if "gpu" in values:
        setting = replace(setting, gpu=gpu(values["gpu"]))
    if "max-model-len" in values:
        setting = replace(setting, engine=replace(setting.engine, max_model_len=int(values["max-model-len"])))
    dims = ParallelDims(int(values["tp"]), int(values["dp"])) if "tp" in values else refused.dims
    return replace(refused, setting=setting, count=int(values.get("count", refused.count)), dims=dims)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda w: f"{w.count} x {w.gpu.name}")
def test_what_is_proposed_instead_fits(refused: Wish) -> None:
    assert place(refused).problem
    proposals = nearest(refused)
    assert proposals
    assert all(options and not place(applied(refused, options)).problem for _, options in proposals)


def test_proposals_name_weights_gpus_and_length() -> None:
    assert [options for _, options in nearest(wish("424b", "h100-80g", 8))] == [
        "--quantization wint8",
        "--count 16",
        "--gpu h200-141g",
    ]
    assert ("sequences of 8,192 tokens at most", "--max-model-len 8192") in nearest(wish("300b", "h100-80g", 8))
    assert nearest(wish("424b", "h200-141g", 8, dims=ParallelDims(4)))[0][1] == "--tp 8 --dp 1"


def test_a_refusal_shows_a_sum_that_is_too_large() -> None:
    problem = place(wish("424b", "h100-80g", 8)).problem
    match = re.fullmatch(
        r"mixed \(tp 8 x dp 1\), rank 0: weights ([\d.]+) \+ activations ([\d.]+) \+ reserve ([\d.]+) \+ "
        r"KV of one sequence of 32,768 ([\d.]+) = ([\d.]+) GB, more than ([\d.]+) GB = ([\d.]+) x ([\d.]+) GB of h100-80g",
        problem,
    )
    assert match is not None, problem
    *terms, total, budget, share, memory = map(float, match.groups())
    assert sum(terms) == pytest.approx(total, abs=0.3)
    assert share * memory == pytest.approx(budget, abs=0.1)
    assert total > budget


def test_gangs_are_those_that_divide_the_model() -> None:
    assert [(d.tp, d.dp) for d in gangs(PUBLISHED["28b"], 16)] == [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)]
    assert [(d.tp, d.dp) for d in gangs(PUBLISHED["424b"], 16)] == [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2)]


def test_decode_of_a_split_holds_no_vision_experts() -> None:
    vision, prefill, decode = place(wish("424b", "h200-141g", 16, layout="split")).pools
    assert (vision.role, prefill.role, decode.role) == ("vision", "prefill", "decode")
    assert {"vision_experts"} == prefill.heaviest.weights.keys() - decode.heaviest.weights.keys()
    assert decode.kv_tokens > prefill.kv_tokens


def test_vision_gets_a_gpu_of_its_own_when_it_needs_one() -> None:
    large = wish("28b", "l40s-48g", 5, layout="split")
    large = replace(large, setting=replace(large.setting, video_frames=180))
    vision, prefill, decode = place(large).pools
    assert (vision.share, vision.num_replicas, prefill.share, decode.share) == (1.0, 1, 1.0, 1.0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: place(wish("28b", "h100", 8, dims=ParallelDims(3))), r"num_heads % tp = 20 % 3 = 2, must be 0"),
        (lambda: place(wish("28b", "h100", 8, dims=ParallelDims(5))), r"num_kv_heads % tp = 4 % 5 = 4, must be 0"),
        (lambda: place(wish("424b", "h100", 128, dims=ParallelDims(8, 16))), r"num_experts % ep = 64 % 128 = 64, must be 0"),
        (lambda: place(wish("424b", "h100", 8, dims=ParallelDims(8, 2))), r"tp \* dp = 8 \* 2 = 16 ranks, more than the 8"),
        (lambda: place(wish("28b", "h100", 2, layout="split", dims=ParallelDims(2))), r"= 2 ranks, more than the 1 GPUs"),
        (lambda: wish("28b", "h100", 0), "0 GPUs: layout mixed takes 1 to 256"),
        (lambda: wish("28b", "h100", 1, layout="split"), "1 GPUs: layout split takes 2 to 256"),
        (lambda: wish("28b", "h300-80g", 1), "unknown GPU 'h300-80g'; did you mean"),
        (lambda: wish("28b", "tpu", 1), "unknown GPU 'tpu'; known: rtx4090-24g"),
        (lambda: wish("28b", "a100", 1), "unknown GPU 'a100'; did you mean a100-40g or a100-80g"),
        (lambda: wish("28b", "a100-80g", 1, "fp8"), "a100-80g: they need a Hopper GPU or a newer one; use wint8"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said(bad: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bad()  # type: ignore[operator]


def test_gpus_are_known_by_what_ray_calls_them() -> None:
    assert [g.name for g in of_ray_types(["A100", "H200"])] == ["a100-40g", "a100-80g", "h200-141g"]
    assert of_ray_types([]) == of_ray_types(["H200", "TPU-V6E"]) == []
    assert all(g.name == name == gpu(name).name for name, g in GPUS.items())
    assert [g.memory_bytes for g in GPUS.values()] == sorted(g.memory_bytes for g in GPUS.values())
