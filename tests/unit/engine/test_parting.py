"""A worker that leaves: whatever it holds ends with its last token told, and goes on elsewhere with the same text."""

from __future__ import annotations

import dataclasses

import pytest

from ernie_cluster.errors import ReplicaDraining
from tests.tiny import make_request
from tests.unit.engine.pair import BLOCK_SIZE, LEASE_S, PROMPT, STAGES, Pair, Stage, committed, decoding
from tests.unit.engine.toy import ManualChannel, answer

at_every_stage = pytest.mark.parametrize("stage", STAGES)


@at_every_stage
@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_a_request_that_was_parted_with_goes_on_from_its_last_token(stage: Stage, who: str) -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    stage(pair)
    leaving = getattr(pair, who)
    leaving.part()
    pair.run()
    errors = getattr(pair, f"{who}_errors")
    tokens = pair.tokens("a")
    if tokens != answer(request):  # a hand-over that had begun comes to its end
        assert isinstance(errors["a"], ReplicaDraining)
        leaving.stay()
        for worker in (pair.prefill, pair.decode):
            worker.abort("a")
        pair.run()
        pair.open(dataclasses.replace(request, request_id="b", output_token_ids=tuple(tokens)))
        pair.run()
        assert tokens + [pair.answers["b"][i] for i in range(len(tokens), 6)] == answer(request)
    pair.pass_time(LEASE_S)
    pair.run()
    assert pair.is_empty()


def test_what_leaves_takes_nothing_more_until_it_stays() -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    for worker in (pair.prefill, pair.decode):
        worker.part()
        assert worker.snapshot().num_waiting == 0
    with pytest.raises(ReplicaDraining, match="request a"):
        pair.decode.open_decode(request, 0)
    with pytest.raises(ReplicaDraining, match="request a"):
        pair.prefill.open_prefill(request, 0, pair.channel)
    for worker in (pair.prefill, pair.decode):
        worker.stay()
    pair.open(request)
    pair.run()
    assert pair.tokens("a") == answer(request)


def test_a_hand_over_that_has_begun_is_not_cut_off() -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    committed(pair)
    pair.prefill.part()
    pair.run()
    assert pair.tokens("a") == answer(request)
    assert not pair.prefill_errors


def test_what_leaves_lends_the_prompt_and_what_it_has_written() -> None:
    first, second = Pair(), Pair()
    request = make_request(PROMPT, "a", max_tokens=12)
    first.open(request)
    decoding(first)
    while len(first.tokens("a")) < 2 * BLOCK_SIZE:
        first.decode.engine.step()
    first.decode.part()
    first.run()
    done = first.tokens("a")
    again = dataclasses.replace(request, request_id="b", output_token_ids=tuple(done))
    second.decode.open_decode(again, 1)
    second.prefill.open_prefill(again, 1, second.channel, prefix_s=1.0)
    way = ManualChannel(second.prefill.inbox)
    first.decode.lend(again, 1, 9, way)
    while way.jobs or second.channel.jobs:
        way.deliver_all()
        second.channel.deliver_all()
    second.run()
    num_whole = (len(PROMPT) + len(done) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert num_whole > len(PROMPT)
    assert second.prefill.snapshot().prompt_tokens == len(PROMPT) + len(done) - num_whole, "the rest had come"
    assert [second.answers["b"][i] for i in range(len(done), 12)] == answer(request)[len(done) :]


def test_who_parts_in_a_long_step_is_asked_after_it() -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    decoding(pair)
    pair.decode.part()
    pair.pass_time(5.0)
    assert pair.decode.snapshot().is_lending
    pair.run()
    pair.pass_time(0.9)
    assert pair.decode.snapshot().is_lending, "it has just been told"
    pair.pass_time(0.2)
    assert not pair.decode.snapshot().is_lending


def test_who_has_parted_is_asked_for_a_while() -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.decode.part()
    assert not pair.decode.snapshot().is_lending, "nobody had to leave"
    pair.decode.stay()
    pair.open(request)
    decoding(pair)
    pair.decode.part()
    pair.run()
    assert pair.decode.snapshot().is_lending
    other = Pair()
    way = ManualChannel(other.prefill.inbox)
    other.prefill.open_prefill(request, 1, None, prefix_s=5.0)
    pair.decode.lend(request, 1, 2, way)
    pair.pass_time(1.0)
    assert pair.decode.snapshot().is_lending, "until all that was asked for has gone"
    way.deliver_all()
    assert not pair.decode.snapshot().is_lending
