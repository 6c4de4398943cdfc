"""Compiled kernels for small bfloat16 batches on CPU.

A decode step reads every weight that its tokens touch once, so its bound is memory bandwidth. torch's bfloat16
products pay 50 to 100 us per call and reach half of the bandwidth at these sizes; these loops keep the whole row of
weights in registers for up to four tokens and cost a few us per call. Measured in `scripts/bench/engine.py`.

numba has no bfloat16: arrays hold the bits, two weights per uint32. Of such a pair the low half is the even element
and the high half the odd one, so inputs are kept as separate even and odd halves, in float32; sums are float32.
Shapes: M tokens, K inputs, N outputs, E experts, W width, P = M * experts per token.
"""

from __future__ import annotations

import os

import llvmlite.binding as llvm
import numpy as np

# LLVM keeps to 256-bit vectors on most CPUs for the sake of their clock; these loops gain 40 % with 512
os.environ.setdefault("NUMBA_CPU_NAME", llvm.get_host_cpu_name())
os.environ.setdefault("NUMBA_CPU_FEATURES", llvm.get_host_cpu_features().flatten() + ",-prefer-256-bit")

import numba
from llvmlite import ir
from numba.extending import intrinsic, overload

_OPTIONS = {"fastmath": True, "nogil": True, "boundscheck": False, "error_model": "numpy", "cache": True}
_ROWS = 16
"""Output rows that one thread takes at a time."""
_AHEAD = 1024
"""Pairs (4 KiB) by which weights are asked for before they are needed: the hardware's own prefetching stops at each
page and leaves a quarter of the bandwidth unused."""
_LINE = 16
"""Pairs per cache line."""


@intrinsic
def _prefetch(typing_context, array, index):
    """Ask for the cache line of array[index]; an index beyond the end does no harm."""
    signature = numba.types.void(array, index)

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        address = builder.bitcast(builder.gep(data, [args[1]]), byte)
        builder.call(function, [address, *(ir.Constant(number, v) for v in (0, 3, 1))])  # to read, keep, data
        return context.get_dummy_value()

    return signature, codegen


def _even(pair):
    """The even number of a pair: bfloat16 bits in a uint32, int8 codes in a uint16, or 4-bit codes in a uint8."""
    raise NotImplementedError("compiled code only")


def _odd(pair):
    """The odd number, likewise."""
    raise NotImplementedError("compiled code only")


@overload(_even, inline="always")
def _even_of(pair):
    return {
        numba.uint32: lambda pair: np.uint32(pair << np.uint32(16)).view(np.float32),
        numba.uint16: lambda pair: np.float32(np.int8(pair)),
        numba.uint8: lambda pair: np.float32(np.int32(pair & np.uint8(15)) - np.int32(8)),
    }[pair]


@overload(_odd, inline="always")
def _odd_of(pair):
    return {
        numba.uint32: lambda pair: np.uint32(pair & np.uint32(0xFFFF0000)).view(np.float32),
        numba.uint16: lambda pair: np.float32(np.int8(pair >> np.uint16(8))),
        numba.uint8: lambda pair: np.float32(np.int32(pair >> np.uint8(4)) - np.int32(8)),
    }[pair]


@numba.njit(inline="always")
def _widen(bits):
    """bfloat16 bits -> float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@numba.njit(inline="always")
def _narrow(value):
    """float32 -> bfloat16 bits, to nearest even; NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@numba.njit(inline="always")
