"""The engine alone on CPU against its bounds: bytes of weights over memory bandwidth, FLOPs over GEMM rate.

    python scripts/bench/engine.py [--threads 2] [--steps 40] [--json]

A random bfloat16 model of the family's shape, text only: hidden 1024, 12 layers, 16 heads of 64, 4 KV heads, 32
experts of width 512 (6 chosen), one shared expert of 512, first layer dense 4096, vocabulary 32,000. All ratios are
taken in one run: bandwidth and GEMM rate are measured before and after, and the better figure of both is the bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from ernie_cluster.actors.process import set_threads
from ernie_cluster.config.model import ExpertPool, ModelConfig, TextConfig
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.model.build import build_decoder
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.moe import SparseMLP
from ernie_cluster.model.weights import randomize
from ernie_cluster.request import GenerationRequest, SamplingParams

CONTEXT = 64
PREFILL = 2000
_numbers = itertools.count()


def bench_config() -> ModelConfig:
    text = TextConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_layers=12, num_heads=16, num_kv_heads=4,
        head_dim=64, rms_norm_eps=1e-5, rope_theta=500000.0, mrope_section=(11, 11, 10), max_position_embeddings=8192,
        tie_word_embeddings=False, use_bias=False, sparse_layers=frozenset(range(1, 12)),
        text_experts=ExpertPool(32, 512, 6), vision_experts=None, shared_intermediate_size=512, norm_min=1e-12,
        router_is_transposed=False,
    )  # fmt: skip
    return ModelConfig(text, None, None, "bfloat16")


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth() -> float:
    """Bytes per second of summing 1 GiB."""
    data = torch.ones(1 << 27, dtype=torch.int64)
    return data.nbytes / best_seconds(data.sum, 5)


def gemm_rate() -> float:
    """bfloat16 FLOPs per second of 2048 x 4096 x 4096, the better of three shapes' best."""
    rates = []
    for m, n, k in ((2048, 2048, 2048), (2048, 4096, 4096), (4096, 4096, 4096)):
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        rates.append(2 * m * n * k / best_seconds(lambda a=a, b=b: torch.nn.functional.linear(a, b), 4))  # type: ignore[misc]
    return max(rates)


def fixed_bytes(decoder: Decoder) -> int:
    """Weights that every step reads: all but the experts and the input embedding."""
    experts = sum(p.nbytes for m in decoder.modules() if isinstance(m, SparseMLP) for p in m.pools.parameters())
    return sum(p.nbytes for p in decoder.parameters()) - experts - decoder.embed.nbytes


class ExpertCounter:
    """Counts the experts that steps hit, by standing in for the kernel for a while."""

    def __init__(self, decoder: Decoder) -> None:
        self._ops = decoder.ops
        self.hits = 0

    def __enter__(self) -> ExpertCounter:
        original = self._ops.experts

        def experts(x, pools, ids, weights):  # type: ignore[no-untyped-def]
            self.hits += len(ids.unique())
            return original(x, pools, ids, weights)

        self._ops.experts = experts  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self._ops.experts


def request(num_tokens: int, max_tokens: int) -> GenerationRequest:
    number = next(_numbers)
    ids = np.random.default_rng(number).integers(3, 32000, num_tokens, dtype=np.int32)
    positions = np.tile(np.arange(num_tokens, dtype=np.int32), (3, 1))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return GenerationRequest(f"bench-{number}", "bench", ids, positions, sampling)


def make_worker(decoder: Decoder, config: ModelConfig) -> Worker:
    settings = WorkerSettings(
        block_size=16, max_batch_tokens=2048, max_num_seqs=64, enable_prefix_cache=False, reserve_output_tokens=256,
        lease_timeout_s=600, piece_bytes=1 << 22, can_encode=False,
    )  # fmt: skip
    worker = Worker(Runner.around(decoder, num_blocks=1024, block_size=16), config, settings, lambda outcomes: None)
    worker.warm_up()
    return worker


def decode(worker: Worker, batch: int, steps: int) -> tuple[float, float, float]:
    """(median seconds of an engine step, of the model alone within it, experts hit per step) at a batch size."""
    for _ in range(batch):
        worker.open_prefill(request(CONTEXT, steps + 20), 0, None)
    engine = worker.engine
    for _ in range(6):
        engine.step()
    times, run_times = [], []
    for _ in range(steps):
        run_before, start = engine.counters.run_s, time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
        run_times.append(engine.counters.run_s - run_before)
    with ExpertCounter(engine.runner.decoder) as counter:
        for _ in range(10):
            engine.step()
    while engine.step():
        pass
    return statistics.median(times), statistics.median(run_times), counter.hits / 10


def prefill_flops(config: TextConfig, num_tokens: int) -> float:
    """Multiply-adds x 2 of one prompt: projections, active experts, causal attention; the head for one token."""
    c = config
    assert c.text_experts is not None
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    sparse = 3 * c.hidden_size * (c.text_experts.top_k * c.text_experts.intermediate_size + c.shared_intermediate_size)
    dense = 3 * c.hidden_size * c.intermediate_size
    num_dense = c.num_layers - len(c.sparse_layers)
    linear = c.num_layers * attention + len(c.sparse_layers) * sparse + num_dense * dense
    scores = (
        c.num_layers * 2 * c.num_heads * c.head_dim * num_tokens / 2
    )  # per token: q.k and p.v over half the context
    return 2.0 * num_tokens * (linear + scores) + 2.0 * c.hidden_size * c.vocab_size


def prefill(worker: Worker, repeats: int) -> float:
    """Best seconds of an engine step over one prompt."""
    times = []
    for _ in range(repeats):
        worker.open_prefill(request(PREFILL, 1), 0, None)
        start = time.perf_counter()
        worker.engine.step()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="decode steps per batch size")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    set_threads(args.threads)
    config = bench_config()
    decoder = build_decoder(config, "decode", dtype=torch.bfloat16, device=torch.device("cpu"))
    randomize(decoder)
    for p in decoder.named_parameters():
        if p[0].endswith("router.bias"):
            p[1].zero_()
    worker = make_worker(decoder, config)
    bandwidth, rate = read_bandwidth(), gemm_rate()
    expert_bytes = 3 * 1024 * 512 * 2
    rows: list[dict[str, float | str]] = []
    for batch in (1, 8):
        step_s, run_s, hits = decode(worker, batch, args.steps)
        num_bytes = fixed_bytes(decoder) + hits * expert_bytes
        rows.append({"what": f"decode, batch {batch}", "ms": step_s * 1e3, "model ms": run_s * 1e3,
                     "GB touched": num_bytes / 1e9, "GB/s": num_bytes / step_s / 1e9})  # fmt: skip
    seconds, flops = prefill(worker, 3), prefill_flops(config.text, PREFILL)
    bandwidth, rate = max(bandwidth, read_bandwidth()), max(rate, gemm_rate())
    for row in rows:
        row["times the reading"] = float(row["ms"]) / 1e3 * bandwidth / (float(row["GB touched"]) * 1e9)
    rows.append({"what": f"prefill, {PREFILL} tokens", "ms": seconds * 1e3, "GFLOP/s": flops / seconds / 1e9,
                 "share of GEMM rate": flops / seconds / rate})  # fmt: skip
    result = {"threads": args.threads, "read GB/s": bandwidth / 1e9, "GEMM GFLOP/s": rate / 1e9, "rows": rows}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.threads} threads; reading {bandwidth / 1e9:.1f} GB/s, bf16 GEMM {rate / 1e9:.0f} GFLOP/s")
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v:<22}" for k, v in row.items()))


if __name__ == "__main__":
    main()
