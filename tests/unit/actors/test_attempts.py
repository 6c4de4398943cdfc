"""How a request goes on when an attempt fails; the attempts themselves are played."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ernie_cluster.actors import cluster_backend
from ernie_cluster.actors.attempts import Attempts
from ernie_cluster.actors.cluster_backend import ClusterBackend
from ernie_cluster.config.presets import PRESETS
from ernie_cluster.errors import (
    ContextTooLong,
    DeadlineExceeded,
    ErnieClusterError,
    Overloaded,
    ReplicaDraining,
    ReplicaLost,
    TransferFailed,
)
from ernie_cluster.observe.metrics import InMemoryMetrics
from ernie_cluster.policy.retries import RetryBudget
from ernie_cluster.request import (
    FinishReason,
    GenerationRequest,
    MediaInput,
    SamplingParams,
    Span,
    TokenEvent,
)

LOST = ReplicaLost("decode-0 is gone")
MOVED = ReplicaDraining("decode-0 is leaving")
FULL = Overloaded("no room", retry_after_s=0.0)


class PlayedAttempts(Attempts):
    """Each gives some tokens, then fails or, with None, comes to its end.

    Args:
        script: (number of tokens, how it ends) per attempt.
    """

    def __init__(self, script: Sequence[tuple[int, ErnieClusterError | None]]) -> None:
        self._script = iter(script)
        self.requests: list[GenerationRequest] = []

    async def generate(
        self, request: GenerationRequest, epoch: int, lost: set[str], spans: list[Span], accepted_s: float
    ) -> AsyncGenerator[list[TokenEvent], None]:
        self.requests.append(request)
        assert epoch + 1 == len(self.requests)
        num_tokens, end = next(self._script)
        first = len(request.output_token_ids)
        spans.append(Span("route", float(epoch), 0.0))
        for i in range(first, first + num_tokens):
            is_last = end is None and i + 1 == first + num_tokens
            reason = FinishReason.LENGTH if is_last else None
            yield [TokenEvent(request.request_id, i, (i,), reason, num_cached_tokens=10 * epoch + 1)]
        if end is not None:
            raise end


class PlayedBackend(ClusterBackend):
    """Its attempts are played."""

    def __init__(self, attempts: PlayedAttempts, max_attempts: int = 3) -> None:
        config = PRESETS["tiny"]("/nowhere")
        router = dataclasses.replace(config.router, max_attempts=max_attempts, retry_pause_s=0.0)
        self._config = dataclasses.replace(config, router=router)
        self._attempts = attempts
        self._faults = None
        self._metrics, self._budget = InMemoryMetrics(), RetryBudget(router)


def played(
    script: Sequence[tuple[int, ErnieClusterError | None]], max_attempts: int = 3
) -> tuple[PlayedBackend, PlayedAttempts]:
    attempts = PlayedAttempts(script)
    return PlayedBackend(attempts, max_attempts), attempts


def generate(backend: ClusterBackend) -> tuple[list[TokenEvent], Exception | None]:
    request = GenerationRequest(
        "r", "tiny", np.ones(4, np.int32), np.ones((3, 4), np.int32), SamplingParams(max_tokens=9)
    )

    async def run() -> tuple[list[TokenEvent], Exception | None]:
        out: list[TokenEvent] = []
        try:
            async for events in backend.generate(request):
                out += events
        except ErnieClusterError as e:
            return out, e
        return out, None

    return asyncio.run(run())


def test_answer_goes_on_where_it_broke_off() -> None:
    backend, attempts = played([(2, LOST), (3, LOST), (1, None)])
    events, error = generate(backend)
    assert error is None
    assert [(e.request_id, e.index, e.token_ids) for e in events] == [("r", i, (i,)) for i in range(6)]
    assert [a.output_token_ids for a in attempts.requests] == [(), (0, 1), (0, 1, 2, 3, 4)]


@pytest.mark.parametrize(("before", "cached"), [(2, 1), (0, 11)])
def test_what_a_replay_finds_in_a_cache_is_not_told(before: int, cached: int) -> None:
    """The figure is that of the first attempt that gave something."""
    backend, _ = played([(before, LOST), (3, LOST), (1, None)])
    events, _ = generate(backend)
    assert {e.num_cached_tokens for e in events} == {cached}


def test_who_has_begun_to_answer_blames_no_client() -> None:
    """Prompt and answer may be too much for those who are left to read them, though the prompt was not."""
    too_long = ContextTooLong("the prompt has 9 tokens; tiny holds 8")
    events, error = generate(played([(3, LOST), (0, too_long)])[0])
    assert len(events) == 3
    assert isinstance(error, ReplicaLost)
    assert "9 tokens" in str(error)
    assert generate(played([(0, LOST), (0, too_long)])[0]) == ([], too_long)


def test_a_picture_waits_for_who_comes_instead_of_who_left() -> None:
    full = Overloaded("no vision replica", retry_after_s=0.01)
    told: list[set[str]] = []

    class Embedding:
        def __init__(self, *ends: ErnieClusterError) -> None:
            self._ends = list(ends)

        async def embed(self, key: str, model: str, media: object, lost: set[str]) -> str:
            told.append(set(lost))
            if not self._ends:
                return "vector"
            lost.add("v0")
            raise self._ends.pop(0)

    async def run(*ends: ErnieClusterError) -> object:
        backend = PlayedBackend(Embedding(*ends))  # type: ignore[arg-type]
        return await backend.embed("tiny", None, 30.0)  # type: ignore[arg-type]

    assert asyncio.run(run(MOVED, MOVED, full)) == "vector"
    assert told == [set(), {"v0"}, {"v0"}, set()]
    with pytest.raises(Overloaded):
        asyncio.run(run(full))


def test_retries_are_counted_by_their_reason() -> None:
    backend, _ = played([(1, LOST), (0, TransferFailed("checksum")), (1, None)])
    generate(backend)
    assert isinstance(backend._metrics, InMemoryMetrics)
    for reason in ("ReplicaLost", "TransferFailed"):
        assert backend._metrics.value("ernie_request_retries_total", model="tiny", reason=reason) == 1


def test_the_error_that_ends_a_request_tells_how_far_it_had_come() -> None:
    backend, _ = played([(1, LOST), (0, MOVED), (0, TransferFailed("checksum"))], max_attempts=2)
    _, error = generate(backend)
    assert isinstance(error, TransferFailed)
    routes = [span for span in error.journey if span.name == "route"]
    assert [span.start_s for span in routes] == [0.0, 1.0, 2.0]
    failed = [dict(span.detail)["failed"] for span in error.journey if span.name == "failed"]
    assert failed == ["ReplicaLost", "ReplicaDraining", "TransferFailed"], "and nothing that names a replica"


def test_engines_know_each_attempt_by_another_name() -> None:
    backend, attempts = played([(0, LOST), (0, FULL), (1, None)])
    generate(backend)
    assert len({a.request_id for a in attempts.requests}) == 3


def test_attempts_have_an_end() -> None:
    backend, attempts = played([(1, LOST)] * 5, max_attempts=2)
    events, error = generate(backend)
    assert error is LOST
    assert len(events) == len(attempts.requests) == 2


def test_full_cluster_refuses_at_once() -> None:
    backend, _ = played([(0, FULL)])
    assert generate(backend) == ([], FULL)


def test_request_that_lost_its_replica_waits_for_room() -> None:
    backend, _ = played([(1, LOST), (0, FULL), (0, FULL), (1, None)], max_attempts=2)
    events, error = generate(backend)
    assert error is None
    assert len(events) == 2


def test_waiting_for_room_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_backend, "_RECOVERY_S", 0.0)
    backend, _ = played([(1, LOST), (0, FULL)])
    events, error = generate(backend)
    assert error is FULL
    assert len(events) == 1


class SearchedAttempts(PlayedAttempts):
    """Each attempt to embed ends as the script says; a number of seconds is waited for in vain."""

    async def embed(self, key: str, model: str, media: MediaInput, lost: set[str]) -> NDArray[np.float32]:
        _, end = next(self._script)
        self.keys.append(key)
        self.met.append(frozenset(lost))
        if isinstance(end, asyncio.Event):
            await end.wait()
        if isinstance(end, Exception):
            lost.add(f"vision-{len(self.keys)}")
            raise end
        return np.ones(1, np.float32)

    keys: list[str]
    met: list[frozenset[str]]


def embed(script: Sequence[Any], max_attempts: int = 3, timeout_s: float = 60.0) -> tuple[Any, SearchedAttempts]:
    attempts = SearchedAttempts([(0, end) for end in script])
    backend = PlayedBackend(attempts, max_attempts)
    attempts.keys, attempts.met = [], []
    media = MediaInput("image", b"", (1, 2, 2), 0, 1, None)
    try:
        return asyncio.run(backend.embed("tiny", media, timeout_s)), attempts
    except ErnieClusterError as e:
        return e, attempts


def test_a_picture_is_encoded_elsewhere_when_a_replica_is_lost() -> None:
    vector, attempts = embed([LOST, LOST, None])
    assert vector.tolist() == [1.0]
    assert attempts.met == [frozenset(), {"vision-1"}, {"vision-1", "vision-2"}]
    assert len(set(attempts.keys)) == 3


def test_encoding_a_picture_has_an_end() -> None:
    assert embed([LOST] * 5, max_attempts=2)[0] is LOST
    assert embed([FULL])[0] is FULL
    late, _ = embed([asyncio.Event()], timeout_s=0.01)
    assert isinstance(late, DeadlineExceeded)


def test_a_request_moves_as_often_as_it_must_and_nothing_has_failed() -> None:
    script = [(1, MOVED), (0, FULL), (2, MOVED), (0, MOVED), (1, LOST), (0, MOVED), (5, None)]
    backend, attempts = played(script, max_attempts=2)
    events, error = generate(backend)
    assert error is None
    assert [e.token_ids for e in events] == [(i,) for i in range(9)]
    assert len(attempts.requests) == len(script)


def test_moves_that_lead_nowhere_get_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the router knows who is leaving, a request may be sent there again and again."""
    paused: list[int] = []
    monkeypatch.setattr(cluster_backend, "backoff_s", lambda num_losses, *_: paused.append(num_losses) or 0.0)
    backend, _ = played([(2, MOVED), (0, MOVED), (0, MOVED), (0, MOVED), (1, MOVED), (0, MOVED), (1, None)])
    assert generate(backend)[1] is None
    assert paused == [1, 2]
