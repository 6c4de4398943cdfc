"""A prefix from another replica beside computing it: two engines in two processes over shared memory.

    python scripts/bench/fetch.py [--model FOLDER] [--tokens 256 1024 4096] [--repeats 15]

One thread per process, no Ray; without `--model` the packaged model. The other engine has computed each prompt before. Both
ways are asked in turns for the first token of prompts that this one has never seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import queue
import statistics
import time
from multiprocessing.connection import Connection

import torch

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.presets import POCKET
from ernie_cluster.engine.engine import Outcome
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.request import GenerationRequest, RequestFailed, SamplingParams
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver

BLOCK_SIZE = 16


class Answers:
    """Requests that have ended; errors end the measurement."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Outcome] = queue.Queue()

    def __call__(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._queue.put(outcome)

    def next(self) -> int:
        """Prompt tokens of the next answer that came from a cache."""
        outcome = self._queue.get(timeout=60)
        if isinstance(outcome, RequestFailed):
            raise outcome.error
        return outcome.num_cached_tokens


def make_worker(folder: str, emit: Answers) -> Worker:
    torch.set_num_threads(1)
    config = ModelConfig.from_folder(folder)
    device = torch.device("cpu")
    runner = Runner.load(
        folder, config, "mixed", dtype="float32", device=device, num_blocks=4096, block_size=BLOCK_SIZE
    )
    settings = WorkerSettings(
        block_size=BLOCK_SIZE, max_batch_tokens=512, max_num_seqs=16, enable_prefix_cache=True,
        reserve_output_tokens=16, lease_timeout_s=30, piece_bytes=1 << 20, can_encode=True,
    )  # fmt: skip
    worker = Worker(runner, config, settings, emit)
    worker.warm_up()
    worker.start()
    return worker


def source_process(folder: str, address: str, pipe: Connection) -> None:
    """Computes what comes through the pipe, says so, and lends it when it comes again."""
    answers = Answers()
    worker = make_worker(folder, answers)
    channel = SharedMemoryChannel(address, "bench")
    pipe.send(None)
    while (request := pipe.recv()) is not None:
        worker.open_prefill(dataclasses.replace(request, request_id=f"before-{request.request_id}"), 0, None)
        answers.next()
        pipe.send(None)
        worker.lend(pipe.recv(), 0, 1 << 20, channel)
    channel.close()
    worker.stop()


def measure(worker: Worker, answers: Answers, request: GenerationRequest, prefix_s: float, pipe: Connection) -> float:
    """Seconds to the first token; a prefix is wanted when there is time for one."""
    start = time.perf_counter()
    worker.open_prefill(request, 0, None, prefix_s=prefix_s)
    if prefix_s:
        pipe.send(request)
    num_cached = answers.next()
    took_s = time.perf_counter() - start
    assert num_cached == ((request.num_prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE if prefix_s else 0)
    return took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=POCKET)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    answers = Answers()
    worker = make_worker(args.model, answers)
    receiver = SharedMemoryReceiver(worker.inbox)
    ours, theirs = context.Pipe()
    child = context.Process(target=source_process, args=(args.model, receiver.address, theirs), daemon=True)
    child.start()
    ours.recv()
    processor = ChatProcessor.from_folder(args.model, served_name="bench")
    sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    print(
        f"first token of a prompt, float32, one thread, median of {args.repeats}; {worker.layout.bytes_per_token} B/token"
    )
    for num_tokens in args.tokens:
        took: dict[str, list[float]] = {"computed": [], "fetched": []}
        for i in range(args.repeats + 2):
            for name, times in took.items():
                generator = torch.Generator().manual_seed(hash((num_tokens, i, name == "fetched")) % 2**31)
                ids = torch.randint(300, 900, (num_tokens,), generator=generator).tolist()
                request = processor.completion(ids, request_id=f"{name}-{num_tokens}-{i}", sampling=sampling)
                if name == "fetched":
                    ours.send(request)
                    ours.recv()
                times.append(measure(worker, answers, request, 30.0 * (name == "fetched"), ours))
        computed, fetched = (statistics.median(times[2:]) * 1e3 for times in took.values())
        print(
            f"  {num_tokens:6} tokens   computed {computed:8.1f} ms   fetched {fetched:8.1f} ms   {computed / fetched:5.1f} x"
        )
    ours.send(None)
    child.join(10)
    receiver.close()
    worker.stop()


if __name__ == "__main__":
    main()
