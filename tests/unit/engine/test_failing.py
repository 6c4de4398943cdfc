"""A worker whose engine has stopped tells everybody who waits for something of it, at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from ernie_cluster.engine.sampler import Sampled, SamplerRow
from ernie_cluster.errors import EngineFailed
from ernie_cluster.model.decoder import no_hook
from ernie_cluster.model.step import StepInput
from tests.tiny import make_request
from tests.unit.engine.toy import ToyRunner, toy_worker

TIMEOUT_S = 60.0


def test_who_waits_for_kv_or_runs_or_waits_for_a_turn_hears_that_the_engine_has_failed() -> None:
    worker, outcomes = toy_worker(60, 4)
    worker.open_prefill(make_request(range(10, 19), "runs", max_tokens=9), 0, None)
    worker.engine.step()
    worker.open_prefill(make_request(range(20, 29), "waits", max_tokens=9), 0, None)
    worker.open_decode(make_request(range(30, 39), "leased", max_tokens=9), 0)
    failure = EngineFailed("it has stopped")
    worker._fail(failure)
    outcomes.drain()
    assert outcomes.errors == dict.fromkeys(("runs", "waits", "leased"), failure)


class StuckRunner(ToyRunner):
    """A step that ends when the test says so."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def run(self, step: StepInput, rows: Sequence[SamplerRow], layer_done: Callable[[int], None] = no_hook) -> Sampled:
        self.has_begun.set()
        assert self.may_end.wait(TIMEOUT_S)
        return super().run(step, rows, layer_done)


def test_a_step_that_hangs_fails_the_engine_and_all_that_is_there() -> None:
    worker, outcomes = toy_worker(60, 4, step_timeout_s=5.0)
    worker.engine.runner = runner = StuckRunner(60, 4)  # type: ignore[assignment]
    now_s = 0.0
    worker.engine.clock = lambda: now_s
    worker.look_after()
    worker.open_prefill(make_request(range(10, 19), "runs", max_tokens=9), 0, None)
    worker.start()
    assert runner.has_begun.wait(TIMEOUT_S)
    now_s = 5.0
    worker.look_after()
    now_s = 5.1
    for _ in range(2):
        with pytest.raises(EngineFailed, match=r"a step has run for 5 s, longer than engine\.step_timeout_s"):
            worker.look_after()
    with pytest.raises(EngineFailed):
        worker.open_prefill(make_request(range(20, 29), "late", max_tokens=9), 0, None)
    worker.stop()  # does not wait for it
    runner.may_end.set()
    worker._thread._thread.join(TIMEOUT_S)
    outcomes.drain()
    assert outcomes.errors.keys() == {"runs"}
