"""One request between a prefill and a decode worker, step by step on the toy model: who may still do what, and when."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest

from ernie_cluster.engine.engine import Outcome
from ernie_cluster.engine.handover import EMBED_PIECE, KV_PIECE
from ernie_cluster.engine.sequence import Status
from ernie_cluster.errors import Overloaded, ReplicaLost, TransferFailed
from ernie_cluster.request import GenerationRequest, MediaInput, RequestFailed
from ernie_cluster.transport.base import Message, PieceHeader
from tests.tiny import make_image, make_request
from tests.unit.engine.toy import NUM_LAYERS, ManualChannel, answer, picture_pieces, toy_worker

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
        return self.prefill.pool.num_used == self.decode.pool.num_used == 0


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
at_every_stage = pytest.mark.parametrize("stage", STAGES)


@at_every_stage
def test_the_stages_lead_to_the_right_tokens(stage: Stage) -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    stage(pair)
    pair.run()
    assert pair.tokens("a") == answer(request)
    assert pair.is_empty()


@at_every_stage
@pytest.mark.parametrize("who", ["both", "prefill", "decode"])
def test_an_abort_leaves_nothing_behind_once_leases_have_ended(stage: Stage, who: str) -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    stage(pair)
    if who != "decode":
        pair.prefill.abort("a")
    if who != "prefill":
        pair.decode.abort("a")
    pair.run()
    assert pair.decode.pool.num_used == 0 or who == "prefill"
    pair.pass_time(LEASE_S)
    pair.run()
    assert pair.is_empty()
    assert pair.prefill.snapshot().num_waiting == pair.decode.snapshot().num_waiting == 0
    tokens = pair.tokens("a")
    assert tokens == answer(request)[: len(tokens)]
    if who == "both":
        assert not pair.prefill_errors
        assert not pair.decode_errors


@at_every_stage
@pytest.mark.parametrize("is_told", [True, False], ids=["aborted", "not told"])
def test_a_new_attempt_overtakes_the_old_one_at_any_stage(stage: Stage, is_told: bool) -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    stage(pair)
    if is_told:
        pair.prefill.abort("a")
        pair.decode.abort("a")
    so_far = pair.tokens("a")
    pair.open(dataclasses.replace(request, output_token_ids=tuple(so_far)), 1)
    pair.run()
    assert pair.tokens("a") == answer(request)
    assert not pair.prefill_errors
    assert not pair.decode_errors
    assert pair.is_empty()


@at_every_stage
def test_an_attempt_that_is_not_newer_is_refused_and_changes_nothing(stage: Stage) -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request, 3)
    stage(pair)
    for epoch in (3, 2):
        if stage not in (committed, decoding):
            with pytest.raises(TransferFailed, match=f"attempt {epoch} came after attempt 3"):
                pair.prefill.open_prefill(request, epoch, pair.channel)
        with pytest.raises(TransferFailed, match=f"attempt {epoch} came after attempt 3"):
            pair.decode.open_decode(request, epoch)
    pair.run()
    assert pair.tokens("a") == answer(request)


# ---- leases


def test_a_decode_lease_that_nobody_renews_runs_out_and_refuses_what_comes() -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    between_chunks(pair)
    pair.pass_time(LEASE_S)
    assert pair.decode.pool.num_used == 0
    pair.run()
    assert "no lease" in str(pair.prefill_errors["a"])
    assert "its lease ran out" in str(pair.decode_errors["a"])
    assert pair.is_empty()


def test_renewed_leases_live_on() -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    between_chunks(pair)
    for _ in range(5):
        pair.pass_time(LEASE_S * 0.9)
        pair.prefill.renew(["a"])
        pair.decode.renew(["a"])
    pair.run()
    assert pair.tokens("a") == answer(request)


def test_a_prefill_whose_claim_is_never_answered_ends_with_its_lease() -> None:
    pair = Pair()
    pair.prefill.open_prefill(make_request(PROMPT, "a"), 0, pair.channel)
    pair.pass_time(LEASE_S)
    assert "its lease ran out" in str(pair.prefill_errors["a"])
    assert pair.is_empty()
    assert pair.prefill.snapshot().num_waiting == 0


def test_a_refused_claim_fails_the_attempt() -> None:
    pair = Pair()
    pair.prefill.open_prefill(make_request(PROMPT, "a"), 0, pair.channel)
    pair.channel.deliver()
    pair.decode.abort("a")
    assert isinstance(pair.prefill_errors["a"], TransferFailed)
    assert pair.is_empty()


def test_decode_without_room_is_overloaded_and_leases_nothing() -> None:
    pair = Pair()
    pair.decode.open_decode(make_request(list(range(60)), "large"), 0)
    with pytest.raises(Overloaded, match="KV cache is full: 5 blocks wanted, 3 of 19 free"):
        pair.decode.open_decode(make_request(list(range(18)), "a"), 0)
    assert pair.decode.snapshot().num_leases == 1


# ---- claims


def refusals(reply: Message) -> str:
    return str(reply.get("error", ""))


def test_a_late_answer_to_an_old_claim_does_not_disturb_the_new_attempt() -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    pair.prefill.open_prefill(request, 1, pair.channel)
    pair.channel.deliver()
    assert not pair.prefill.engine.sequences
    pair.decode.open_decode(request, 1)
    pair.channel.deliver()
    assert [s.epoch for s in pair.prefill.engine.sequences.values()] == [1]
    pair.run()
    assert pair.tokens("a") == answer(request)
    assert not pair.prefill_errors


def test_a_refused_old_claim_does_not_disturb_the_new_attempt() -> None:
    """Nor the vision replica that has claimed the new attempt's place before it was opened."""
    pair, request = Pair(), make_request([7, make_image(1, (1, 4, 4)), 8], "a", max_tokens=6)
    pair.prefill.open_prefill(request, 0, pair.channel)
    replies: list[Message] = []
    pair.prefill.inbox.handle({"type": "claim", "request_id": "a", "epoch": 1}, replies.append)
    pair.channel.fail(TransferFailed("lost"))
    assert isinstance(pair.prefill_errors.pop("a"), TransferFailed)
    assert not replies
    pair.open(request, 1)
    pair.channel.deliver()
    assert replies == [{"media": [0]}]
    assert not pair.prefill_errors


