"""Laws of the outboxes: whatever is lost on the way, each client gets each outcome once, in order."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.actors import events
from ernie_cluster.actors.events import CLIENT_TIMEOUT_S, EventHub, weight
from ernie_cluster.actors.messages import Outcome
from ernie_cluster.errors import EngineFailed, Evicted
from ernie_cluster.request import FinishReason, RequestFailed, Span, TokenEvent, TokenLogprobs


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def play(test: Callable[[EventHub, Clock], Coroutine[Any, Any, None]], idle_s: float = 0.0) -> None:
    """Empty polls return at once, unless they shall not."""

    async def run() -> None:
        clock = Clock()
        await test(EventHub(clock, idle_s), clock)

    asyncio.run(run())


async def publish(hub: EventHub, *outcomes: Outcome) -> None:
    hub.publish(list(outcomes))
    await asyncio.sleep(0)  # the hub's turn on the loop


class Client:
    """Polls as an API replica does, over a wire that may lose answers."""

    def __init__(self, hub: EventHub, name: str) -> None:
        self._hub, self._name, self._acknowledged = hub, name, 0
        self.got: list[Outcome] = []

    async def poll(self, *, is_lost: bool = False) -> None:
        batch = await self._hub.poll(self._name, self._acknowledged)
        if not is_lost:
            self._acknowledged = batch.number
            self.got += batch.outcomes


# (client, None) publishes a token for it; (client, lost) polls, and loses the answer or not
STEPS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([None, False, True])), max_size=40)


@given(STEPS)
def test_each_outcome_arrives_once_and_in_order(steps: list[tuple[str, bool | None]]) -> None:
    async def test(hub: EventHub, _: Clock) -> None:
        clients = {name: Client(hub, name) for name in "ab"}
        sent: dict[str, list[Outcome]] = {"a": [], "b": []}
        for name in "ab":
            hub.open(name, f"request-{name}")
        for name, is_lost in steps:
            if is_lost is None:
                event = TokenEvent(f"request-{name}", len(sent[name]), (7,))
                sent[name].append(event)
                await publish(hub, event)
            else:
                await clients[name].poll(is_lost=is_lost)
        for name, client in clients.items():
            await client.poll()
            assert client.got == sent[name]
            await client.poll()
            assert client.got == sent[name], "something came twice"

    play(test)


def test_poll_that_waits_is_answered_by_an_outcome_from_another_thread() -> None:
    async def test(hub: EventHub, _: Clock) -> None:
        hub.open("a", "r")
        polling = asyncio.create_task(hub.poll("a", 0))
        await asyncio.sleep(0)
        assert not polling.done()
        event = TokenEvent("r", 0, (1,))
        thread = threading.Thread(target=hub.publish, args=([event],))
        thread.start()
        async with asyncio.timeout(10):
            assert (await polling).outcomes == (event,)
        thread.join()

    play(test, idle_s=30.0)


@pytest.mark.parametrize(
    "last", [TokenEvent("r", 0, (1,), FinishReason.LENGTH), RequestFailed("r", EngineFailed("broken"))]
)
def test_last_outcome_closes_its_request_and_is_still_delivered(last: Outcome) -> None:
    async def test(hub: EventHub, _: Clock) -> None:
        client = Client(hub, "a")
        hub.open("a", "r")
        assert hub.live_requests() == ["r"]
        await publish(hub, last)
        assert not hub.is_open("r")
        assert hub.live_requests() == []
        await client.poll()
        assert client.got == [last]

    play(test)


def test_closed_request_has_no_outcomes() -> None:
    async def test(hub: EventHub, _: Clock) -> None:
        client = Client(hub, "a")
        hub.open("a", "r")
        hub.close("r")
        hub.close("never heard of")
        await publish(hub, TokenEvent("r", 0, (1,)))
        await client.poll()
        assert client.got == []

    play(test)


def test_silent_client_loses_its_requests_and_no_other() -> None:
    async def test(hub: EventHub, clock: Clock) -> None:
        for name in "ab":
            hub.open(name, f"request-{name}")
            await Client(hub, name).poll()
        clock.now_s = CLIENT_TIMEOUT_S
        assert hub.drop_silent() == [], "it may still come"
        await hub.poll("b", 1)
        clock.now_s += 0.1
        assert hub.drop_silent() == ["request-a"]
        assert hub.live_requests() == ["request-b"]
        assert not hub.is_open("request-a")
        assert hub.drop_silent() == []

    play(test)


OUTCOMES: list[Outcome] = [
    TokenEvent("r" * 40, 0, (1,)),
    TokenEvent(
        "r", 0, (1 << 17,) * 100, spans=(Span("prefill", 1e9, 0.5, (("tokens", 1000), ("cached_tokens", 0))),) * 9
    ),
    TokenEvent("r", 0, (1,), logprobs=(TokenLogprobs(-0.25, tuple((100_000 + i, -1.5 * i) for i in range(20))),)),
    RequestFailed("r", EngineFailed("broken " * 100)),
]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_weighs_no_less_than_its_pickle(outcome: Outcome) -> None:
    assert len(pickle.dumps(outcome)) <= weight(outcome)


def test_a_batch_is_bounded_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BATCH_BYTES", 1000)

    async def test(hub: EventHub, _: Clock) -> None:
        client, sent = Client(hub, "a"), [TokenEvent("r", i, (7,)) for i in range(50)]
        hub.open("a", "r")
        await publish(hub, *sent)
        total = sum(map(weight, sent))
        assert hub.num_unread_bytes == total
        await client.poll()
        assert sum(map(weight, client.got)) < 1000 + weight(sent[0])
        await client.poll(is_lost=True)
        while len(client.got) < len(sent):
            num_got = len(client.got)
            await client.poll()
            assert len(client.got) > num_got
            assert sum(map(weight, client.got[num_got:])) < 1000 + weight(sent[0])
        assert client.got == sent
        await client.poll()
        assert hub.num_unread_bytes == 0

    play(test)


def test_a_client_that_takes_less_than_comes_is_parted_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """It polls, and never acknowledges."""
    monkeypatch.setattr(events, "MAX_UNREAD_BYTES", 10_000)

    async def test(hub: EventHub, _: Clock) -> None:
        hub.open("a", "big")
        hub.open("b", "small")
        num_events = 0
        while not (gone := hub.drop_silent()):
            await publish(hub, TokenEvent("big", num_events, (1,)))
            await hub.poll("a", 0)
            num_events += 1
        assert gone == ["big"]
        assert num_events * weight(TokenEvent("big", 0, (1,))) <= 11_000
        assert hub.num_unread_bytes == 0
        assert hub.live_requests() == ["small"]

    play(test)


@pytest.mark.parametrize("is_back", [False, True])
def test_a_client_that_was_given_up_is_told_so(is_back: bool) -> None:
    """Else its requests would wait for outcomes until their deadlines."""

    async def test(hub: EventHub, clock: Clock) -> None:
        client = Client(hub, "a")
        hub.open("a", "old")
        await client.poll()
        clock.now_s = CLIENT_TIMEOUT_S + 1
        assert hub.drop_silent() == ["old"]
        if is_back:
            hub.open("a", "new")
        with pytest.raises(Evicted, match="given up"):
            await client.poll()

    play(test)


def test_client_that_comes_back_starts_anew() -> None:
    async def test(hub: EventHub, clock: Clock) -> None:
        client = Client(hub, "a")
        hub.open("a", "old")
        await publish(hub, TokenEvent("old", 0, (1,)))
        await client.poll(is_lost=True)
        clock.now_s = CLIENT_TIMEOUT_S + 1
        assert hub.drop_silent() == ["old"]
        hub.open("a", "new")
        event = TokenEvent("new", 0, (2,))
        await publish(hub, event)
        await client.poll()
        await client.poll()
        assert client.got == [event]

    play(test)


def test_a_rank_that_ends_waits_until_clients_have_what_was_told_and_not_for_dead_ones() -> None:
    async def test(hub: EventHub, clock: Clock) -> None:
        hub.open("api-0", "a")
        client = Client(hub, "api-0")
        await client.poll()
        await publish(hub, TokenEvent("a", 0, (1,), FinishReason.STOP))
        flushing = asyncio.create_task(hub.flushed(5.0))
        await client.poll(is_lost=True)
        await asyncio.sleep(0)
        assert not flushing.done()
        await client.poll()
        await client.poll()
        await flushing
        assert [outcome.request_id for outcome in client.got] == ["a"]
        await publish(hub, TokenEvent("a", 0, (1,), FinishReason.STOP))
        hub.open("api-0", "b")
        await publish(hub, TokenEvent("b", 0, (1,), None))
        flushing = asyncio.create_task(hub.flushed(5.0))
        await asyncio.sleep(0)
        assert not flushing.done()
        clock.now_s += 5.0
        await flushing

    play(test)
