"""A prefill and a decode worker with the toy model, moved step by step, and the stages that a hand-over passes."""

from __future__ import annotations

from collections.abc import Callable

from ernie_cluster.engine.engine import Outcome
from ernie_cluster.request import GenerationRequest, MediaInput, RequestFailed
from tests.unit.engine.toy import ManualChannel, toy_worker

LEASE_S = 10.0
BLOCK_SIZE = 4
PROMPT: list[int | MediaInput] = list(range(10, 19))
"""Nine tokens, three blocks."""


class Pair:
    """A prefill worker, a decode worker, and the channel between them; chunks of a block, pieces of a block."""

    def __init__(self, **settings: object) -> None:
        self.now = 0.0
        whole: dict[str, object] = {"max_batch_tokens": BLOCK_SIZE, "lease_timeout_s": LEASE_S, **settings}
        self.answers: dict[str, dict[int, int]] = {}
        self.prefill_errors: dict[str, Exception] = {}
        self.decode_errors: dict[str, Exception] = {}
        self.prefill, _ = toy_worker(20, BLOCK_SIZE, emit=self._take_into(self.prefill_errors), **whole)
        self.decode, _ = toy_worker(20, BLOCK_SIZE, emit=self._take_into(self.decode_errors), **whole)
        for worker in (self.prefill, self.decode):
            worker.engine.clock = lambda: self.now
        self.channel = ManualChannel(self.decode.inbox)

    def open(self, request: GenerationRequest, epoch: int = 0) -> None:
        self.decode.open_decode(request, epoch)
        self.prefill.open_prefill(request, epoch, self.channel)

    def run(self) -> None:
        """Until nothing moves."""
        for _ in range(200):
            self.channel.deliver_all()
            did_run = [worker.engine.step() for worker in (self.prefill, self.decode)]
            assert self.prefill.check()
            assert self.decode.check()
            if not any(did_run) and not self.channel.jobs:
                return
        raise AssertionError("this never ends")

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for worker in (self.prefill, self.decode):
            worker.sweep()

    def tokens(self, request_id: str) -> list[int]:
        """What both have emitted, in order and without a gap."""
        by_index = self.answers.get(request_id, {})
        return [by_index[i] for i in range(len(by_index))]

    def _take_into(self, errors: dict[str, Exception]) -> Callable[[list[Outcome]], None]:
        def take(outcomes: list[Outcome]) -> None:
            for outcome in outcomes:
                if isinstance(outcome, RequestFailed):
                    errors[outcome.request_id] = outcome.error
                else:
                    by_index = self.answers.setdefault(outcome.request_id, {})
                    by_index.update(enumerate(outcome.token_ids, outcome.index))

        return take

    def is_empty(self) -> bool:
        """Whether nothing is left of anybody, neither blocks nor entries in the books."""
        workers = (self.prefill, self.decode)
        return not any(w.pool.num_used or w.snapshot().num_waiting or w.inbox._expected for w in workers)


# ---- the stages of a hand-over, each as what has been done so far


def opened(pair: Pair) -> None:
    """The claim is on its way."""


def claimed(pair: Pair) -> None:
    pair.channel.deliver()


def between_chunks(pair: Pair) -> None:
    claimed(pair)
    pair.prefill.engine.step()
    pair.channel.deliver()
    pair.prefill.engine.step()


def committing(pair: Pair) -> None:
    claimed(pair)
    while pair.prefill.engine.step():
        pass


def committed(pair: Pair) -> None:
    committing(pair)
    pair.channel.deliver_all()


def decoding(pair: Pair) -> None:
    committed(pair)
    pair.decode.engine.step()


Stage = Callable[[Pair], None]
STAGES: list[Stage] = [opened, claimed, between_chunks, committing, committed, decoding]