def _dots(even, odd, start, end, row, out):
    """out[i] = token (start + i) . row, for tokens [start, end); asks for the weights that come 4 KiB later.

    Four tokens at a time, so that a weight is read and widened once for all of them.
    """
    size = row.shape[0]
    for k in range(0, size, _LINE):
        _prefetch(row, k + _AHEAD)
    m = start
    while m + 4 <= end:
        s0 = s1 = s2 = s3 = np.float32(0)
        for k in range(size):
            pair = row[k]
            a, b = _even(pair), _odd(pair)
            s0 += even[m, k] * a + odd[m, k] * b
            s1 += even[m + 1, k] * a + odd[m + 1, k] * b
            s2 += even[m + 2, k] * a + odd[m + 2, k] * b
            s3 += even[m + 3, k] * a + odd[m + 3, k] * b
        i = m - start
        out[i], out[i + 1], out[i + 2], out[i + 3] = s0, s1, s2, s3
        m += 4
    while m < end:
        s0 = np.float32(0)
        for k in range(size):
            pair = row[k]
            s0 += even[m, k] * _even(pair) + odd[m, k] * _odd(pair)
        out[m - start] = s0
        m += 1


@numba.njit(**_OPTIONS)
def _split(x, tokens):
    """Even and odd halves, float32 [len(tokens), K / 2] each, of rows `tokens` of bfloat16 bits x [M, K]."""
    half = x.shape[1] // 2
    even, odd = np.empty((len(tokens), half), np.float32), np.empty((len(tokens), half), np.float32)
    for i in range(len(tokens)):
        for k in range(half):
            even[i, k] = _widen(x[tokens[i], 2 * k])
            odd[i, k] = _widen(x[tokens[i], 2 * k + 1])
    return even, odd


