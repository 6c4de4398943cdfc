"""A prompt that comes back after the KV cache has forgotten it: restored from the host's memory against computed again.

    python scripts/bench/host_tier.py [--threads 2] [--tokens 1024] [--rounds 5] [--json]

The random model of `engine.py`, on CPU: 24 KiB of KV per token, 384 KiB per block of 16. Times of a prompt run from
asking to the first token, alone on the engine: computed, restored but for its last block, and found in the cache but for
the same block. Copies of blocks are measured beside a plain copy of as many bytes, all in one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch
from engine import bench_config, request

from ernie_cluster.actors.process import set_threads
from ernie_cluster.engine.host_tier import HostMemory
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.model.build import build_decoder
from ernie_cluster.model.weights import randomize
from ernie_cluster.request import GenerationRequest

BLOCK_SIZE = 16


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def make_worker(num_blocks: int) -> Worker:
    """With as many blocks on the host as in the cache."""
    config = bench_config()
    decoder = build_decoder(config, "mixed", dtype=torch.bfloat16, device=torch.device("cpu"))
    randomize(decoder)
    settings = WorkerSettings(
        block_size=BLOCK_SIZE, max_batch_tokens=2048, max_num_seqs=8, enable_prefix_cache=True, reserve_output_tokens=0,
        lease_timeout_s=600, piece_bytes=1 << 22, can_encode=False, host_blocks=num_blocks,
    )  # fmt: skip
    runner = Runner.around(decoder, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    return Worker(runner, config, settings, lambda outcomes: None)


class Prompts:
    """Asks a worker for one prompt again and again."""

    def __init__(self, worker: Worker, num_tokens: int) -> None:
        self._worker = worker
        self._prompt = request(num_tokens, 1)
        self._numbers = itertools.count()

    def first_token_s(self, salt: bytes = b"") -> float:
        """Of a request whose prefix is shared with those of the same salt."""
        again = dataclasses.replace(self._prompt, request_id=f"again-{next(self._numbers)}", cache_salt=salt)
        return seconds(lambda: self._run(again))

    def forget(self) -> float:
        """The cache gives all its blocks to others, who give them back; seconds."""
        pool = self._worker.pool
        return seconds(lambda: pool.free(pool.allocate(pool.num_free)))

    def _run(self, asked: GenerationRequest) -> None:
        self._worker.open_prefill(asked, 0, None)
        while self._worker.engine.step():
            pass


def copies(num_blocks: int, rounds: int) -> dict[str, float]:
    """Bytes per second of copying scattered blocks out and back, and of a plain copy of as many bytes beside each."""
    text = bench_config().text
    shape = text.num_layers, 2, 2 * num_blocks, BLOCK_SIZE, text.num_kv_heads, text.head_dim
    kv = torch.ones(shape, dtype=torch.bfloat16)
    memory = HostMemory(kv, num_blocks)
    pairs = list(enumerate(torch.randperm(2 * num_blocks)[:num_blocks].tolist()))
    plain = torch.ones(num_blocks * memory.block_bytes, dtype=torch.uint8)
    other = plain.clone()
    memory.offload(pairs)  # touches the pages
    times: dict[str, list[float]] = {"offload": [], "restore": [], "memcpy": []}
    for _ in range(rounds):
        times["memcpy"].append(seconds(lambda: other.copy_(plain)))
        times["offload"].append(seconds(lambda: memory.offload(pairs)))
        times["restore"].append(seconds(lambda: memory.restore(pairs)))
    return {name: plain.nbytes / statistics.median(of) for name, of in times.items()}


def prompts(num_tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds to the first token, by where the prompt's KV is."""
    num_blocks = num_tokens // BLOCK_SIZE
    worker = make_worker(2 * num_blocks + 2)
    worker.warm_up()
    asked = Prompts(worker, num_tokens)
    asked.first_token_s(b"warm")
    asked.first_token_s()
    times: dict[str, list[float]] = {"computed": [], "restored": [], "cached": []}
    for i in range(rounds):
        asked.forget()
        times["computed"].append(asked.first_token_s(f"{i}".encode()))
        asked.forget()
        times["restored"].append(asked.first_token_s())
        times["cached"].append(asked.first_token_s())
    use = worker.snapshot().host_tier
    assert use is not None
    assert use.restored == rounds * (num_blocks - 1), "what was measured was not restored"
    return {name: statistics.median(of) for name, of in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    set_threads(args.threads)
    rates = copies(args.tokens // BLOCK_SIZE, args.rounds)
    took = prompts(args.tokens, args.rounds)
    if args.json:
        print(json.dumps({"bytes_per_s": rates, "first_token_s": took}))
        return
    for name in ("offload", "restore"):
        print(f"{name}: {rates[name] / 1e9:.2f} GB/s, {rates[name] / rates['memcpy']:.0%} of a plain copy's")
    print(f"a plain copy: {rates['memcpy'] / 1e9:.2f} GB/s")
    for name, time_s in took.items():
        print(
            f"first token of {args.tokens} tokens, {name}: {time_s * 1e3:.0f} ms, {took['computed'] / time_s:.1f} times as fast"
        )


if __name__ == "__main__":
    main()
