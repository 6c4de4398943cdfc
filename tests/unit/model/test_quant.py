"""Laws of codes and scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.quantization import METHODS
from ernie_cluster.model.quant import Codec, codec_of

INT8, INT4 = codec_of(METHODS["wint8"], 8), codec_of(METHODS["wint4"], 4)
FP8 = codec_of(METHODS["fp8"], 8)
SMALL_FP8 = Codec((4, 8), torch.float8_e4m3fn, 448.0)  # the same with more blocks in a small matrix
CODECS = {"int8": INT8, "int4": INT4, "fp8": SMALL_FP8}

FORMS = st.sampled_from(list(CODECS.values()))
SEEDS = st.integers(0, 10**6)


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-12, 9, (rows, 1), generator=generator)
    numbers = torch.randn(rows, columns, generator=generator) * sizes
    numbers[seed % rows] = 0
    return numbers.to(dtype)


def spread(codec: Codec, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    r, c = codec.block[0], codec.block[1] or columns
    return scales.repeat_interleave(r, 0)[:rows].repeat_interleave(c, 1)[:, :columns]


@settings(max_examples=50)
@given(FORMS, st.integers(1, 20), st.integers(1, 33), SEEDS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_number_is_off_by_more_than_half_a_step(
    codec: Codec, rows: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    numbers = matrix(rows, columns, seed, dtype).float()
    codes, scales = codec.quantise(numbers)
    assert codes.shape == codec.codes_shape(rows, columns)
    assert scales.shape == codec.scales_shape(rows, columns)
    got = codec.dequantise(codes, scales, columns, torch.float32)
    step = spread(codec, scales, rows, columns)
    if codec.dtype == torch.float8_e4m3fn:  # three bits behind the point; below 2 ** -6 the steps are equal
        step = torch.maximum(numbers.abs() / 8, step * 2.0**-9)
    assert ((got - numbers).abs() <= step / 2 * (1 + 1e-5)).all()
    assert (got[numbers == 0] == 0).all()


@settings(max_examples=50)
@given(FORMS, st.integers(1, 20), st.integers(1, 33), SEEDS)
def test_quantising_again_changes_nothing(codec: Codec, rows: int, columns: int, seed: int) -> None:
    codes, scales = codec.quantise(matrix(rows, columns, seed))
    again = codec.quantise(codec.dequantise(codes, scales, columns, torch.float32))
    assert torch.equal(again[0].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(again[1], scales)


@settings(max_examples=50)
@given(FORMS, SEEDS, st.integers(0, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_a_part_is_quantised_as_in_the_whole(
    codec: Codec, seed: int, row: int, height: int, column: int, width: int, is_ragged: bool
) -> None:
    """Rows may be quantised without the others; columns are cut after the whole row is known."""
    rows, columns = 32 - 3 * is_ragged, 48 - 2 * is_ragged
    numbers = matrix(rows, columns, seed)
    whole = codec.dequantise(*codec.quantise(numbers), columns, torch.float32)
    part = slice(4 * row, min(rows, 4 * (row + height))), slice(8 * column, min(columns, 8 * (column + width)))
    codes, scales = codec.quantise(numbers[part[0]])
    kept = slice(0, part[0].stop - part[0].start), part[1]
    mine = codes[codec.codes_part(*kept)], scales[codec.scales_part(*kept)]
    got = codec.dequantise(*mine, part[1].stop - part[1].start, torch.float32)
    assert torch.equal(got, whole[part])
    from_whole = codec.quantise(numbers)
    assert torch.equal(mine[0].view(torch.uint8), from_whole[0][codec.codes_part(*part)].view(torch.uint8))
    assert torch.equal(mine[1], from_whole[1][codec.scales_part(*part)])


@settings(max_examples=50)
@given(st.sampled_from([INT8, INT4, FP8]), SEEDS)
def test_the_models_own_type_rounds_once(codec: Codec, seed: int) -> None:
    codes, scales = codec.quantise(matrix(5, 12, seed))
    exact = codec.dequantise(codes, scales, 12, torch.float32)
    assert torch.equal(codec.dequantise(codes, scales, 12, torch.bfloat16), exact.bfloat16())


def test_codes_and_scales_of_one_row() -> None:
    codes, scales = INT8.quantise(torch.tensor([[127.0, -64.4, 0.6, -127.0]]))
    assert (codes.tolist(), scales.tolist()) == ([[127, -64, 1, -127]], [[1.0]])
    packed, scales = INT4.quantise(torch.tensor([[3.5, -3.5, 0.0]]))
    assert (packed.tolist(), scales.tolist()) == ([[15 | 1 << 4, 8]], [[0.5]])
    assert FP8.quantise(torch.ones(130, 129))[1].tolist() == [[0.002227783203125] * 2] * 2  # 1 / 448, to eight bits


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_scale(name: str, number: float) -> None:
    numbers = torch.ones(8, 16)
    numbers[3, 5] = number
    assert not CODECS[name].quantise(numbers)[1].isfinite().all()


def test_a_part_inside_a_block_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="row 64 lies inside a block of 128"):
        FP8.scales_part(slice(64, 128), slice(0, 128))
    with pytest.raises(AssertionError, match="column 64 lies inside a block of 128"):
        FP8.scales_part(slice(0, 128), slice(64, 128))
    with pytest.raises(AssertionError, match="column 3 lies inside a stored number"):
        INT4.codes_part(slice(0, 1), slice(3, 4))
