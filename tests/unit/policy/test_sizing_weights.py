"""What each rank holds, against the modules of the model itself and the published sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.pool import Role
from ernie_cluster.config.published import PUBLISHED
from ernie_cluster.model.build import build_decoder, build_vision
from ernie_cluster.policy.sizing.formats import FORMATS, WeightFormat
from ernie_cluster.policy.sizing.layout import divides
from ernie_cluster.policy.sizing.weights import matrices, rank_matrices
from tests import tiny

META = torch.device("meta")
VISION_ONLY = {"28b": 774_658_560, "424b": 803_505_664}
"""ViT and resampler."""


def numbers(model: ModelConfig, *roles: Role, part: str | None = None) -> int:
    return sum(m.numbers for role in roles for m in matrices(model, role) if part in (None, m.part))


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("0.3b", 360_748_032),
        ("21b", 21_825_437_888),
        ("28b", 29_399_294_336),
        ("28b-thinking", 29_399_294_336),
        ("300b", 299_484_163_264),
        ("424b", 423_526_285_184),
    ],
)
def test_published_models_have_their_number_of_parameters(name: str, total: int) -> None:
    assert numbers(PUBLISHED[name], "mixed", "vision") == total


@pytest.mark.parametrize("name", ["28b", "424b"])
def test_decode_is_the_whole_without_what_only_pictures_need(name: str) -> None:
    model = PUBLISHED[name]
    vision_experts = numbers(model, "mixed", part="vision_experts")
    their_routers = numbers(model, "mixed", part="routers") // 2
    whole = numbers(model, "mixed", "vision")
    assert numbers(model, "vision") == VISION_ONLY[name]
    assert numbers(model, "decode") == whole - vision_experts - their_routers - VISION_ONLY[name]
    assert numbers(model, "prefill") == numbers(model, "mixed") == whole - VISION_ONLY[name]


def parts_of(name: str) -> str:
    """The part that a parameter of `model/` belongs to."""
    if name.startswith(("tower", "resampler")):
        return "vit" if name.startswith("tower") else "resampler"
    for piece, part in (("router", "routers"), ("pools.0", "text_experts"), ("pools.1", "vision_experts"), ("norm", "norms"),
                        ("shared", "shared_experts"), ("attention", "attention"), ("mlp", "dense_mlp"), ("embed", "embedding")):  # fmt: skip
        if piece in name and not (piece == "attention" and "post_attention_norm" in name):
            return part
    return name


@pytest.mark.parametrize("role", ["prefill", "decode", "vision"])
@pytest.mark.parametrize("name", ["28b", "424b", "tiny"])
def test_every_part_has_the_bytes_of_the_modules(name: str, role: Role) -> None:
    model = tiny.tiny_config() if name == "tiny" else PUBLISHED[name]
    if role == "vision":
        module: torch.nn.Module = build_vision(model, dtype=torch.bfloat16, device=META)
    else:
        module = build_decoder(model, role, dtype=torch.bfloat16, device=META)
    theirs: dict[str, int] = {}
    for parameter_name, parameter in module.named_parameters():
        part = parts_of(parameter_name)
        theirs[part] = theirs.get(part, 0) + parameter.nbytes
    ours: dict[str, int] = {}
    for matrix in matrices(model, role):
        ours[matrix.part] = ours.get(matrix.part, 0) + matrix.num_bytes(FORMATS["bfloat16"])
    assert ours == theirs


@settings(max_examples=50, deadline=None)
@given(
    model=st.sampled_from(sorted(PUBLISHED)).map(PUBLISHED.__getitem__),
    role=st.sampled_from(["prefill", "decode"]),
    form=st.sampled_from(list(FORMATS.values())),
    tp=st.sampled_from([1, 2, 4, 8]),
    dp=st.sampled_from([1, 2, 4, 8]),
)
def test_all_ranks_add_up_to_the_whole_and_its_copies(
    model: ModelConfig, role: Role, form: WeightFormat, tp: int, dp: int
) -> None:
    dims = ParallelDims(tp, dp)
    if not divides(model, dims):
        return
    ranks = [rank_matrices(model, role, dims, rank) for rank in range(dims.world)]
    for i, whole in enumerate(matrices(model, role)):
        pieces = [rank[i] for rank in ranks]
        assert sum(p.numbers for p in pieces) == whole.numbers * whole.copies(dims)
        assert sum(p.num_bytes(form) for p in pieces) == whole.num_bytes(form) * whole.copies(dims)
        scales, whole_scales = sum(p.scale_bytes(form) for p in pieces), whole.scale_bytes(form) * whole.copies(dims)
        if whole.split == "columns" and form.block == (1, 0):  # each rank scales its part of a row for itself
            assert scales == whole_scales * tp
        else:
            assert scales == whole_scales


def test_a_redundant_slot_costs_an_expert_of_each_modality_in_each_layer() -> None:
    model = PUBLISHED["28b"]
    assert model.text.text_experts is not None
    assert model.text.vision_experts is not None
    widths = model.text.text_experts.intermediate_size + model.text.vision_experts.intermediate_size
    plain, with_slots = (
        sum(m.num_bytes(FORMATS["bfloat16"]) for m in rank_matrices(model, "mixed", ParallelDims(2, 2, spare), 3))
        for spare in (0, 2)
    )
    one_of_each = 3 * widths * model.text.hidden_size * len(model.text.sparse_layers) * 2
    assert with_slots - plain == 2 * one_of_each


def test_what_does_not_divide_by_tp_still_adds_up() -> None:
    model = PUBLISHED["0.3b"]  # 103,424 words over 3 ranks: 34,474 + 34,475 + 34,475
    rows = [rank_matrices(model, "mixed", ParallelDims(3), r)[0].rows for r in range(3)]
    assert sum(rows) == 103_424
    assert max(rows) - min(rows) == 1


@pytest.mark.parametrize(
    ("name", "form", "gigabytes"),
    [
        ("28b", "bfloat16", 58.8), ("28b", "wint8", 30.5), ("28b", "wint4", 16.9), ("28b", "fp8", 30.5),
        ("424b", "bfloat16", 847.2), ("424b", "wint8", 426.2), ("424b", "wint4", 220.8), ("424b", "fp8", 426.2),
        ("300b", "bfloat16", 599.0), ("300b", "wint8", 301.3), ("300b", "wint4", 157.5), ("21b", "wint4", 11.9),
    ],
)  # fmt: skip
def test_formats_take_the_known_sizes(name: str, form: str, gigabytes: float) -> None:
    held = [*matrices(PUBLISHED[name], "mixed"), *matrices(PUBLISHED[name], "vision")]
    values = sum(m.num_bytes(FORMATS[form]) for m in held)
    scales = sum(m.scale_bytes(FORMATS[form]) for m in held)
    assert values / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert scales <= 0.005 * values


def test_scales_of_one_matrix() -> None:
    assert FORMATS["wint8"].scale_bytes("linear", 1536, 2560) == 1536 * 4
    assert FORMATS["fp8"].scale_bytes("expert", 1536, 2560) == 12 * 20 * 4
    assert FORMATS["fp8"].scale_bytes("expert", 130, 129) == 2 * 2 * 4
    assert FORMATS["wint4"].scale_bytes("plain", 1536, 2560) == 0
    assert FORMATS["wint4"].num_bytes("expert", 3, 5) == 3 * 3
