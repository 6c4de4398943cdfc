"""The engine alone on CPU against its bounds: bytes of weights over memory bandwidth, FLOPs over GEMM rate.

    python scripts/bench/engine.py [--threads 2] [--steps 40] [--quantization wint8] [--json]

A random bfloat16 model of the family's shape, text only: hidden 1024, 12 layers, 16 heads of 64, 4 KV heads, 32
experts of width 512 (6 chosen), one shared expert of 512, first layer dense 4096, vocabulary 32,000. All ratios are
taken in one run, each measurement beside its own measurement of the bound: shared machines change by the second.
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


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Median over a few repeats."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Bounds:
    """What the machine can do at this moment; asked again before each measurement, as shared machines change."""

    def __init__(self) -> None:
        self._data = torch.ones(1 << 27, dtype=torch.int64)
        self._a, self._b = torch.randn(2048, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()

    def bandwidth(self) -> float:
        """Bytes per second of summing 1 GiB."""
        return self._data.nbytes / seconds_of(self._data.sum, 3)

    def gemm_rate(self) -> float:
        """bfloat16 FLOPs per second of 2048 x 4096 x 4096."""
        return 2 * 2048 * 4096 * 4096 / seconds_of(lambda: torch.nn.functional.linear(self._a, self._b), 3)


def fixed_bytes(decoder: Decoder) -> int:
    """Weights that every step reads: all but the experts and the input embedding."""
    experts = sum(p.nbytes for m in decoder.modules() if isinstance(m, SparseMLP) for p in m.pools.parameters())
    return sum(p.nbytes for p in decoder.parameters()) - experts - decoder.embed.nbytes


def expert_bytes(decoder: Decoder) -> float:
    """Of one expert."""
    pool = next(m for m in decoder.modules() if isinstance(m, SparseMLP)).pools[0]
    return sum(p.nbytes / len(p) for p in pool.parameters())


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


def decode(worker: Worker, bounds: Bounds, batch: int, rounds: int, steps: int) -> dict[str, float | str]:
    """Engine steps at one batch size, in rounds, each beside its own measurement of the bandwidth."""
    decoder, engine = worker.engine.runner.decoder, worker.engine
    for _ in range(batch):
        worker.open_prefill(request(CONTEXT, rounds * steps + 40), 0, None)
    for _ in range(6):
        engine.step()
    with ExpertCounter(decoder) as counter:
        for _ in range(10):
            engine.step()
    num_bytes = fixed_bytes(decoder) + counter.hits / 10 * expert_bytes(decoder)
    times, model_times, ratios, rates = [], [], [], []
    for _ in range(rounds):
        rates.append(bounds.bandwidth())
        run_before, start = engine.counters.run_s, time.perf_counter()
        for _ in range(steps):
            engine.step()
        times.append((time.perf_counter() - start) / steps)
        model_times.append((engine.counters.run_s - run_before) / steps)
        ratios.append(times[-1] * rates[-1] / num_bytes)
    while engine.step():
        pass
    return {
        "what": f"decode, batch {batch}",
        "ms per step": statistics.median(times) * 1e3,
        "of it the model": statistics.median(model_times) * 1e3,
        "GB touched": num_bytes / 1e9,
        "GB/s": num_bytes / statistics.median(times) / 1e9,
        "reading GB/s": statistics.median(rates) / 1e9,
        "times the reading": statistics.median(ratios),
    }


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


def prefill(worker: Worker, bounds: Bounds, config: TextConfig, rounds: int) -> dict[str, float | str]:
    """One prompt in one engine step, in rounds, each beside its own measurement of the GEMM rate."""
    flops = prefill_flops(config, PREFILL)
    times, shares, rates = [], [], []
    for _ in range(rounds):
        rates.append(bounds.gemm_rate())
        worker.open_prefill(request(PREFILL, 1), 0, None)
        start = time.perf_counter()
        worker.engine.step()
        times.append(time.perf_counter() - start)
        shares.append(flops / times[-1] / rates[-1])
    return {
        "what": f"prefill, {PREFILL} tokens",
        "ms": statistics.median(times) * 1e3,
        "GFLOP/s": flops / statistics.median(times) / 1e9,
        "GEMM GFLOP/s": statistics.median(rates) / 1e9,
        "share of GEMM rate": statistics.median(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="decode steps per round")
    parser.add_argument("--quantization", choices=["none", "wint8", "wint4"], default="none")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    set_threads(args.threads)
    config = bench_config()
    decoder = build_decoder(
        config, "decode", dtype=torch.bfloat16, device=torch.device("cpu"), quantization=args.quantization
    )
    randomize(decoder)
    worker, bounds = make_worker(decoder, config), Bounds()
    rows = [decode(worker, bounds, batch, args.rounds, args.steps) for batch in (1, 8)]
    rows.append(prefill(worker, bounds, config.text, args.rounds))
    if args.json:
        print(json.dumps({"threads": args.threads, "rows": rows}))
        return
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v:<20}" for k, v in row.items()))


if __name__ == "__main__":
    main()