def test_a_worker_may_change_sides_between_attempts() -> None:
    """It has claimed a place for attempt 0 when attempt 1 chooses it to decode."""
    pair, request = Pair(), make_request(PROMPT, "a")
    pair.prefill.open_prefill(request, 0, pair.channel)
    pair.prefill.open_decode(request, 1)
    pair.channel.fail(TransferFailed("lost"))
    assert not pair.prefill_errors
    assert pair.prefill.leases.find("a", 1)
    assert pair.prefill.snapshot().num_waiting == 0
    pair.prefill.open_prefill(request, 2, pair.channel)
    with pytest.raises(TransferFailed, match="attempt 1 is fenced off"):
        pair.prefill.inbox.accept(*unwanted_piece(1))
    assert pair.prefill.abort("a")
    assert pair.is_empty()


def test_of_two_claims_the_newer_one_waits() -> None:
    pair, request = Pair(), make_request(PROMPT, "a")
    replies: list[Message] = []
    for epoch in (1, 2):
        pair.decode.inbox.handle({"type": "claim", "request_id": "a", "epoch": epoch}, replies.append)
    assert [refusals(r) for r in replies] == ["request a: attempt 2 claims this place"]
    with pytest.raises(TransferFailed, match="attempt 1 is fenced off by attempt 2"):
        pair.decode.inbox.handle({"type": "claim", "request_id": "a", "epoch": 1}, replies.append)
    pair.decode.open_decode(request, 2)
    assert replies[1:] == [{"cached_blocks": 0}]


def test_a_claim_that_waited_in_vain_is_refused_and_nobody_elses_lease_ends() -> None:
    pair, request = Pair(), make_request(PROMPT, "a")
    replies: list[Message] = []
    pair.decode.inbox.handle({"type": "claim", "request_id": "a", "epoch": 1}, replies.append)
    pair.pass_time(LEASE_S / 2)
    pair.decode.open_decode(request, 0)
    pair.pass_time(LEASE_S / 2)
    assert [refusals(r) for r in replies] == ["request a: no place was reserved in time"]
    assert pair.decode.snapshot().num_leases == 1
    assert not pair.decode_errors


def test_a_vision_replica_that_comes_after_all_was_done_is_told_that_nothing_is_wanted() -> None:
    """The prefix cache held the picture, so the prompt was computed before the picture was offered."""
    pair = Pair(max_batch_tokens=32)
    seen = make_request([7, make_image(1, (1, 4, 4)), *range(6)], "first", max_tokens=1)
    pair.prefill.open_prefill(seen, 0, None)
    for piece in picture_pieces(seen, 0, 0, 4):
        pair.prefill.inbox.accept(*piece)
    pair.run()
    pair.open(dataclasses.replace(seen, request_id="again"))
    committed(pair)
    assert "again" not in pair.prefill.engine.sequences
    replies: list[Message] = []
    pair.prefill.inbox.handle({"type": "claim", "request_id": "again", "epoch": 0}, replies.append)
    assert replies == [{"media": []}]
    pair.prefill.inbox.handle({"type": "claim", "request_id": "again", "epoch": 0}, replies.append)
    pair.pass_time(LEASE_S)
    assert len(replies) == 2


