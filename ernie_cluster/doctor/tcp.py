"""A round trip and a throughput over one TCP connection; both ends know how much comes."""

from __future__ import annotations

import socket
import threading
import time

NUM_PINGS = 20
BULK_BYTES = 64 << 20
TIMEOUT_S = 10.0
"""For each step of a connection."""

_PIECE_BYTES = 1 << 20


def offer(host: str = "") -> int:
    """Answer one connection from a thread of its own; the port, which is free again after it or after `TIMEOUT_S`.

    Args:
        host: to listen on; empty = all interfaces.
    """
    listener = socket.create_server((host, 0))
    listener.settimeout(TIMEOUT_S)
    threading.Thread(target=_answer, args=(listener,), name="tcp-answer", daemon=True).start()
    return int(listener.getsockname()[1])


def _answer(listener: socket.socket) -> None:
    try:
        with listener, listener.accept()[0] as sock:
            _prepare(sock)
            for _ in range(NUM_PINGS):
                sock.sendall(_receive(sock, 1))
            left = BULK_BYTES
            while left:
                left -= len(_some(sock, left))
            sock.sendall(b"\0")
    except OSError:
        pass  # the other end tells what it saw


def measure(host: str, port: int) -> tuple[float, float]:
    """(seconds of the shortest round trip, bytes per second) to who has offered; raises OSError where there is no way."""
    with socket.create_connection((host, port), TIMEOUT_S) as sock:
        _prepare(sock)
        trips = []
        for _ in range(NUM_PINGS):
            start_s = time.perf_counter()
            sock.sendall(b"\0")
            _receive(sock, 1)
            trips.append(time.perf_counter() - start_s)
        piece, start_s = bytes(_PIECE_BYTES), time.perf_counter()
        for _ in range(BULK_BYTES // _PIECE_BYTES):
            sock.sendall(piece)
        _receive(sock, 1)
        return min(trips), BULK_BYTES / (time.perf_counter() - start_s)


def _prepare(sock: socket.socket) -> None:
    sock.settimeout(TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _receive(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        data += _some(sock, num_bytes - len(data))
    return data


def _some(sock: socket.socket, most: int) -> bytes:
    data = sock.recv(min(most, _PIECE_BYTES))
    if not data:
        raise ConnectionError("the other end has closed the connection")
    return data
