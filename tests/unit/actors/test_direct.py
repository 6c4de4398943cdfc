"""Direct calls over a real loopback connection: answers, errors, order, proof, and the end of either side."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.actors import direct
from ernie_cluster.actors.direct import Address, DirectPeer, DirectServer, RemoteFailure
from ernie_cluster.errors import EngineFailed, Overloaded, ReplicaLost
from ernie_cluster.observe.log import bind_request_id, bound_request_id
from ernie_cluster.transport import keepalive
from ernie_cluster.transport.keepalive import SILENCE_S

TIMEOUT_S = 60.0


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, TIMEOUT_S))


class Rank:
    """Played process."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.gate = asyncio.Event()
        self.has_begun = asyncio.Event()

    async def echo(self, value: Any) -> Any:
        self.begun.append(value)
        self.has_begun.set()
        return value

    async def wait(self, value: Any) -> Any:
        self.begun.append(value)
        await self.gate.wait()
        return value

    async def refuse(self) -> None:
        raise Overloaded("full", 3.0)

    async def break_down(self) -> None:
        raise KeyError("oops")

    async def request(self) -> str:
        return bound_request_id()

    async def unsendable(self) -> Any:
        return threading.Lock()


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Rank, DirectServer, Address]]:
    rank = Rank()
    calls = (rank.echo, rank.wait, rank.refuse, rank.break_down, rank.request, rank.unsendable)
    server = DirectServer({call.__name__: call for call in calls})
    address = await server.start("127.0.0.1")
    try:
        yield rank, server, address
    finally:
        await server.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 1000, direct._APART_BYTES // 8, 300_000]), min_size=1, max_size=4))
def test_arrays_of_any_size_arrive_as_they_were(sizes: list[int]) -> None:
    async def work() -> None:
        async with serving() as (_, _, address):
            peer = await DirectPeer.connect(address, "rank")
            sent = [np.arange(size, dtype=np.float64) for size in sizes]
            got = await peer.call("echo", (sent, "text"))
            assert got[1] == "text"
            for a, b in zip(sent, got[0], strict=True):
                np.testing.assert_array_equal(a, b)
            await peer.close()

    run(work())


def test_the_other_side_logs_under_the_same_request() -> None:
    async def work() -> None:
        async with serving() as (_, _, address):
            peer = await DirectPeer.connect(address, "rank")
            with bind_request_id("req-1"):
                assert await peer.call("request") == "req-1"
            assert await peer.call("request") == ""
            await peer.close()

    run(work())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["echo", "wait"]), min_size=1, max_size=30))
def test_calls_begin_in_order_and_each_gets_its_own_answer(methods: list[str]) -> None:
    async def work() -> None:
        async with serving() as (rank, _, address):
            peer = await DirectPeer.connect(address, "rank")
            calls = [asyncio.ensure_future(peer.call(method, i)) for i, method in enumerate(methods)]
            assert await asyncio.ensure_future(peer.call("echo", "last")) == "last"
            assert rank.begun == [*range(len(methods)), "last"]
            rank.gate.set()
            assert await asyncio.gather(*calls) == list(range(len(methods)))
            await peer.close()

    run(work())


def test_errors_of_ours_arrive_as_they_are_and_others_as_a_failed_engine() -> None:
    async def work() -> None:
        async with serving() as (_, _, address):
            peer = await DirectPeer.connect(address, "rank")
            with pytest.raises(RemoteFailure) as refused:
                await peer.call("refuse")
            assert isinstance(refused.value.error, Overloaded)
            assert refused.value.error.retry_after_s == 3.0
            for method, words in (("break_down", "KeyError"), ("unsendable", "lock"), ("no_such", "no_such")):
                with pytest.raises(RemoteFailure) as failed:
                    await peer.call(method)
                assert isinstance(failed.value.error, EngineFailed)
                assert words in str(failed.value.error)
            assert await peer.call("echo", 1) == 1
            await peer.close()

    run(work())


def test_what_cannot_be_pickled_leaves_the_connection_as_it_was() -> None:
    async def work() -> None:
        async with serving() as (_, _, address):
            peer = await DirectPeer.connect(address, "rank")
            with pytest.raises(TypeError):
                await peer.call("echo", threading.Lock())
            assert await peer.call("echo", 1) == 1
            await peer.close()

    run(work())


