"""A worker whose engine has stopped tells everybody who waits for something of it, at once."""

from __future__ import annotations

from ernie_cluster.errors import EngineFailed
from tests.tiny import make_request
from tests.unit.engine.toy import toy_worker


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
