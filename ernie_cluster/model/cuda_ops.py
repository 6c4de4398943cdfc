"""What GPUs run: the calls of `TorchOps` without a question to the device. Shapes as in `ops`; P = tokens x experts per
token, N = 2 x width of an MLP.

Every shape follows from the shapes of the arguments and every number stays on the device. So the host never waits
inside a step, and a decode step can be captured as a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ernie_cluster.model.kv_pages import PLAIN_PAGES, PlainPages
from ernie_cluster.model.ops import ExpertWeights, TorchOps, choose_experts
from ernie_cluster.model.step import StepInput

log = logging.getLogger(__name__)

Args = ParamSpec("Args")
Out = TypeVar("Out")


class PagedAttention(Protocol):
    """See `TorchOps.attention`; `flash.FlashAttention` is the GPU's."""

    def __call__(self, q_THD: Tensor, pages: tuple[Tensor, Tensor], step: StepInput) -> Tensor: ...

    def check(self, block_size: int) -> None:
        """See `TorchOps.check_block_size`."""
        ...


def turn(heads_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """`rope.rotate_interleaved` in real numbers, which compilers know to fuse."""
    pairs = heads_THD.float().reshape(*heads_THD.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(heads_THD.dtype)


def combine(done: Sequence[Tensor], place_P: Tensor, starts: Sequence[Tensor], weights_TK: Tensor) -> Tensor:
    """Each token's outputs of its experts, weighted and added up in float32 -> [T, D].

    Args:
        done: of each pool [P, D]; its first row belongs to place `starts[i]`, and rows behind its last are undefined.
        place_P: int64; where each (token, expert) stands among all, sorted by expert.
        starts: int64 scalars: first place of each pool, and behind the last pool the first place that adds nothing.
        weights_TK: float32.
    """
    num_places = len(place_P)
    parts = []
    for i, out in enumerate(done):
        is_here = (place_P >= starts[i]) & (place_P < starts[i + 1])
        rows = out.index_select(0, (place_P - starts[i]) % num_places)
        parts.append(torch.where(is_here[:, None], rows, 0.0).float())  # never multiplied: undefined may be NaN
    weighted = sum(parts[1:], parts[0]).view(*weights_TK.shape, -1) * weights_TK[..., None]
    return weighted.sum(1).to(done[0].dtype)


class Fuse(Protocol):
    """Makes one kernel of what is many small ones."""

    def __call__(self, function: Callable[Args, Out], /) -> Callable[Args, Out]: ...


def plainly(function: Callable[Args, Out], /) -> Callable[Args, Out]:
    """As it is: on CPU and in tests."""
    return function


def fused(function: Callable[Args, Out], /) -> Callable[Args, Out]:
    """Compiled at the first call, again when a size first changes, then no more."""
    return torch.compile(function)


def choose_fuse() -> Fuse:
    """`fused` where its compiler can run, which needs Triton and a C compiler; else `plainly`, and a line in the log."""
    if importlib.util.find_spec("triton") is None:
        missing = "triton, which comes with torch's builds for CUDA"
    elif not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        missing = "a C compiler: install gcc, or name one in CC"
    else:
        return fused
    log.warning("small operations are not fused, so steps are slower: this machine has not %s", missing)
    return plainly


class CudaOps(TorchOps):
    """Paged attention in one call, experts as grouped products, small operations fused.

    Args:
        attend: the attention; knows the pages.
        fuse: `fused`, or `plainly`.
        pages: how K and V lie in the cache.
    """

    def __init__(self, attend: PagedAttention, fuse: Fuse = plainly, pages: PlainPages = PLAIN_PAGES) -> None:
        super().__init__(pages)
        plain = TorchOps()
        self.attend = attend
        self._norm, self._add_norm = fuse(plain.rms_norm), fuse(plain.add_rms_norm)
        self._gate, self._turn = fuse(plain.gate), fuse(turn)
        self._choose, self._combine = fuse(choose_experts), fuse(combine)

    def check_block_size(self, block_size: int) -> None:
        self.attend.check(block_size)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self._norm(x_TD, weight_D, eps)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._add_norm(x_TD, residual_TD, weight_D, eps)

    def gate(self, gate_up_TN: Tensor) -> Tensor:
        return self._gate(gate_up_TN)

    def turn(self, heads_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        return self._turn(heads_THD, cos_TF, sin_TF)

    def attention(self, q_THD: Tensor, pages: tuple[Tensor, Tensor], step: StepInput) -> Tensor:
        return self.attend(q_THD, pages, step)

    def route(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, top_k: int, norm_min: float
    ) -> tuple[Tensor, Tensor]:
        return self._choose(functional.linear(x_TD.float(), weight_ED), bias_E, top_k, norm_min)

    def experts(self, x_TD: Tensor, pools: Sequence[ExpertWeights], ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See `TorchOps`. A grouped product begins at its first row and leaves those behind its last group undefined.

        So for each pool the sorted rows are rolled until its own come first, and of the results only its own are taken;
        those of the expert that adds nothing are behind everybody's.
        """
        if not len(x_TD):
            return x_TD
        num_places, num_experts = ids_TK.numel(), sum(p.num_experts for p in pools)
        by_expert = ids_TK.view(-1).sort(stable=True)
        order, place = by_expert.indices, torch.arange(num_places, device=x_TD.device)
        experts = torch.arange(num_experts, device=x_TD.device)
        ends = torch.searchsorted(by_expert.values, experts, right=True)  # a histogram of fixed shape, added up
        starts, done, first = [ends.new_zeros(())], [], 0
        for pool in pools:
            last = first + pool.num_experts
            token = order.index_select(0, (place + starts[-1]) % num_places) // ids_TK.shape[1]
            offsets = (ends[first:last] - starts[-1]).int()
            done.append(self._run_pool(x_TD.index_select(0, token), pool, offsets))
            starts.append(ends[last - 1])
            first = last
        return self._combine(done, torch.empty_like(order).scatter_(0, order, place), starts, weights_TK)

    def _run_pool(self, rows_PD: Tensor, pool: ExpertWeights, offsets_E: Tensor) -> Tensor:
        """Rows sorted by expert, each through its own -> [P, D]; `offsets_E` int32 are the ends of the experts' rows."""
        if pool.is_packed and len(rows_PD) < pool.num_experts:
            return self._run_rows(rows_PD, pool, offsets_E)
        gate_up = functional.grouped_mm(rows_PD, pool.gate_up_EWD[...].transpose(1, 2), offs=offsets_E)
        return functional.grouped_mm(self.gate(gate_up), pool.down_EDW[...].transpose(1, 2), offs=offsets_E)

    def _run_rows(self, rows_PD: Tensor, pool: ExpertWeights, offsets_E: Tensor) -> Tensor:
        """The same for a few rows: each row's expert is unpacked for itself, and not all there are."""
        place = torch.arange(len(rows_PD), dtype=offsets_E.dtype, device=rows_PD.device)
        expert_P = torch.searchsorted(offsets_E, place, right=True).clamp_(max=pool.num_experts - 1)
        gate_up = torch.bmm(pool.gate_up_EWD[expert_P], rows_PD[:, :, None]).squeeze(-1)
        return torch.bmm(pool.down_EDW[expert_P], self.gate(gate_up)[:, :, None]).squeeze(-1)
