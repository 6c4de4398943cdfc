"""Calls between our own processes over one TCP connection each: what stands in a request's way to its first token.

An actor call of Ray's passes through six threads and takes 3.6 ms there and back between processes that rest, this
0.5 ms (measured, 2 cores). Ray still starts the processes, watches them, and tells their addresses.

Messages are pickles, so a connection must prove itself before the first is read: both ends know the server's token,
which travels through Ray only, and show it by a keyed hash over fresh numbers of both. Whoever holds the token is
trusted as Ray trusts its own workers; like Ray's, the connection is not encrypted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import pickle
import secrets
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ernie_cluster.actors import background
from ernie_cluster.errors import EngineFailed, ErnieClusterError, Overloaded, ReplicaLost
from ernie_cluster.observe.log import bind_request_id, bound_request_id
from ernie_cluster.transport.keepalive import watch

HANDSHAKE_TIMEOUT_S = 5.0
"""Who has not proved itself by then is dropped."""
MAX_MESSAGE_BYTES = 1 << 30

MAX_CALLS = 4096
"""Most calls of one connection that are worked on at the same time."""

_NONCE_BYTES = 32
_MAX_STRANGERS = 64
"""Connections in the middle of their handshake."""
_READ_AHEAD_BYTES = 1 << 20
_APART_BYTES = 1 << 16
"""Buffers from this size on are not copied into the pickle."""
_MAX_APART = 4096
_HEAD = struct.Struct("<QI")  # bytes of the pickle, number of buffers
_SIZE = struct.Struct("<Q")

_log = logging.getLogger(__name__)

Method = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a `DirectServer` listens, and what proves that one may call it."""

    host: str
    port: int
    token: bytes = field(repr=False)


class RemoteFailure(Exception):
    """The other side is alive and says that the call failed.

    Args:
        error: why.
    """

    def __init__(self, error: ErnieClusterError) -> None:
        super().__init__(error)
        self.error = error


class DirectServer:
    """Offers methods of one process to its peers. Calls of a connection begin in the order in which they were made; those
    beyond `MAX_CALLS` are refused.

    Args:
        methods: by name. An error of our tree goes to the caller as it is, any other as EngineFailed.
        visit: entered for each connection that has proved itself, left at its end; gives the methods for it. None = they
            are the same for all.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        visit: Callable[[], AbstractContextManager[Mapping[str, Method]]] | None = None,
    ) -> None:
        self._visit = visit or (lambda: contextlib.nullcontext(methods))
        self._token = secrets.token_bytes(32)
        self._strangers = 0
        self._work: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> Address:
        """Listen on a free port of `host`."""
        self._server = await asyncio.start_server(self._serve, host, limit=_READ_AHEAD_BYTES)
        port: int = self._server.sockets[0].getsockname()[1]
        return Address(host, port, self._token)

    async def close(self) -> None:
        """Listen no more and drop all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._work:
            task.cancel()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        num_calls = 0

        def done(task: asyncio.Task[None]) -> None:
            nonlocal num_calls
            num_calls -= 1
            self._work.discard(task)

        try:
            watch(writer.get_extra_info("socket"))
            if await self._admit(reader, writer):
                with self._visit() as methods:
                    while True:
                        number, name, args, request_id = await _receive(reader)
                        # nobody's child: what a call starts in Ray must not end with the request it came from
                        is_full = num_calls >= MAX_CALLS
                        answer = self._answer(writer, number, methods, name, args, request_id, is_full=is_full)
                        task = background.start(answer)
                        num_calls += 1
                        self._work.add(task)
                        task.add_done_callback(done)
        except (OSError, EOFError):
            pass  # the peer is gone
        except Exception:
            _log.exception("a direct connection ended")
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if self._strangers >= _MAX_STRANGERS:
            return False
        self._strangers += 1
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                theirs = await reader.readexactly(_NONCE_BYTES)
                ours = secrets.token_bytes(_NONCE_BYTES)
                writer.write(ours + _proof(self._token, b"server", theirs, ours))
                shown = await reader.readexactly(_NONCE_BYTES)
        except TimeoutError:
            return False
        finally:
            self._strangers -= 1
        return hmac.compare_digest(shown, _proof(self._token, b"client", theirs, ours))

    async def _answer(
        self,
        writer: asyncio.StreamWriter,
        number: int,
        methods: Mapping[str, Method],
        name: str,
        args: tuple[Any, ...],
        request_id: str,
        *,
        is_full: bool,
    ) -> None:
        error: ErnieClusterError | None = None
        frames: list[bytes | memoryview] = []
        with bind_request_id(request_id):
            try:
                if is_full:
                    raise Overloaded(f"{name}: {MAX_CALLS} calls of one caller are worked on, which is the limit", 1.0)
                frames = _frames((number, None, await methods[name](*args)))
            except ErnieClusterError as e:
                error = e
            except Exception as e:
                _log.exception("%s failed", name)
                error = EngineFailed(f"{name}: {type(e).__name__}: {e}")
        if not writer.is_closing():
            with contextlib.suppress(OSError):
                writer.writelines(frames if error is None else _frames((number, error, None)))
                await writer.drain()


