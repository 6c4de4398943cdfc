"""What befalls pieces and messages on purpose: the points `transport.*` of `config.faults`, around any channel and sink.

Faults of a piece strike between its checksum and its sending, so every channel asks `Tamper` there; those of messages
strike before the channel has seen them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.errors import TransferFailed
from ernie_cluster.faults import Faults, injected
from ernie_cluster.transport.base import Channel, Message, Pack, Payload, PieceHeader, Reply, Sink, Tamper

_EXPONENT = 0x40
"""A bit of a number's exponent, where numbers have two or four bytes: what comes of it is seen in answers."""


class Tamperable(Protocol):
    """A channel that asks before a piece leaves."""

    tamper: Tamper | None


def tamper_with(faults: Faults) -> Tamper:
    """The faults of pieces; see `Tamper`."""

    def tamper(payload: Payload) -> bool:
        rule = faults.hit("transport.push")
        if rule is None:
            return True
        if rule.action == "corrupt":
            payload[min(len(payload) - 1, len(payload) // 2 | 3)] ^= _EXPONENT
        faults.suffer(rule)
        return rule.action != "drop"

    return tamper


class FaultyChannel:
    """A `Channel` whose pieces and messages may come to grief.

    Args:
        channel: closed with this one.
        faults: of this process.
    """

    def __init__(self, channel: Channel, faults: Faults) -> None:
        self._channel, self._faults = channel, faults
        cast(Tamperable, channel).tamper = tamper_with(faults)

    @property
    def max_piece_bytes(self) -> int:
        return self._channel.max_piece_bytes

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        return self._channel.push(header, pack)

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        rule = self._faults.hit("transport.commit" if message.get("type") == "commit" else "transport.call")
        if rule is None:
            return self._channel.call(message, timeout_s)
        answer: Future[Message] = Future()
        match rule.action:
            case "error":
                answer.set_exception(injected(rule))
            case "drop":
                lost = TransferFailed("no reply within the timeout of the call; the peer may still act on it")
                _later(timeout_s, lambda: _settle(answer, lost))
            case "delay":
                copied = dict(message)
                _later(rule.lasts_s, lambda: self._channel.call(copied, timeout_s).add_done_callback(_into(answer)))
            case _:
                self._faults.suffer(rule)
                return self._channel.call(message, timeout_s)
        return answer

    def close(self) -> None:
        self._channel.close()


class FaultySink:
    """A `Sink` that pieces may not reach.

    Args:
        sink: takes what gets through.
        faults: of this process.
    """

    def __init__(self, sink: Sink, faults: Faults) -> None:
        self._sink, self._faults = sink, faults

    def accept(self, header: PieceHeader, payload: NDArray[np.uint8]) -> None:
        self._faults.meet("transport.accept")
        self._sink.accept(header, payload)

    def handle(self, message: Message, reply: Reply) -> None:
        self._sink.handle(message, reply)

    def disconnected(self, peer: str) -> None:
        self._sink.disconnected(peer)


def _later(seconds: float, work: Callable[[], Any]) -> None:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.start()


def _into(answer: Future[Message]) -> Callable[[Future[Message]], None]:
    return lambda done: _settle(answer, done.exception() or done.result())


def _settle(answer: Future[Message], outcome: Message | BaseException) -> None:
    """Unless its owner has cancelled it."""
    if answer.set_running_or_notify_cancel():
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)
