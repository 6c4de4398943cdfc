"""One request between a prefill and a decode worker, again and again: who may still do what, and who frees it."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future

import pytest

from ernie_cluster.engine.engine import Outcome
from ernie_cluster.errors import Overloaded, ReplicaLost, TransferFailed
from ernie_cluster.transport.base import Message
from tests.tiny import make_image, make_request
from tests.unit.engine.pair import LEASE_S, PROMPT, STAGES, Pair, Stage, between_chunks, claimed, committed, decoding
from tests.unit.engine.test_pieces import kv_piece, payload
from tests.unit.engine.toy import ManualChannel, answer, picture_pieces

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


def test_an_attempt_whose_claim_and_lease_end_together_fails_once() -> None:
    """Its prefix is awaited; that it is not any more makes the claim's failure known in the midst of the sweep."""
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    failures: list[Outcome] = []
    pair.prefill._emit = pair.prefill._openings._emit = failures.extend
    pair.prefill.open_prefill(request, 0, pair.channel, prefix_s=LEASE_S)
    pair.now = LEASE_S
    pair.channel.fail(TransferFailed("no reply within the timeout of the call"))
    pair.prefill.sweep()
    assert len(failures) == 1
    assert pair.is_empty()


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
    piece = kv_piece(1, 0, (0, 1, 1, 1))
    with pytest.raises(TransferFailed, match="attempt 1 is fenced off"):
        pair.prefill.inbox.accept(piece, payload(piece))
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


@pytest.mark.parametrize("is_second_late", [False, True])
def test_vision_replicas_share_the_pictures_of_a_prompt(is_second_late: bool) -> None:
    """Each is told which of its own are wanted; where the prompt was done before it came, none are."""
    pair = Pair(max_batch_tokens=32)
    seen = make_request([make_image(1, (1, 4, 4)), *range(6)], "seen", max_tokens=1)
    pair.prefill.open_prefill(seen, 0, None)
    for piece in picture_pieces(seen, 0, 0, 4):
        pair.prefill.inbox.accept(*piece)
    pair.run()
    images = [make_image(seed, (1, 4, 4)) for seed in (1, 2, 3)]
    request = make_request([images[0], 0, 1, 2, 3, images[1], images[2], 7], "a", max_tokens=3)
    replies: dict[str, list[Message]] = {"one": [], "two": [], "three": []}

    def claim(who: str, *media: int) -> None:
        message: Message = {"type": "claim", "request_id": "a", "epoch": 0, "media": list(media)}
        pair.prefill.inbox.handle(message, replies[who].append)

    claim("one", 0, 2)
    if not is_second_late:
        claim("two", 1)
    assert not any(replies.values())
    pair.prefill.open_prefill(request, 0, None)
    claim("three", 1)
    assert replies["one"] == [{"media": [2]}]
    assert replies["three"] == [{"media": [1]}]
    for index in (2, 1):
        for piece in picture_pieces(request, index, 0, 4):
            pair.prefill.inbox.accept(*piece)
    pair.run()
    assert pair.tokens("a") == answer(request)
    claim("two", 0)
    assert replies["two"][-1] == {"media": []}
    assert pair.is_empty()


# ---- failures


class ClosedChannel(ManualChannel):
    """Breaks after the claim: a commit fails before `call` returns."""

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        if message["type"] == "claim":
            return super().call(message, timeout_s)
        future: Future[Message] = Future()
        future.set_exception(ReplicaLost("gone"))
        return future


def test_the_first_token_comes_before_the_failure_of_its_hand_over() -> None:
    pair = Pair()
    seen: list[Outcome] = []
    pair.prefill.engine.emit = pair.prefill._emit = seen.extend
    pair.channel = ClosedChannel(pair.decode.inbox)
    pair.open(make_request(PROMPT, "a"))
    claimed(pair)
    while pair.prefill.engine.step():
        pass
    assert [type(outcome).__name__ for outcome in seen] == ["TokenEvent", "RequestFailed"]
    assert pair.prefill.pool.num_used == 0
