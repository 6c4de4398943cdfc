"""A prefix that another replica holds: the same tokens as if it were computed, whatever happens on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

from ernie_cluster.engine import lending
from ernie_cluster.engine.scheduler import Scheduler
from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.request import GenerationRequest, SamplingParams, Span, TokenEvent
from ernie_cluster.transport.base import Message
from ernie_cluster.transport.local import Faults, LocalChannel, LocalReceiver
from tests.tiny import make_request, make_worker
from tests.unit.engine.handover_path import show
from tests.unit.engine.pair import BLOCK_SIZE, LEASE_S, PROMPT, Pair
from tests.unit.engine.test_handover_ranks import Road, wait_until
from tests.unit.engine.test_laws import answers, requests
from tests.unit.engine.toy import ManualChannel, answer

TIMEOUT_S = 30.0


def long_ones() -> list[GenerationRequest]:
    """Those that fill a block before their last token."""
    return [r for r in requests(max_tokens=4) if r.num_prompt_tokens > BLOCK_SIZE]


@cache
def expected(kv_dtype: str = "auto") -> dict[str, list[int]]:
    """One engine, without a cache."""
    return answers(*make_worker(max_batch_tokens=1024, enable_prefix_cache=False, kv_dtype=kv_dtype), long_ones())


@cache
def warm_source(kv_dtype: str) -> Worker:
    """It has answered all requests, and lends what it holds to any test."""
    worker, outcomes = make_worker(max_batch_tokens=1024, kv_dtype=kv_dtype, piece_bytes=2048)
    answers(worker, outcomes, [dataclasses.replace(r, sampling=SamplingParams(max_tokens=1)) for r in long_ones()])
    return worker


class Two:
    """A source, and a replica that is asked what the source has computed before; at the end nothing may be left.

    Args:
        faults: of the way from the source.
        source: one that holds the prompts if it is left out.
        settings: of the other worker.
    """

    def __init__(
        self, faults: Faults | None = None, source: Worker | None = None, kv_dtype: str = "auto", **settings: object
    ) -> None:
        self.source = source or warm_source(kv_dtype)
        self.lend = self.source.lend
        self.sent_before = self.source.snapshot().kv_bytes_sent
        self.target, self.outcomes = make_worker(kv_dtype=kv_dtype, **settings)  # type: ignore[arg-type]
        self.spans: list[Span] = []
        emit = self.outcomes.__call__

        def keep(outcomes: list[object]) -> None:
            self.spans += [s for o in outcomes if isinstance(o, TokenEvent) for s in o.spans if s.name == "fetch"]
            emit(outcomes)  # type: ignore[arg-type]

        self.target.engine.emit = keep  # type: ignore[assignment]
        receiver = LocalReceiver(self.target.inbox)
        self.way = LocalChannel(receiver, "source", faults, stall_timeout_s=0.3)
        self.embeds = LocalChannel(receiver, "vision")

    def run(self, some: list[GenerationRequest], *, prefix_s: float, is_offered_first: bool = False) -> None:
        """Ask the second replica, while the first one is asked for what it has."""
        for request in some:
            calls = [
                partial(self.target.open_prefill, request, 0, None, prefix_s=prefix_s),
                partial(self.lend, request, 0, 1000, self.way),
            ]
            for call in reversed(calls) if is_offered_first else calls:
                call()
            show(self.embeds, request, 0)
        self.outcomes.wait_for([r.request_id for r in some], TIMEOUT_S)
        assert not self.outcomes.errors

    @property
    def failures(self) -> set[object]:
        """Why prefixes did not come."""
        return {dict(span.detail).get("failed") for span in self.spans}

    def __enter__(self) -> Two:
        self.target.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for channel in (self.way, self.embeds):
            channel.close()
        self.target.stop()
        if kind is None:
            for worker in (self.source, self.target):
                wait_until(worker, lambda worker=worker: worker.pool.num_used == 0)  # type: ignore[misc]
                assert worker.check()


@pytest.mark.parametrize(
    ("settings", "is_offered_first"), [({}, False), ({"max_batch_tokens": 7}, True), ({"kv_dtype": "int8"}, False)]
)
def test_a_prompt_whose_prefix_came_says_what_a_computed_one_says(
    settings: dict[str, Any], is_offered_first: bool
) -> None:
    wanted = expected(settings.get("kv_dtype", "auto"))
    with Two(**settings) as two:
        two.run(long_ones(), prefix_s=TIMEOUT_S, is_offered_first=is_offered_first)
        now = two.target.snapshot()
        assert two.failures == {None}
        num_bytes = sum(int(dict(s.detail)["bytes"]) for s in two.spans)
        assert two.source.snapshot().kv_bytes_sent - two.sent_before == num_bytes > 0
        assert now.prompt_tokens <= BLOCK_SIZE * len(long_ones()), "all but the last few tokens of each came"
        # what came is shared like what was computed
        two.run([dataclasses.replace(r, request_id=f"again-{r.request_id}") for r in long_ones()], prefix_s=0)
        assert two.target.snapshot().prompt_tokens == 2 * now.prompt_tokens
    for request_id, tokens in wanted.items():
        assert two.outcomes.tokens[request_id] == two.outcomes.tokens[f"again-{request_id}"] == tokens


def check_computed(two: Two, why: str, prefix_s: float = TIMEOUT_S) -> None:
    """All prompts are answered rightly, and no prefix came."""
    with two:
        two.run(long_ones(), prefix_s=prefix_s)
    assert two.failures == {why}
    assert two.outcomes.tokens == expected()


def test_a_source_that_has_lost_its_cache_says_so_at_once() -> None:
    check_computed(Two(source=make_worker()[0]), "declined")


def test_a_source_that_has_lost_the_end_sends_the_beginning() -> None:
    request = long_ones()[0]
    with Two() as two:
        ids = [*request.prompt_token_ids.tolist(), *range(40, 60)]
        longer = make_request(ids, "longer", max_tokens=3)
        two.run([longer], prefix_s=TIMEOUT_S)
        (span,) = two.spans
        assert dict(span.detail)["blocks"] == request.num_prompt_tokens // BLOCK_SIZE
    assert two.outcomes.tokens == answers(*make_worker(), [longer])


@pytest.mark.parametrize("mishap", ["corrupt", "fail"])
def test_a_piece_that_is_lost_or_wrong_makes_the_source_decline(mishap: str) -> None:
    faults = Faults()
    for piece in range(0, 1000, 3):
        getattr(faults, mishap)(piece)
    check_computed(Two(faults), "declined")


def test_a_source_that_dies_is_waited_for_until_the_deadline() -> None:
    faults = Faults()
    faults.drop(0)
    check_computed(Two(faults), "late", prefix_s=0.05)


def test_a_source_that_never_answers_is_waited_for_until_the_deadline() -> None:
    two = Two()
    two.lend = lambda *_: None  # type: ignore[assignment]
    check_computed(two, "late", prefix_s=0.05)


def test_another_prompts_prefix_is_refused() -> None:
    two = Two()
    lend, some = two.lend, long_ones()
    others = {a.request_id: b for a, b in zip(some, [*some[1:], some[0]], strict=True)}

    def lend_another(request: GenerationRequest, *rest: object) -> None:
        lend(dataclasses.replace(others[request.request_id], request_id=request.request_id), *rest)  # type: ignore[arg-type]

    two.lend = lend_another  # type: ignore[assignment]
    check_computed(two, "refused")


def test_tenants_with_a_salt_of_their_own_fetch_nothing_of_others() -> None:
    two = Two()
    lend = two.lend
    two.lend = lambda r, *rest: lend(dataclasses.replace(r, cache_salt=b"mine"), *rest)  # type: ignore[assignment]
    check_computed(two, "declined")


# ---- step by step, on the toy


class Fetching(Pair):
    """The decode worker has the prompt; the prefill worker computes it again, or fetches it; `way` leads there."""

    def __init__(self) -> None:
        super().__init__()
        self.request = make_request(PROMPT, "a", max_tokens=6)
        self.decode.open_prefill(dataclasses.replace(self.request, request_id="before"), 0, None)
        self.run()
        self.way = ManualChannel(self.prefill.inbox)

    def begin(self, epoch: int = 0) -> None:
        self.prefill.open_prefill(self.request, epoch, None, prefix_s=1.0)
        self.decode.lend(self.request, epoch, 9, self.way)

    def finish(self) -> None:
        """All that is on its way arrives, and everything ends well."""
        self.way.deliver_all()
        self.run()
        assert self.tokens("a") == answer(self.request)
        assert not self.prefill_errors
        assert self.is_empty()
        assert self.decode.check()


def nothing_yet(f: Fetching) -> None:
    """The offer is on its way."""


def offered(f: Fetching) -> None:
    f.way.deliver()


def half_sent(f: Fetching) -> None:
    f.way.deliver()
    f.way.deliver()


def all_sent(f: Fetching) -> None:
    while len(f.way.jobs) > 1 or f.way.jobs[0].header is not None or f.way.jobs[0].message["type"] != "prefix":
        f.way.deliver()


Stage = Callable[[Fetching], None]
at_every_stage = pytest.mark.parametrize("stage", [nothing_yet, offered, half_sent, all_sent])


@at_every_stage
def test_the_stages_lead_to_the_prefix(stage: Stage) -> None:
    f = Fetching()
    f.begin()
    stage(f)
    assert not f.prefill.engine.step(), "it waits"
    assert f.decode.pool.num_used == (0 if stage is all_sent else 2), "pinned as long as they are read"
    f.finish()
    assert f.prefill.snapshot().prompt_tokens == 1


@at_every_stage
def test_a_late_prefix_is_refused_and_touches_nothing(stage: Stage) -> None:
    f = Fetching()
    f.begin()
    stage(f)
    f.pass_time(1.0)
    f.prefill.engine.step()
    before = f.prefill.engine.runner.kv.data.clone()
    while f.way.jobs:
        f.way.deliver()
        assert f.prefill.engine.runner.kv.data.equal(before)
    f.finish()
    assert f.prefill.snapshot().prompt_tokens == len(PROMPT)


@at_every_stage
def test_an_abort_leaves_nothing_behind(stage: Stage) -> None:
    f = Fetching()
    f.begin()
    stage(f)
    assert f.prefill.abort("a")
    assert f.prefill.pool.num_used == 0
    f.way.deliver_all()
    f.run()
    f.pass_time(LEASE_S)
    assert f.is_empty()
    assert "a" not in f.answers


@at_every_stage
def test_a_new_attempt_overtakes_the_old_one(stage: Stage) -> None:
    f = Fetching()
    f.begin()
    stage(f)
    f.begin(1)
    f.finish()
    assert f.prefill.snapshot().prompt_tokens in (1, len(PROMPT))


@at_every_stage
@pytest.mark.parametrize("error", [TransferFailed("lost"), ReplicaLost("gone")])
def test_a_message_or_piece_that_fails_costs_no_more_than_the_wait(stage: Stage, error: ReplicaLost) -> None:
    f = Fetching()
    f.begin()
    stage(f)
    f.way.fail(error)
    f.way.deliver_all()
    f.pass_time(1.0)
    f.finish()


def test_a_prompt_that_is_handed_over_fetches_too() -> None:
    f = Fetching()
    f.decode.open_decode(f.request, 0)
    f.prefill.open_prefill(f.request, 0, f.channel, prefix_s=1.0)
    f.decode.lend(f.request, 0, 9, f.way)
    f.run()
    assert not f.answers.get("a")
    f.finish()
    assert f.prefill.snapshot().prompt_tokens == 1
    assert f.decode.snapshot().prompt_tokens == len(PROMPT), "of the request before"


def test_a_chat_goes_on_from_the_answer_that_another_replica_has_written() -> None:
    f = Fetching()
    f.request = make_request([*range(10, 19), *f.tokens("before"), 5, 6, 7], "a", max_tokens=6)
    f.begin()
    f.finish()
    assert f.prefill.snapshot().prompt_tokens == 18 - 12, "14 tokens have KV there, three blocks are full"


def test_a_prefix_that_is_here_already_is_not_sent() -> None:
    f = Fetching()
    f.begin()
    f.finish()
    sent = f.decode.snapshot().kv_bytes_sent
    f.answers.clear()
    f.request = dataclasses.replace(f.request, request_id="a")
    f.begin()
    f.finish()
    assert f.decode.snapshot().kv_bytes_sent == sent > 0


def test_pieces_that_nobody_expects_are_refused() -> None:
    f = Fetching()
    f.begin()
    half_sent(f)
    f.way.hold()
    f.way.deliver_all()
    f.run()
    before = f.prefill.engine.runner.kv.data.clone()
    with pytest.raises(TransferFailed):
        f.way.arrive_late()
    assert f.prefill.engine.runner.kv.data.equal(before)
    replies: list[Message] = []
    for kind in ("prefix", "offer"):
        message: Message = {"type": kind, "request_id": "b", "epoch": 0, "num_pieces": 0, "blocks": 1, "hash": ""}
        if kind == "prefix":
            with pytest.raises(TransferFailed, match="waits for no prefix"):
                f.prefill.inbox.handle(message, replies.append)
        else:
            f.prefill.inbox.handle(message, replies.append)
    f.pass_time(LEASE_S)
    assert replies == [{"error": "request b: no place was reserved in time"}]


def test_a_lender_keeps_no_blocks_from_those_who_wait_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    f = Fetching()
    f.prefill.open_prefill(f.request, 0, None, prefix_s=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "num_blocks_owed", f.decode.pool.num_blocks)
        f.decode.lend(f.request, 0, 9, f.way)
    assert f.decode.pool.num_used == 0
    f.finish()
    assert f.prefill.snapshot().prompt_tokens == len(PROMPT)


def test_of_many_loans_a_few_are_sent_at_once_and_those_declined_that_would_be_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lending, "_TELLING_BYTES", 1)
    f = Fetching()
    asked = [make_request([100 + i, *range(8)], f"r{i}", max_tokens=1) for i in range(6)]
    for request in asked:
        f.decode.open_prefill(dataclasses.replace(request, request_id=f"before-{request.request_id}"), 0, None)
    f.run()
    for request in asked:
        f.prefill.open_prefill(request, 0, None, prefix_s=100.0)
        f.decode.lend(request, 0, 9, f.way, within_s=2.5 if request is asked[-1] else 100.0)

    def sent() -> set[str]:
        return {job.header.request_id for job in f.way.jobs if job.header is not None}

    def arrive(request_id: str = "") -> None:
        """What is no piece, and the pieces of one loan."""
        while found := [job for job in f.way.jobs if job.header is None or job.header.request_id == request_id]:
            f.way.jobs.remove(found[0])
            f.way.jobs.appendleft(found[0])
            f.way.deliver()

    arrive()
    assert sent() == {"r0", "r1", "r2", "r3"}
    f.now = 1.0  # four of them: a quarter of a second for each
    arrive("r0")
    assert sent() == {"r1", "r2", "r3", "r4"}
    f.now = 2.0  # half a second, so the three that are sent and the last one take two
    arrive("r1")
    assert sent() == {"r2", "r3", "r4"}
    f.way.deliver_all()
    f.run()
    assert all(f.answers[r.request_id] == f.answers[f"before-{r.request_id}"] for r in asked)
    assert f.prefill.snapshot().prompt_tokens == 5 * 1 + 9, "the last one was computed"
    assert f.decode.check()
    assert not f.decode.snapshot().is_lending


# ---- gangs


@pytest.mark.parametrize(
    ("source", "target", "settings"),
    [(2, 1, {}), (1, 2, {}), (2, 2, {}), (0, 2, {}), (2, 2, {"num_blocks": 14, "host_blocks": 40})],
    ids=str,
)
def test_gangs_lend_to_gangs(source: int, target: int, settings: dict[str, object]) -> None:
    """In the last case the source lends what it has to bring back from the host's memory, on all of its ranks."""
    text = [r for r in long_ones() if not r.media]
    with Road(source, target, **settings) as road:
        lender, borrower = road.prefill, road.decode
        for request in (*text, make_request(range(200, 240), "other", max_tokens=4)):
            request_id = f"before-{request.request_id}"
            lender.worker.open_prefill(dataclasses.replace(request, request_id=request_id), 0, None)
            lender.outcomes.wait_for([request_id], TIMEOUT_S)
        computed = borrower.worker.snapshot().prompt_tokens
        for request in text:
            borrower.worker.open_prefill(request, 0, None, prefix_s=TIMEOUT_S)
            lender.lend(request, 0, borrower)
            borrower.outcomes.wait_for([request.request_id], TIMEOUT_S)
        assert not borrower.outcomes.errors
        assert borrower.worker.snapshot().prompt_tokens - computed <= BLOCK_SIZE * len(text)
        wait_until(lender.worker, lambda: lender.worker.pool.num_used == 0)
        if settings:
            use = lender.worker.snapshot().host_tier
            assert use is not None
            assert use.restored > 0
    assert borrower.outcomes.tokens == {r.request_id: expected()[r.request_id] for r in text}