@numba.njit(parallel=True, **_OPTIONS)
def linear(x, weight, out):
    """out = x @ weight.T.

    Args:
        x: uint16 [M, K] bits. weight: uint32 [N, K / 2] pairs. out: uint16 [M, N] bits.
    """
    num_tokens, num_rows = x.shape[0], weight.shape[0]
    even, odd = _split(x, np.arange(num_tokens))
    for chunk in numba.prange((num_rows + _ROWS - 1) // _ROWS):
        sums = np.empty(num_tokens, np.float32)
        for n in range(chunk * _ROWS, min(num_rows, (chunk + 1) * _ROWS)):
            _dots(even, odd, 0, num_tokens, weight[n], sums)
            for m in range(num_tokens):
                out[m, n] = _narrow(sums[m])


@numba.njit(parallel=True, **_OPTIONS)
def linear_codes(x, codes, scales, out):
    """out = x @ (codes * scales).T.

    Args:
        x: uint16 [M, K] bits. codes: pairs of them [N, K / 2], uint16 or uint8. scales: float32 [N].
        out: uint16 [M, N] bits.
    """
    num_tokens, num_rows = x.shape[0], codes.shape[0]
    even, odd = _split(x, np.arange(num_tokens))
    for chunk in numba.prange((num_rows + _ROWS - 1) // _ROWS):
        sums = np.empty(num_tokens, np.float32)
        for n in range(chunk * _ROWS, min(num_rows, (chunk + 1) * _ROWS)):
            _dots(even, odd, 0, num_tokens, codes[n], sums)
            for m in range(num_tokens):
                out[m, n] = _narrow(sums[m] * scales[n])


@numba.njit(parallel=True, **_OPTIONS)
def experts(x, gate_up, down, ids, weights, out):
    """out[m] = sum over k of weights[m, k] * down[e](silu(gate[e](x[m])) * up[e](x[m])), e = ids[m, k].

    Tokens are sorted by expert, so that each expert's weights are read once.

    Args:
        x: uint16 [M, K] bits. gate_up: uint32 [E, 2W, K / 2] pairs. down: uint32 [E, K, W / 2] pairs.
        ids: int64 [M, k]. weights: float32 [M, k]. out: uint16 [M, K] bits.
    """
    num_tokens, top_k = ids.shape
    num_pairs, num_experts, width = num_tokens * top_k, gate_up.shape[0], gate_up.shape[1] // 2
    starts = np.zeros(num_experts + 1, np.int64)
    for p in range(num_pairs):
        starts[ids[p // top_k, p % top_k] + 1] += 1
    hits = np.empty(min(num_pairs, num_experts), np.int64)
    num_hits = 0
    for e in range(num_experts):
        if starts[e + 1]:
            hits[num_hits] = e
            num_hits += 1
        starts[e + 1] += starts[e]
    tokens, scales, free = np.empty(num_pairs, np.int64), np.empty(num_pairs, np.float32), starts[:-1].copy()
    for p in range(num_pairs):
        e = ids[p // top_k, p % top_k]
        tokens[free[e]], scales[free[e]] = p // top_k, weights[p // top_k, p % top_k]
        free[e] += 1
    even, odd = _split(x, tokens)
    hidden_even = np.empty((num_pairs, width // 2), np.float32)
    hidden_odd = np.empty((num_pairs, width // 2), np.float32)
    chunks = (width // 2 + _ROWS - 1) // _ROWS
    for work in numba.prange(num_hits * chunks):
        e, chunk = hits[work // chunks], work % chunks
        first, last = starts[e], starts[e + 1]
        gate, up = np.empty(last - first, np.float32), np.empty(last - first, np.float32)
        for j in range(chunk * _ROWS, min(width // 2, (chunk + 1) * _ROWS)):
            for side in range(2):
                target = hidden_odd if side else hidden_even
                _dots(even, odd, first, last, gate_up[e, 2 * j + side], gate)
                _dots(even, odd, first, last, gate_up[e, width + 2 * j + side], up)
                for i in range(last - first):
                    target[first + i, j] = gate[i] / (np.float32(1) + np.exp(-gate[i])) * up[i]
    num_rows = down.shape[1]
    for chunk in numba.prange((num_rows + _ROWS - 1) // _ROWS):
        begin, end = chunk * _ROWS, min(num_rows, (chunk + 1) * _ROWS)
        sums, totals = np.empty(num_pairs, np.float32), np.zeros((num_tokens, _ROWS), np.float32)
        for h in range(num_hits):
            e = hits[h]
            first, last = starts[e], starts[e + 1]
            for n in range(begin, end):
                _dots(hidden_even, hidden_odd, first, last, down[e, n], sums)
                for i in range(last - first):
                    totals[tokens[first + i], n - begin] += scales[first + i] * sums[i]
        for m in range(num_tokens):
            for n in range(begin, end):
                out[m, n] = _narrow(totals[m, n - begin])


@numba.njit(**_OPTIONS)
def route(x, weight, bias, norm_min, ids, weights):
    """Softmax over the experts, top-k by biased and weights by unbiased probability, renormalised.

    Args:
        x: uint16 [M, K] bits. weight: float32 [E, K]. bias: float32 [E]. ids: int64 [M, k] and weights:
        float32 [M, k], written.
    """
    num_experts, size = weight.shape
    token, scores, taken = (
        np.empty(size, np.float32),
        np.empty(num_experts, np.float32),
        np.empty(num_experts, np.bool_),
    )
    for m in range(x.shape[0]):
        for k in range(size):
            token[k] = _widen(x[m, k])
        for e in range(num_experts):
            total = np.float32(0)
            for k in range(size):
                total += token[k] * weight[e, k]
            scores[e] = total
        highest, total = scores.max(), np.float32(0)
        for e in range(num_experts):
            scores[e] = np.exp(scores[e] - highest)
            total += scores[e]
            taken[e] = False
        chosen_total = np.float32(0)
        for i in range(ids.shape[1]):
            best, best_score = -1, np.float32(0)
            for e in range(num_experts):
                score = scores[e] / total + bias[e]
                if not taken[e] and (best < 0 or score > best_score):
                    best, best_score = e, score
            taken[best] = True
            ids[m, i], weights[m, i] = best, scores[best] / total
            chosen_total += weights[m, i]
        for i in range(ids.shape[1]):
            weights[m, i] /= max(chosen_total, np.float32(norm_min))


@numba.njit(**_OPTIONS)
def add_rms_norm(x, residual, weight, eps, out):
    """residual += x; out = rms_norm(residual) * weight; all bfloat16 bits, rounded where torch rounds."""
    num_tokens, size = x.shape
    for m in range(num_tokens):
        total = np.float32(0)
        for k in range(size):
            value = _widen(_narrow(_widen(x[m, k]) + _widen(residual[m, k])))
            residual[m, k] = _narrow(value)
            total += value * value
        scale = np.float32(1) / np.sqrt(total / np.float32(size) + np.float32(eps))
        for k in range(size):
            out[m, k] = _narrow(_widen(_narrow(_widen(residual[m, k]) * scale)) * _widen(weight[k]))


@numba.njit(**_OPTIONS)
def rotate_and_store(qkv, cos, sin, slots, k_pages, v_pages, q):
    """Interleaved rotary embedding of q and k; k and v to their slots.

    Args:
        qkv: uint16 [M, (H + 2G) * D] bits. cos, sin: float32 [M, D / 2]. slots: int64 [M].
        k_pages, v_pages: uint16 [slots, G, D] bits. q: uint16 [M, H, D] bits, written.
    """
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads = k_pages.shape[1]
    for m in range(qkv.shape[0]):
        for head in range(num_heads + num_kv_heads):
            for i in range(head_dim // 2):
                at = head * head_dim + 2 * i
                a, b = _widen(qkv[m, at]), _widen(qkv[m, at + 1])
                first = _narrow(a * cos[m, i] - b * sin[m, i])
                second = _narrow(b * cos[m, i] + a * sin[m, i])
                if head < num_heads:
                    q[m, head, 2 * i], q[m, head, 2 * i + 1] = first, second
                else:
                    k_pages[slots[m], head - num_heads, 2 * i] = first
                    k_pages[slots[m], head - num_heads, 2 * i + 1] = second
        for head in range(num_kv_heads):
            for i in range(head_dim):
                v_pages[slots[m], head, i] = qkv[m, (num_heads + num_kv_heads + head) * head_dim + i]


@numba.njit(parallel=True, **_OPTIONS)
def decode_attention(q, k_pages, v_pages, tables, lens, out):
    """One query per sequence over its pages, where they lie.

    Args:
        q: uint16 [B, H, D] bits. k_pages, v_pages: uint16 [blocks, block_size, G, D] bits.
        tables: int32 [B, M]. lens: int32 [B]. out: uint16 [B, H * D] bits.
    """
    num_heads, head_dim = q.shape[1], q.shape[2]
    block_size, num_kv_heads = k_pages.shape[1], k_pages.shape[2]
    group = num_heads // num_kv_heads
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    for work in numba.prange(q.shape[0] * num_kv_heads):
        b, g = work // num_kv_heads, work % num_kv_heads
        length = lens[b]
        query, total = np.empty((group, head_dim), np.float32), np.zeros((group, head_dim), np.float32)
        for h in range(group):
            for d in range(head_dim):
                query[h, d] = _widen(q[b, g * group + h, d]) * scale
        scores, key = np.empty((group, length), np.float32), np.empty(head_dim, np.float32)
        for position in range(length):
            page, offset = tables[b, position // block_size], position % block_size
            for d in range(head_dim):
                key[d] = _widen(k_pages[page, offset, g, d])
            for h in range(group):
                score = np.float32(0)
                for d in range(head_dim):
                    score += query[h, d] * key[d]
                scores[h, position] = score
        for h in range(group):
            highest = scores[h].max()
            weight = np.float32(0)
            for position in range(length):
                scores[h, position] = np.exp(scores[h, position] - highest)
                weight += scores[h, position]
            for position in range(length):
                scores[h, position] /= weight
        for position in range(length):
            page, offset = tables[b, position // block_size], position % block_size
            for d in range(head_dim):
                key[d] = _widen(v_pages[page, offset, g, d])
            for h in range(group):
                for d in range(head_dim):
                    total[h, d] += scores[h, position] * key[d]
        for h in range(group):
            for d in range(head_dim):
                out[b, (g * group + h) * head_dim + d] = _narrow(total[h, d])
