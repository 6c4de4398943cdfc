"""Laws of the outboxes: whatever is lost on the way, each client gets each outcome once, in order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.actors import events
from ernie_cluster.actors.events import CLIENT_TIMEOUT_S, EventHub
from ernie_cluster.actors.messages import Outcome
from ernie_cluster.errors import EngineFailed
from ernie_cluster.request import FinishReason, RequestFailed, TokenEvent


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _empty_polls_return_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "POLL_S", 0.0)


def play(test: Callable[[EventHub, Clock], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        clock = Clock()
        await test(EventHub(clock), clock)

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


def test_poll_that_waits_is_answered_by_an_outcome_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "POLL_S", 30.0)

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

    play(test)


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
