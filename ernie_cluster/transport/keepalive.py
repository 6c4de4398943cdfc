"""TCP connections that notice when the host at the other end is gone. Linux only."""

from __future__ import annotations

import socket
from typing import Protocol

SILENCE_S = 10
"""A host that answers no packet for this long is gone; connections to a process that has ended break at once."""

UNREAD_MS = 1000 * SILENCE_S
"""So is a process that takes nothing of what it is sent."""


class Socket(Protocol):
    """What `watch` needs of a socket, which asyncio's have, too."""

    def setsockopt(self, level: int, optname: int, value: int, /) -> None: ...


def watch(sock: Socket) -> None:
    """Let the kernel notice a host that is gone, whether bytes are on their way or not."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_S // 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