class DirectPeer:
    """A connection to a `DirectServer`; any number of calls side by side. Made by `connect`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, where: str) -> None:
        self._writer = writer
        self._where = where
        self._last_number = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.is_lost = False
        """The connection is down, for ever."""
        self._reading = background.start(self._read(reader))

    @classmethod
    async def connect(cls, address: Address, where: str) -> DirectPeer:
        """Connect and prove both sides to each other.

        Args:
            where: who is called, for messages.

        Raises:
            ReplicaLost: nobody listens there, or not who should.
        """
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(address.host, address.port, limit=_READ_AHEAD_BYTES)
                watch(writer.get_extra_info("socket"))
                ours = secrets.token_bytes(_NONCE_BYTES)
                writer.write(ours)
                answer = await reader.readexactly(2 * _NONCE_BYTES)
            theirs, shown = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
            if not hmac.compare_digest(shown, _proof(address.token, b"server", ours, theirs)):
                raise ReplicaLost(f"{where}: another process listens at its address")
        except BaseException as e:
            if writer is not None:
                writer.close()
            if isinstance(e, (OSError, EOFError)):  # timeouts are OSErrors
                raise ReplicaLost(f"{where} is gone: {e or type(e).__name__}") from None
            raise
        writer.write(_proof(address.token, b"client", ours, theirs))
        return cls(reader, writer, where)

    async def call(self, method: str, *args: Any) -> Any:
        """What the method returns there. Giving up waiting does not end its work. The request's id that is bound here is bound there.

        Raises:
            RemoteFailure: the other side says that it failed.
            ReplicaLost: the connection is down; whether the call was carried out is unknown.
        """
        if self.is_lost:
            raise ReplicaLost(f"{self._where} is gone")
        self._last_number = number = self._last_number + 1
        self._waiting[number] = future = asyncio.get_running_loop().create_future()
        try:
            self._writer.writelines(_frames((number, method, args, bound_request_id() or "-")))
            await self._writer.drain()
            return await future
        except OSError as e:
            raise ReplicaLost(f"{self._where} is gone: {e}") from None
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """End the connection; calls that wait fail with ReplicaLost."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, error, value = await _receive(reader)
                future = self._waiting.get(number)
                if future is None or future.done():
                    continue  # nobody waits any more
                if error is not None:
                    future.set_exception(RemoteFailure(error))
                else:
                    future.set_result(value)
        except (OSError, EOFError):
            pass
        finally:
            self.is_lost = True
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ReplicaLost(f"{self._where} is gone"))


def _proof(token: bytes, side: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    return hmac.digest(token, side + client_nonce + server_nonce, "sha256")


def _frames(message: Any) -> list[bytes | memoryview]:
    """A message as it goes over the wire."""
    apart: list[memoryview] = []

    def copies(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= _APART_BYTES:
            apart.append(raw)
        return raw.nbytes < _APART_BYTES

    head = pickle.dumps(message, protocol=5, buffer_callback=copies)
    sizes = b"".join(_SIZE.pack(raw.nbytes) for raw in apart)
    return [_HEAD.pack(len(head), len(apart)) + sizes + head, *apart]


async def _receive(reader: asyncio.StreamReader) -> Any:
    """Next message; EOFError at the end of the stream. Large arrays in it are read-only."""
    head_bytes, num_apart = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    if num_apart > _MAX_APART:
        raise EOFError(f"a message announces {num_apart} buffers")
    sizes = [size for (size,) in _SIZE.iter_unpack(await reader.readexactly(num_apart * _SIZE.size))]
    if head_bytes + sum(sizes) > MAX_MESSAGE_BYTES:
        raise EOFError(f"a message announces {head_bytes + sum(sizes)} bytes")
    head = await reader.readexactly(head_bytes)
    return pickle.loads(head, buffers=[await reader.readexactly(size) for size in sizes])
