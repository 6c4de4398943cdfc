"""One process that decodes for another: strangers' files meet C code here, where memory and time end.

`python -m ernie_cluster.inputs.decoder MEMORY_BYTES`, with a socket as standard input. A request is a pickle, for it
comes from the process that started this one. An answer is never: a decoder that a file has taken over must not reach
that process. It is JSON, and behind it the patches as they lie in memory. The process ends when the socket does, and
when one file takes too long: the alarm's default action needs no cooperation of whatever runs then.
"""

from __future__ import annotations

import json
import pickle
import resource
import signal
import socket
import struct
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.errors import ContextTooLong, InvalidRequest
from ernie_cluster.inputs.images import PreparedMedia
from ernie_cluster.inputs.messages import Media, Settings

READY = b"\x01"
"""The first byte that a decoder sends: it has loaded all it needs."""

_HEAD = struct.Struct(">Q")
_MAX_HEAD_BYTES = 65_536
_ERRORS = {"ContextTooLong": ContextTooLong, "InvalidRequest": InvalidRequest}


def send_request(peer: socket.socket, settings: Settings, media: Media, timeout_s: float) -> None:
    """Ask a decoder for one picture or video, after `timeout_s` of which it ends itself; raises OSError."""
    content = pickle.dumps((settings, media, timeout_s))
    peer.sendall(_HEAD.pack(len(content)))
    peer.sendall(content)


def receive_answer(peer: socket.socket, settings: Settings, media: Media, max_bytes: int) -> PreparedMedia:
    """What a decoder made of a request.

    Args:
        settings, media: of the request; the answer must be possible for them.
        max_bytes: of the patches.

    Raises:
        InvalidRequest, ContextTooLong: the decoder's verdict.
        EOFError, OSError: it is gone.
        ValueError: no answer of ours.
    """
    (num_bytes,) = _HEAD.unpack(_receive(peer, _HEAD.size))
    if num_bytes > _MAX_HEAD_BYTES:
        raise ValueError("the head is too long")
    head = json.loads(_receive(peer, num_bytes))
    if "error" in head:
        raise _ERRORS[head["error"]](head["message"], head["param"], head["code"])
    t, h, w = grid = tuple(int(n) for n in head["grid"])
    row, digest = 3 * settings.pixels.patch_size**2, bytes.fromhex(head["hash"])
    if min(grid) < 1 or t * h * w * row > max_bytes or len(digest) != 32:
        raise ValueError("the answer is impossible")
    patches = np.empty((t * h * w, row), np.uint8)
    _receive_into(peer, patches.data.cast("B"))
    return PreparedMedia(media.kind, (t, h, w), patches, digest, int(head["num_tokens"]))


def serve(peer: socket.socket) -> None:
    """Answer requests until the other side closes the socket."""
    peer.sendall(READY)
    while True:
        try:
            (num_bytes,) = _HEAD.unpack(_receive(peer, _HEAD.size))
            settings, media, timeout_s = pickle.loads(_receive(peer, num_bytes))
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        head, patches = _answer(settings, media)
        content = json.dumps(head).encode()
        peer.sendall(_HEAD.pack(len(content)) + content)
        if patches is not None:
            peer.sendall(patches.data.cast("B"))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(settings: Settings, media: Media) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    try:
        made = settings(media)
    except InvalidRequest as e:
        kind = "ContextTooLong" if isinstance(e, ContextTooLong) else "InvalidRequest"
        return {"error": kind, "message": e.message, "param": e.param, "code": e.code}, None
    head = {"grid": made.grid_thw, "hash": made.media_hash.hex(), "num_tokens": made.num_tokens}
    return head, made.patches


def _receive(peer: socket.socket, num_bytes: int) -> bytearray:
    content = bytearray(num_bytes)
    _receive_into(peer, memoryview(content))
    return content


def _receive_into(peer: socket.socket, room: memoryview) -> None:
    while room:
        num_bytes = peer.recv_into(room)
        if not num_bytes:
            raise EOFError
        room = room[num_bytes:]


def main() -> None:
    """Take the limits, then serve; files may not be written, and no picture lands in a core dump."""
    limits = {resource.RLIMIT_AS: int(sys.argv[1]), resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    with socket.socket(fileno=0) as peer:
        serve(peer)


if __name__ == "__main__":
    main()
