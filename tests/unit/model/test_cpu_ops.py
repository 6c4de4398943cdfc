"""The compiled kernels give what plain torch gives, to the rounding of bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ernie_cluster.config.quantization import METHODS
from ernie_cluster.model.kv_pages import PAGES
from ernie_cluster.model.ops import ExpertWeights, TorchOps
from ernie_cluster.model.packing import make_step
from ernie_cluster.model.quant import codec_of
from tests.quantised import quantised

cpu_ops = pytest.importorskip("ernie_cluster.model.cpu_ops")
PLAIN = TorchOps()


@pytest.fixture(scope="module")
def compiled() -> TorchOps:
    return cpu_ops.NumbaOps()  # type: ignore[no-any-return]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_close(got: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor) -> None:
    """`got` is as near to the float64 result as bfloat16's 8 bits allow, and near to torch's."""
    scale = exact.abs().max()
    assert (got.double() - exact).abs().max() <= 2**-7 * scale
    torch.testing.assert_close(got, expected, atol=float(scale) * 2**-6, rtol=2**-6)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize(("size_in", "size_out"), [(64, 48), (96, 7), (128, 33)])
def test_linear(compiled: TorchOps, num_tokens: int, size_in: int, size_out: int) -> None:
    x, w = random(num_tokens, size_in), random(size_out, size_in, seed=1)
    assert_close(compiled.linear(x, w), PLAIN.linear(x, w), x.double() @ w.double().T)


@pytest.mark.parametrize("num_tokens", [1, 4, 9])
def test_gated_mlp(compiled: TorchOps, num_tokens: int) -> None:
    x, gate_up, down = random(num_tokens, 64), random(2 * 40, 64, seed=1) / 8, random(64, 40, seed=2) / 6
    gate, up = (x.double() @ gate_up.double().T).chunk(2, -1)
    exact = (torch.nn.functional.silu(gate) * up) @ down.double().T
    assert_close(compiled.gated_mlp(x, gate_up, down), PLAIN.gated_mlp(x, gate_up, down), exact)


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 16])
def test_experts(compiled: TorchOps, num_tokens: int) -> None:
    pool = ExpertWeights(random(6, 2 * 24, 64, seed=1) / 8, random(6, 64, 24, seed=2) / 5)
    x = random(num_tokens, 64)
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, 3, generator=generator)
    exact = torch.zeros(num_tokens, 64, dtype=torch.float64)
    for m in range(num_tokens):
        for k in range(3):
            e = int(ids[m, k])
            gate, up = (pool.gate_up_EWD[e].double() @ x[m].double()).chunk(2)
            exact[m] += weights[m, k].double() * (pool.down_EDW[e].double() @ (torch.nn.functional.silu(gate) * up))
    assert_close(compiled.experts(x, [pool], ids, weights), PLAIN.experts(x, [pool], ids, weights), exact)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_route(compiled: TorchOps, num_tokens: int) -> None:
    x, weight, bias = random(num_tokens, 64), torch.randn(8, 64), torch.randn(8) / 10
    got, expected = (ops.route(x, weight, bias, 3, 1e-12) for ops in (compiled, PLAIN))
    for m in range(num_tokens):  # the order of the chosen does not matter
        pairs = [dict(zip(ids[m].tolist(), weights[m].tolist(), strict=True)) for ids, weights in (got, expected)]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-4)


def test_add_rms_norm_is_bit_equal(compiled: TorchOps) -> None:
    x, residual, weight = random(5, 96), random(5, 96, seed=1), random(96, seed=2)
    got, got_residual = compiled.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_residual = PLAIN.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(got_residual, expected_residual)
    torch.testing.assert_close(got, expected, atol=0, rtol=2**-7)


@pytest.mark.parametrize("lens", [[1], [5, 1], [16, 17, 40]])
def test_rope_and_attention(compiled: TorchOps, lens: list[int]) -> None:
    heads, kv_heads, dim, block = 4, 2, 32, 8
    batch, widest = len(lens), 6
    tables = (torch.randperm(batch * widest, generator=torch.Generator().manual_seed(1)) + 1).view(batch, widest).int()
    slots = torch.tensor([int(tables[b, (n - 1) // block]) * block + (n - 1) % block for b, n in enumerate(lens)])
    angle = torch.rand(batch, dim // 2)
    qkv = random(batch, (heads + 2 * kv_heads) * dim)
    step = make_step(
        token_ids=[0] * batch,
        positions=0,
        slots=slots,
        block_tables=tables.numpy(),
        query_lens=[1] * batch,
        context_lens=lens,
        num_decode=batch,
        logits_rows=range(batch),
        device=torch.device("cpu"),
    )
    results = []
    for ops in (compiled, PLAIN):
        pages = (
            random(batch * widest + 1, block, kv_heads, dim, seed=5),
            random(batch * widest + 1, block, kv_heads, dim, seed=6),
        )
        q = ops.rotate_and_store(qkv, angle.cos(), angle.sin(), slots, pages, heads)
        results.append((q, *pages, ops.attention(q, pages, step)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2**-7, rtol=2**-6)


def test_pictures_fall_back_to_torch(compiled: TorchOps) -> None:
    pools = [ExpertWeights(random(2, 16, 32, seed=i), random(2, 32, 8, seed=i)) for i in range(2)]
    x, ids, weights = random(2, 32), torch.tensor([[0], [3]]), torch.ones(2, 1)
    assert torch.equal(compiled.experts(x, pools, ids, weights), PLAIN.experts(x, pools, ids, weights))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_tokens", [1, 6, 20])
def test_products_of_codes(bits: int, num_tokens: int) -> None:
    ops = cpu_ops.NumbaCodeOps()
    codec = codec_of(METHODS["wint4"], bits)
    x, ids = random(num_tokens, 64), torch.arange(2 * num_tokens).view(-1, 2) % 3
    gate_up, down = quantised(random(3, 48, 64, seed=1) / 8, codec), quantised(random(3, 64, 24, seed=2) / 5, codec)
    one, two = quantised(random(48, 64, seed=3) / 8, codec), quantised(random(64, 24, seed=4) / 5, codec)
    assert_close(ops.linear(x, one), PLAIN.linear(x, one), x.double() @ one[...].double().T)
    assert_close(ops.linear(x, one[...]), PLAIN.linear(x, one), x.double() @ one[...].double().T)
    near = {"atol": 2**-5, "rtol": 2**-6}  # both round what is between the products
    torch.testing.assert_close(ops.gated_mlp(x, one, two), PLAIN.gated_mlp(x, one, two), **near)
    shares, pool = torch.full((num_tokens, 2), 0.5), [ExpertWeights(gate_up, down)]
    got, expected = ops.experts(x, pool, ids, shares), PLAIN.experts(x, pool, ids, shares)
    torch.testing.assert_close(got, expected, **near)


def test_pages_in_8_bits_are_left_to_torch() -> None:
    ops, plain = cpu_ops.NumbaOps(PAGES["int8"]), TorchOps(PAGES["int8"])
    both = []
    for each in (ops, plain):
        pages = (torch.zeros(3, 4, 2, 18, dtype=torch.uint8), torch.zeros(3, 4, 2, 18, dtype=torch.uint8))
        angles = torch.linspace(0, 1, 2 * 8).view(2, 8)
        q = each.rotate_and_store(random(2, 8 * 16), angles.cos(), angles.sin(), torch.tensor([4, 9]), pages, 4)
        step = make_step(
            token_ids=[0, 0],
            positions=0,
            slots=[4, 9],
            block_tables=np.array([[1], [2]], np.int32),
            query_lens=[1, 1],
            context_lens=[1, 2],
            num_decode=2,
            logits_rows=[],
            device=torch.device("cpu"),
        )
        both.append((q, *pages, each.decode_attention(q, pages, step)))
    for got, expected in zip(*both, strict=True):
        assert torch.equal(got, expected)