# ---- pieces and commits


def kv_piece(epoch: int, number: int, detail: tuple[int, int, int, int], num_bytes: int | None = None) -> PieceHeader:
    size = detail[1] * detail[3] * 2 * BLOCK_SIZE * 8 if num_bytes is None else num_bytes
    return PieceHeader("a", epoch, number, size, (KV_PIECE, *detail))


def payload(header: PieceHeader) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.full(header.nbytes, 7, np.uint8)


def unwanted_piece(epoch: int) -> tuple[PieceHeader, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    header = kv_piece(epoch, 0, (0, 1, 1, 1))
    return header, payload(header)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (kv_piece(0, 0, (0, 1, 1, 1)), "attempt 0 is fenced off, attempt 1 holds the lease"),
        (kv_piece(2, 0, (0, 1, 1, 1)), "attempt 2 is fenced off, attempt 1 holds the lease"),
        (dataclasses.replace(kv_piece(1, 0, (0, 1, 1, 1)), request_id="b"), "no lease; it ended or ran out"),
        (kv_piece(1, 9, (0, 1, 1, 1)), "piece 9 came twice"),
        (kv_piece(1, 0, (0, 1, 0, 1)), "does not fit the lease"),  # the cached prefix, which others read
        (kv_piece(1, 0, (0, 1, 3, 2)), "does not fit the lease"),
        (kv_piece(1, 0, (NUM_LAYERS - 1, 2, 1, 1)), "does not fit the lease"),
        (kv_piece(1, 0, (0, 0, 1, 1)), "does not fit the lease"),
        (kv_piece(1, 0, (-1, 1, 1, 1)), "does not fit the lease"),
        (kv_piece(1, 0, (0, 1, 1, 1), num_bytes=8), "does not fit the lease"),
        (PieceHeader("a", 1, 0, 8, (5,)), "unknown kind 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_piece_that_does_not_belong_is_refused_and_writes_nothing(header: PieceHeader, reason: str) -> None:
    pair = Pair()
    pair.decode.open_prefill(make_request([*PROMPT[:4], 1], "cached", max_tokens=1), 0, None)
    while pair.decode.engine.step():
        pass
    pair.decode.open_decode(make_request(PROMPT, "a", max_tokens=1), 1)
    assert pair.decode.leases.find("a", 1).num_shared == 1
    first = kv_piece(1, 9, (0, 1, 2, 1))
    pair.decode.inbox.accept(first, payload(first))
    before, received = pair.decode.engine.runner.kv.data.clone(), pair.decode.inbox.bytes_received
    with pytest.raises(TransferFailed, match=reason):
        pair.decode.inbox.accept(header, payload(header))
    assert pair.decode.engine.runner.kv.data.equal(before)
    assert pair.decode.inbox.bytes_received == received


@pytest.mark.parametrize("error", [TransferFailed("lost"), ReplicaLost("gone")])
def test_a_commit_whose_piece_is_missing_is_refused(error: TransferFailed | ReplicaLost) -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    committing(pair)
    pair.channel.fail(error)
    pair.run()
    assert "1 of 3 pieces did not arrive" in str(pair.prefill_errors["a"])
    assert pair.prefill.pool.num_used == 0
    assert pair.decode.snapshot().num_leases == 1
    pair.open(request, 1)
    pair.run()
    assert pair.tokens("a") == answer(request)
    assert pair.is_empty()


def test_a_commit_that_leaves_blocks_unfilled_is_refused() -> None:
    """Even when its count of pieces is right."""
    pair = Pair()
    pair.decode.open_decode(make_request(PROMPT, "a"), 0)
    piece = kv_piece(0, 0, (0, NUM_LAYERS, 0, 2))
    pair.decode.inbox.accept(piece, payload(piece))
    commit: Message = {"type": "commit", "request_id": "a", "epoch": 0, "num_pieces": 1, "output": [1]}
    with pytest.raises(TransferFailed, match="256 bytes arrived, 9 tokens have 384"):
        pair.decode.inbox.handle(commit, lambda reply: None)
    assert pair.decode.snapshot().num_leases == 1
    assert pair.decode.abort("a")
    assert pair.is_empty()


def test_a_commit_counts_once() -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    committing(pair)
    message = pair.channel.jobs[-1].message
    pair.channel.deliver_all()
    with pytest.raises(TransferFailed, match="no lease"):
        pair.decode.inbox.handle(message, lambda reply: None)
    pair.run()
    assert pair.tokens("a") == answer(request)


class ClosedChannel(ManualChannel):
    """Breaks after the claim: a commit fails before `call` returns."""

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        if message["type"] == "claim":
            return super().call(message, timeout_s)
        future: Future[Message] = Future()
        future.set_exception(ReplicaLost("gone"))
        return future


def test_the_first_token_comes_before_the_failure_of_its_hand_over() -> None:
    pair, seen = Pair(), []
    pair.prefill.engine.emit = pair.prefill._emit = seen.extend
    pair.channel = ClosedChannel(pair.decode.inbox)
    pair.open(make_request(PROMPT, "a"))
    claimed(pair)
    while pair.prefill.engine.step():
        pass
    assert [type(outcome).__name__ for outcome in seen] == ["TokenEvent", "RequestFailed"]
    assert pair.prefill.pool.num_used == 0


# ---- pictures


def test_rows_of_a_picture_count_once() -> None:
    """A picture is whole when all its rows are there, not when as many have come."""
    pair = Pair()
    request = make_request([7, make_image(1, (1, 4, 4)), 8], "a", max_tokens=3)
    pair.prefill.open_prefill(request, 0, None)
    pieces = picture_pieces(request, 0, 0, 2)
    pair.prefill.inbox.accept(*pieces[0])
    with pytest.raises(TransferFailed, match="rows from 0 of picture 0 came twice"):
        pair.prefill.inbox.accept(*pieces[0])
    pair.run()
    assert pair.prefill.engine.sequences["a"].num_computed == 2
    pair.prefill.inbox.accept(*pieces[1])
    with pytest.raises(TransferFailed, match="rows from 2 of picture 0 came twice"):
        pair.prefill.inbox.accept(*pieces[1])
    pair.run()
    assert pair.tokens("a") == answer(request)


@pytest.mark.parametrize(
    ("epoch", "detail", "reason"),
    [
        (1, (EMBED_PIECE, 0, 0, 2), "no prompt waits for attempt 1's picture"),
        (0, (EMBED_PIECE, 1, 0, 2), "no prompt waits"),
        (0, (EMBED_PIECE, -1, 0, 2), "no prompt waits"),
        (0, (EMBED_PIECE, 0, 3, 2), "2 rows from 3 do not fit 4"),
        (0, (EMBED_PIECE, 0, 0, 1), "1 rows from 0 do not fit 4"),
    ],
)
def test_rows_that_do_not_belong_are_refused(epoch: int, detail: tuple[int, ...], reason: str) -> None:
    pair = Pair()
    request = make_request([7, make_image(1, (1, 4, 4)), 8], "a")
    pair.prefill.open_prefill(request, 0, None)
    header, rows = picture_pieces(request, 0, 0, 2)[0]
    with pytest.raises(TransferFailed, match=reason):
        pair.prefill.inbox.accept(dataclasses.replace(header, epoch=epoch, detail=detail), rows)
    assert not pair.prefill.engine.sequences["a"].arriving


@pytest.mark.parametrize("end", ["abort", "deadline", "new attempt"])
def test_half_a_picture_goes_with_its_sequence(end: str) -> None:
    pair = Pair()
    request = dataclasses.replace(make_request([7, make_image(1, (1, 4, 4)), 8], "a", max_tokens=3), timeout_s=5.0)
    pair.prefill.open_prefill(request, 0, None)
    old = pair.prefill.engine.sequences["a"]
    pieces = picture_pieces(request, 0, 0, 2)
    pair.prefill.inbox.accept(*pieces[0])
    if end == "abort":
        pair.prefill.abort("a")
    elif end == "deadline":
        pair.now = 5.0
    else:
        pair.prefill.open_prefill(request, 1, None)
    pair.prefill.engine.step()
    assert (old.status, old.arriving) == (Status.FINISHED, {})
    with pytest.raises(TransferFailed, match="no prompt waits"):
        pair.prefill.inbox.accept(*pieces[1])
    if end == "new attempt":
        for piece in picture_pieces(request, 0, 1, 2):
            pair.prefill.inbox.accept(*piece)
        pair.run()
        assert pair.tokens("a") == answer(request)
    assert pair.is_empty()
