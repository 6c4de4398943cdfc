"""Laws of `ParallelDims`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.errors import ConfigError

SIZES = st.integers(1, 16)


def model() -> ModelConfig:
    """The shape of the 28B."""
    return ModelConfig.from_dict(
        {
            "model_type": "ernie4_5_moe_vl",
            "vocab_size": 103424,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "num_hidden_layers": 28,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_num_experts": [64, 64],
            "im_patch_id": 100295,
            "vision_config": {},
        }
    )


@given(SIZES, SIZES)
def test_ranks_and_coordinates_are_one_to_one(tp: int, dp: int) -> None:
    dims = ParallelDims(tp, dp)
    places = [dims.coordinates(rank) for rank in range(dims.world)]
    assert [dims.rank(c.dp_rank, c.tp_rank) for c in places] == list(range(dims.world))
    assert {(c.dp_rank, c.tp_rank) for c in places} == {(d, t) for d in range(dp) for t in range(tp)}
    assert [c.ep_rank for c in places] == list(range(dims.ep))


@given(SIZES, SIZES)
def test_ranks_of_one_tensor_parallel_group_are_neighbours(tp: int, dp: int) -> None:
    dims = ParallelDims(tp, dp)
    for dp_rank in range(dp):
        group = [dims.rank(dp_rank, tp_rank) for tp_rank in range(tp)]
        assert group == list(range(group[0], group[0] + tp))


@given(SIZES, SIZES)
def test_check_passes_exactly_when_everything_divides(tp: int, dp: int) -> None:
    divides = 20 % tp == 0 and 4 % tp == 0 and 64 % (tp * dp) == 0  # 12288 and 3072 divide whenever 4 does
    try:
        ParallelDims(tp, dp).check(model())
        is_accepted = True
    except ConfigError:
        is_accepted = False
    assert is_accepted == divides


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (ParallelDims(tp=3), "num_heads % tp = 20 % 3 = 2, must be 0"),
        (ParallelDims(tp=5), "num_kv_heads % tp = 4 % 5 = 4, must be 0 .* tp can be 1, 2, 4$"),
        (
            ParallelDims(2, 2, 49),
            r"redundant_experts = 49 must be at most 48: text_experts.num_experts / \(tp \* dp\) = 16",
        ),
        (ParallelDims(tp=4, dp=3), r"text_experts.num_experts % ep = 64 % 12 = 4, .*ep = tp \* dp = 12"),
    ],
)
def test_the_error_shows_the_equation_and_sizes_that_work(dims: ParallelDims, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dims.check(model())


@pytest.mark.parametrize(("tp", "dp"), [(0, 1), (1, 0), (-2, 1)])
def test_sizes_below_one_are_refused(tp: int, dp: int) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        ParallelDims(tp, dp)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_a_bug(rank: int) -> None:
    with pytest.raises(AssertionError, match="outside"):
        ParallelDims(2, 2).coordinates(rank)