def test_waiting_calls_fail_when_the_server_goes() -> None:
    async def work() -> None:
        async with serving() as (rank, server, address):
            peer = await DirectPeer.connect(address, "rank")
            call = asyncio.ensure_future(peer.call("wait", 1))
            await asyncio.ensure_future(peer.call("echo", 2))
            assert rank.begun == [1, 2]
            await server.close()
            with pytest.raises(ReplicaLost):
                await call
            assert peer.is_lost
            with pytest.raises(ReplicaLost):
                await peer.call("echo", 3)
            with pytest.raises(ReplicaLost):
                await DirectPeer.connect(address, "rank")

    run(work())


def test_a_call_that_was_given_up_disturbs_no_other() -> None:
    async def work() -> None:
        async with serving() as (rank, _, address):
            peer = await DirectPeer.connect(address, "rank")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(peer.call("wait", 1), 0.01)
            rank.gate.set()
            assert await peer.call("echo", 2) == 2
            await peer.close()

    run(work())


@pytest.mark.parametrize("first", [b"", b"x" * 32, b"x" * 200, b"\x80\x05" * 500])
def test_strangers_reach_nothing(first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "HANDSHAKE_TIMEOUT_S", 0.2)
    read: list[bytes] = []
    monkeypatch.setattr(direct.pickle, "loads", lambda data, **_: read.append(data))

    async def work() -> None:
        async with serving() as (rank, _, address):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(first)
            answer = await reader.read()  # until the server hangs up
            assert len(answer) in (0, 64)
            writer.close()
            assert not rank.begun
            assert not read

    run(work())


def test_both_sides_must_know_the_token() -> None:
    async def work() -> None:
        async with serving() as (rank, _, address):
            with pytest.raises(ReplicaLost, match="another process"):
                await DirectPeer.connect(dataclasses.replace(address, token=b"x" * 32), "rank")
            assert not rank.begun

    run(work())


def test_a_crowd_of_strangers_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_MAX_STRANGERS", 2)

    async def work() -> None:
        async with serving() as (_, _, address):
            idle = [await asyncio.open_connection(address.host, address.port) for _ in range(2)]
            known = []
            for _ in range(100):  # until the server has taken the two in
                try:
                    known.append(await DirectPeer.connect(address, "rank"))
                except ReplicaLost:
                    break
            else:
                raise AssertionError("nobody was turned away")
            for _, writer in idle:
                writer.close()
            for peer in known:
                await peer.close()

    run(work())


def test_the_token_is_not_printed() -> None:
    assert "secret" not in repr(Address("h", 1, b"secret"))


def test_a_caller_that_reads_no_answers_is_parted_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepalive, "UNREAD_MS", 300)

    async def work() -> None:
        async with serving() as (rank, server, address):
            peer = await DirectPeer.connect(address, "rank")
            other = await DirectPeer.connect(address, "rank")
            peer._writer.transport.pause_reading()  # type: ignore[attr-defined]
            calls = [asyncio.create_task(peer.call("echo", np.zeros(4 << 20, np.uint8))) for _ in range(8)]
            await rank.has_begun.wait()
            await asyncio.gather(*server._work)  # each waits to be read
            assert await other.call("echo", 1) == 1
            await asyncio.gather(peer.close(), other.close())
            for call in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(call, ReplicaLost)

    run(work())


def test_too_many_calls_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MAX_CALLS", 2)

    async def work() -> None:
        async with serving() as (rank, _, address):
            peer, other = await DirectPeer.connect(address, "rank"), await DirectPeer.connect(address, "rank")
            waiting = [asyncio.create_task(peer.call("wait", i)) for i in range(2)]
            await asyncio.sleep(0)  # they are sent
            with pytest.raises(RemoteFailure) as refused:
                await peer.call("echo", 1)
            assert isinstance(refused.value.error, Overloaded)
            assert await other.call("echo", 2) == 2
            rank.gate.set()
            assert await asyncio.gather(*waiting) == [0, 1]
            assert await peer.call("echo", 3) == 3
            await asyncio.gather(peer.close(), other.close())

    run(work())


def test_both_ends_notice_a_host_that_is_gone() -> None:
    """Without it, a connection whose other end vanished without a word would stay for ever."""

    async def scene() -> None:
        async with serving() as (_, server, address):
            peer = await DirectPeer.connect(address, "rank")
            assert await peer.call("echo", 1) == 1
            for writer in (peer._writer, *server._writers):
                sock = writer.get_extra_info("socket")
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * SILENCE_S
            await peer.close()

    run(scene())
