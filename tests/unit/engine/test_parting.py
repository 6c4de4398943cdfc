"""A worker that leaves: whatever it holds ends with its last token told, and goes on elsewhere with the same text."""

from __future__ import annotations

import dataclasses

import pytest

from ernie_cluster.errors import ReplicaDraining
from tests.tiny import make_request
from tests.unit.engine.pair import LEASE_S, PROMPT, STAGES, Pair, Stage, committed, decoding
from tests.unit.engine.toy import answer

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


def test_what_leaves_still_lends_what_it_has_cached() -> None:
    first, second = Pair(), Pair()
    request = make_request(PROMPT, "a", max_tokens=6)
    first.open(request)
    decoding(first)
    first.decode.part()
    first.run()
    again = dataclasses.replace(request, request_id="b", output_token_ids=tuple(first.tokens("a")))
    second.decode.open_decode(again, 1)
    second.prefill.open_prefill(again, 1, second.channel, prefix_s=1.0)
    to_second = type(second.channel)(second.prefill.inbox)
    first.decode.lend(again, 1, 2, to_second)
    for _ in range(20):
        to_second.deliver_all()
        second.channel.deliver_all()
    second.run()
    assert second.prefill.snapshot().kv_bytes_received > 0
    assert [second.answers["b"][i] for i in range(len(first.tokens("a")), 6)] == answer(request)[
        len(first.tokens("a")) :
    ]
