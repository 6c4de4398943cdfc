"""What the hand-over adds to a prompt: prefill and decode in two processes over shared memory, beside one engine.

    python scripts/bench/hand_over.py [--tokens 512] [--repeats 60]

The tiny model in float32, one thread per process, no Ray. Both ways are asked in turns for two tokens of the same
prompts; the second token is the first that must wait for the hand-over.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.engine import Outcome
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.model.build import Role
from ernie_cluster.request import GenerationRequest, RequestFailed, SamplingParams
from ernie_cluster.transport.base import Channel
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver


class Arrivals:
    """Output positions as they come; errors end the measurement."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Outcome] = queue.Queue()

    def __call__(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._queue.put(outcome)

    def wait_for(self, index: int) -> None:
        while True:
            outcome = self._queue.get(timeout=30)
            if isinstance(outcome, RequestFailed):
                raise outcome.error
            if outcome.index == index:
                return


def make_worker(folder: str, role: Role, emit: Arrivals) -> Worker:
    torch.set_num_threads(1)
    config = ModelConfig.from_folder(folder)
    runner = Runner.load(
        folder, config, role, dtype="float32", device=torch.device("cpu"), num_blocks=1024, block_size=16
    )
    settings = WorkerSettings(
        block_size=16, max_batch_tokens=512, max_num_seqs=16, enable_prefix_cache=False, reserve_output_tokens=16,
        lease_timeout_s=30, piece_bytes=1 << 20, can_encode=role != "decode",
    )  # fmt: skip
    worker = Worker(runner, config, settings, emit)
    worker.warm_up()
    worker.start()
    return worker


def decode_process(folder: str, pipe: Connection) -> None:
    """Takes requests from the pipe and answers when their second token is there."""
    arrivals = Arrivals()
    worker = make_worker(folder, "decode", arrivals)
    receiver = SharedMemoryReceiver(worker.inbox)
    pipe.send(receiver.address)
    while (request := pipe.recv()) is not None:
        worker.open_decode(request, 0)
        arrivals.wait_for(1)
        pipe.send(None)
    receiver.close()
    worker.stop()


def two_tokens(worker: Worker, arrivals: Arrivals, request: GenerationRequest) -> float:
    start = time.perf_counter()
    worker.open_prefill(request, 0, None)
    arrivals.wait_for(1)
    return time.perf_counter() - start


def handed_over(worker: Worker, request: GenerationRequest, channel: Channel, pipe: Connection) -> float:
    start = time.perf_counter()
    pipe.send(request)
    worker.open_prefill(request, 0, channel)
    pipe.recv()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as tmp:
        folder = str(write_tiny_checkpoint(Path(tmp) / "tiny"))
        ours, theirs = context.Pipe()
        child = context.Process(target=decode_process, args=(folder, theirs), daemon=True)
        child.start()
        arrivals = Arrivals()
        worker = make_worker(folder, "mixed", arrivals)
        channel = SharedMemoryChannel(ours.recv(), "bench")
        processor = ChatProcessor.from_folder(folder, served_name="tiny")
        alone, over = [], []
        for i in range(args.repeats + 5):
            ids = torch.randint(300, 1900, (args.tokens,), generator=torch.Generator().manual_seed(i)).tolist()
            sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
            for name, times in (("alone", alone), ("over", over)):
                request = processor.completion(ids, request_id=f"{name}-{i}", sampling=sampling)
                took = (
                    two_tokens(worker, arrivals, request)
                    if times is alone
                    else handed_over(worker, request, channel, ours)
                )
                if i >= 5:
                    times.append(took)
        ours.send(None)
        channel.close()
        worker.stop()
        child.join(10)
    added = statistics.median(b - a for a, b in zip(alone, over, strict=True))
    print(f"{args.tokens}-token prompt and two tokens, tiny model float32, median of {args.repeats}")
    print(f"  one engine           {statistics.median(alone) * 1e3:7.2f} ms")
    print(f"  handed over          {statistics.median(over) * 1e3:7.2f} ms")
    print(f"  the hand-over adds   {added * 1e3:7.2f} ms (median of the differences)")


if __name__ == "__main__":
    main()
