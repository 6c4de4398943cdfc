"""A connection between two hosts that both ends have proved themselves on: TCP, frames, and a token that never travels.

The address holds the receiver's token and reaches senders by the cluster's own, authenticated way. Each end shows that
it knows the token by a keyed hash over fresh numbers of both. Like Ray's own connections it is not encrypted.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from dataclasses import dataclass

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport import wire
from ernie_cluster.transport.base import HANDSHAKE_TIMEOUT_S, Message
from ernie_cluster.transport.keepalive import watch
from ernie_cluster.transport.wire import Kind


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a sender knows after the handshake; the socket is the caller's."""

    sock: socket.socket
    welcome: Message
    """What the receiver told."""
    salt: int
    """Another one for each connection, the same at both ends; 60 bits."""


class Door:
    """The receiver's side of one handshake.

    Args:
        token: of the address.
    """

    def __init__(self, token: str) -> None:
        self._token = token
        self._nonce = secrets.token_hex(16)

    def challenge(self) -> bytes:
        """The first frame."""
        return wire.encode(Kind.CHALLENGE, wire.encode_json({"version": wire.VERSION, "nonce": self._nonce}))

    def admit(self, kind: int, body: bytes, welcome: Message) -> bytes:
        """The answer to a sender's first frame; TransferFailed unless it knows the token and our version."""
        hello = wire.decode_json(body) if kind == Kind.HELLO else {}
        nonce, shown = str(hello.get("nonce")), str(hello.get("proof")).encode(errors="replace")
        if not hmac.compare_digest(shown, _proof(self._token, "sender", self._nonce, nonce).encode()):
            raise TransferFailed("wrong token")
        if hello.get("version") != wire.VERSION:
            raise TransferFailed(f"sender speaks version {hello.get('version')}, this receiver {wire.VERSION}")
        proof = _proof(self._token, "receiver", self._nonce, nonce)
        return wire.encode(Kind.WELCOME, wire.encode_json({**welcome, "proof": proof}))

    @property
    def salt(self) -> int:
        """See `Greeting`."""
        return _salt(self._nonce)


def connect(address: str, peer: str, transport: str) -> Greeting:
    """The sender's side.

    Args:
        address: gpu:<host>:<port>:<token>.
        peer: what the receiver's sink knows this sender by.
        transport: the way that bytes are to take.

    Raises:
        ReplicaLost: nobody listens there, or not in time.
        TransferFailed: the receiver refuses this sender, or is not what it claims to be.
    """
    host, port, token = parse_address(address)
    deadline_s = time.monotonic() + HANDSHAKE_TIMEOUT_S
    try:
        sock = socket.create_connection((host, port), HANDSHAKE_TIMEOUT_S)
    except OSError as e:
        raise ReplicaLost(f"{host}:{port} cannot be reached: {e}; its process has ended or stands still") from e
    try:
        watch(sock)
        challenge = wire.decode_json(_read_frame(sock, Kind.CHALLENGE, deadline_s))
        theirs, ours = str(challenge.get("nonce")), secrets.token_hex(16)
        hello: Message = {
            "version": wire.VERSION,
            "peer": peer,
            "transport": transport,
            "nonce": ours,
            "proof": _proof(token, "sender", theirs, ours),
        }
        sock.sendall(wire.encode(Kind.HELLO, wire.encode_json(hello)))
        welcome = wire.decode_json(_read_frame(sock, Kind.WELCOME, deadline_s))
        shown = str(welcome.get("proof")).encode(errors="replace")
        if not hmac.compare_digest(shown, _proof(token, "receiver", theirs, ours).encode()):
            raise TransferFailed(f"{host}:{port} does not know its own token; another process listens there")
        return Greeting(sock, welcome, _salt(theirs))
    except BaseException as e:
        sock.close()
        if isinstance(e, OSError):
            raise ReplicaLost(f"{host}:{port} does not answer: {e}; its process has ended or stands still") from e
        raise


def parse_address(address: str) -> tuple[str, int, str]:
    """Host, port and token; TransferFailed when it is no such address."""
    scheme, _, rest = address.partition(":")
    host, port, token = [*rest.rsplit(":", 2), "", ""][:3]
    if scheme != "gpu" or not (host and port.isdecimal() and token):
        raise TransferFailed("this is not the address of a GPU receiver, gpu:<host>:<port>:<token>")
    return host, int(port), token


def _read_frame(sock: socket.socket, wanted: Kind, deadline_s: float) -> bytes:
    """Body of the next frame; the peer sends nothing behind it before it is answered."""
    reader = wire.FrameReader()
    while True:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"no answer within {HANDSHAKE_TIMEOUT_S} s")
        sock.settimeout(left_s)
        data = sock.recv(1 << 16)
        if not data:
            raise TransferFailed(
                "the receiver refused the handshake: it is closing, restarted with a new token, or of another version; "
                "ask the replica for its address again"
            )
        for kind, body in reader.feed(data):
            if kind != wanted:
                raise TransferFailed(f"frame of kind {kind} instead of {wanted.name}; do both ends have one version?")
            return body


def _proof(token: str, side: str, receivers_nonce: str, senders_nonce: str) -> str:
    text = f"{side}/{receivers_nonce}/{senders_nonce}"
    return hmac.new(token.encode(), text.encode(errors="replace"), "sha256").hexdigest()


def _salt(nonce: str) -> int:
    try:
        return int(nonce[:15], 16)
    except ValueError:
        raise TransferFailed("the receiver's nonce is no number; do both ends have one version?") from None
