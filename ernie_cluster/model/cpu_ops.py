"""`PaddedOps` with compiled kernels where they are faster: few tokens, bfloat16, CPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# as many threads as torch has; numba reads this once, when it is imported
os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))

from ernie_cluster.model import cpu_kernels
from ernie_cluster.model.kv_pages import PLAIN_PAGES, PlainPages
from ernie_cluster.model.ops import ExpertWeights
from ernie_cluster.model.padding import PaddedOps
from ernie_cluster.model.step import StepInput
from ernie_cluster.model.storage import QuantisedWeight, Weight

_MOST_TOKENS = 16
"""With more, torch's products re-use each weight often enough to be limited by arithmetic, where they are better."""

# numba's fallback threading layer must not be entered by two threads; uncontended, this costs 0.1 us
_lock = threading.Lock()


def _bits(tensor: Tensor) -> NDArray[np.uint16]:
    """The bits of a contiguous bfloat16 tensor, shared."""
    return tensor.view(torch.uint16).numpy()


def _new(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


class NumbaOps(PaddedOps):
    """See `PaddedOps`; keeps a view of each weight that it has seen. Pages in 8 bits are left to torch."""

    def __init__(self, pages: PlainPages = PLAIN_PAGES) -> None:
        super().__init__(pages)
        self._reads_pages = pages is PLAIN_PAGES
        self._views: dict[int, tuple[Tensor, NDArray[Any]]] = {}

    def linear(self, x_TD: Tensor, weight_OD: Weight) -> Tensor:
        if not 0 < x_TD.shape[0] <= _MOST_TOKENS:
            return super().linear(x_TD, weight_OD)
        out = _new(x_TD.shape[0], weight_OD.shape[0])
        with _lock:
            cpu_kernels.linear(_bits(x_TD.contiguous()), self._pairs(weight_OD), _bits(out))
        return out

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if x_TD.shape[0] > _MOST_TOKENS:
            return super().add_rms_norm(x_TD, residual_TD, weight_D, eps)
        out, residual_TD = torch.empty_like(x_TD), residual_TD.clone()
        cpu_kernels.add_rms_norm(_bits(x_TD.contiguous()), _bits(residual_TD), self._view(weight_D), eps, _bits(out))
        return out, residual_TD

    def gated_mlp(self, x_TD: Tensor, gate_up_WD: Weight, down_DW: Weight) -> Tensor:
        num_tokens = x_TD.shape[0]
        if not 0 < num_tokens <= _MOST_TOKENS:
            return super().gated_mlp(x_TD, gate_up_WD, down_DW)
        ids, ones = np.zeros((num_tokens, 1), np.int64), np.ones((num_tokens, 1), np.float32)
        return self._experts(x_TD, self._pairs(gate_up_WD)[None], self._pairs(down_DW)[None], ids, ones)

    def experts(self, x_TD: Tensor, pools: Sequence[ExpertWeights], ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if not 0 < x_TD.shape[0] <= _MOST_TOKENS or int(ids_TK.max()) >= pools[0].num_experts:
            return super().experts(x_TD, pools, ids_TK, weights_TK)  # pictures come in prompts, not in small steps
        gate_up, down = self._pairs(pools[0].gate_up_EWD), self._pairs(pools[0].down_EDW)
        return self._experts(x_TD, gate_up, down, ids_TK.numpy(), weights_TK.numpy())

    def route(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, top_k: int, norm_min: float
    ) -> tuple[Tensor, Tensor]:
        if x_TD.shape[0] > _MOST_TOKENS:
            return super().route(x_TD, weight_ED, bias_E, top_k, norm_min)
        ids, weights = torch.empty(x_TD.shape[0], top_k, dtype=torch.long), torch.empty(x_TD.shape[0], top_k)
        cpu_kernels.route(
            _bits(x_TD), weight_ED.data.numpy(), bias_E.data.numpy(), norm_min, ids.numpy(), weights.numpy()
        )
        return ids, weights

    def rotate_and_store(
        self,
        qkv_TX: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        slots_T: Tensor,
        pages: tuple[Tensor, Tensor],
        num_heads: int,
    ) -> Tensor:
        if not self._reads_pages or qkv_TX.shape[0] > _MOST_TOKENS:
            return super().rotate_and_store(qkv_TX, cos_TF, sin_TF, slots_T, pages, num_heads)
        q = _new(qkv_TX.shape[0], num_heads, pages[0].shape[-1])
        k_pages, v_pages = (v.reshape(-1, *v.shape[2:]) for v in map(self._view, pages))
        cpu_kernels.rotate_and_store(
            _bits(qkv_TX), cos_TF.numpy(), sin_TF.numpy(), slots_T.numpy(), k_pages, v_pages, _bits(q)
        )
        return q

    def decode_attention(self, q_BHD: Tensor, pages: tuple[Tensor, Tensor], step: StepInput) -> Tensor:
        if not self._reads_pages:
            return super().decode_attention(q_BHD, pages, step)
        out = _new(q_BHD.shape[0], q_BHD.shape[1] * q_BHD.shape[2])
        tables, lens = step.block_tables_BM.numpy(), step.seq_lens_B.numpy()
        with _lock:
            cpu_kernels.decode_attention(
                _bits(q_BHD.contiguous()), self._view(pages[0]), self._view(pages[1]), tables, lens, _bits(out)
            )
        return out

    def _experts(
        self,
        x_TD: Tensor,
        gate_up: NDArray[np.uint32],
        down: NDArray[np.uint32],
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
    ) -> Tensor:
        out = _new(*x_TD.shape)
        with _lock:
            cpu_kernels.experts(_bits(x_TD.contiguous()), gate_up, down, ids, weights, _bits(out))
        return out

    def _view(self, weight: Tensor) -> NDArray[np.uint16]:
        known = self._views.get(id(weight))
        if known is None:
            known = self._views[id(weight)] = (weight, _bits(weight.data))
        return known[1]

    def _pairs(self, weight: Weight) -> NDArray[np.uint32]:
        """Two weights per number, along the last axis; its size is even in every model of the family."""
        assert isinstance(weight, Tensor)
        known = self._views.get(id(weight))
        if known is None:
            known = self._views[id(weight)] = (weight, _bits(weight.data).view(np.uint32))
        return known[1]


class NumbaCodeOps(NumbaOps):
    """Weights of 8 and 4 bits are multiplied as they lie, an expert at a time: unpacking them would cost many times that."""

    gated_mlp = PaddedOps.gated_mlp
    experts = PaddedOps.experts

    def __init__(self, pages: PlainPages = PLAIN_PAGES) -> None:
        super().__init__(pages)
        self._seen: dict[int, tuple[NDArray[Any], NDArray[np.float32]]] = {}

    def linear(self, x_TD: Tensor, weight_OD: Weight) -> Tensor:
        if isinstance(weight_OD, Tensor):  # the head
            return super().linear(x_TD, weight_OD)
        return self._product(x_TD, weight_OD, ...)

    def expert_linear(self, x_TD: Tensor, weight_EOD: Weight, expert: int) -> Tensor:
        return self._product(x_TD, weight_EOD, expert)

    def _product(self, x_TD: Tensor, weight: Weight, index: int | EllipsisType) -> Tensor:
        if not 0 < x_TD.shape[0] <= _MOST_TOKENS:
            return self.dense(x_TD, weight[index])
        codes, scales = self._codes(weight)
        out = _new(x_TD.shape[0], codes.shape[-2])
        with _lock:
            cpu_kernels.linear_codes(_bits(x_TD.contiguous()), codes[index], scales[index], _bits(out))
        return out

    def _codes(self, weight: Weight) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Two codes per number, and the scale of each row."""
        assert isinstance(weight, QuantisedWeight)
        if id(weight) not in self._seen:
            codes, scales = weight.codes.data.numpy(), weight.scales.data[..., 0].contiguous().numpy()
            self._seen[id(weight)] = codes.view(np.uint16) if codes.dtype == np.int8 else codes, scales
        return self._seen[id(weight)]
