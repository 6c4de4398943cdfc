"""What a server of ours proves its identity with: PEM files, checked at the start and read again when they are renewed."""

from __future__ import annotations

import logging
import ssl
from itertools import cycle
from pathlib import Path
from typing import Any

import grpc

from ernie_cluster.config.api import TlsConfig
from ernie_cluster.errors import ConfigError

_log = logging.getLogger(__name__)

_MAX_STEPS = 10
"""A handshake within one process takes four."""


class Certificate:
    """The server's certificate and its key, as fresh as the files.

    A pair that cannot be used, such as a half renewed one, leaves the one before in force and an error in the log.

    Raises:
        ConfigError: a file cannot be read; certificate and key do not belong together; the certificate is out of date.
    """

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._seen = _read(tls)
        check(tls)

    def credentials(self) -> Any:
        """For a gRPC server, which asks for news before each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(*self._seen), self._news, require_client_authentication=self._tls.client_ca is not None
        )

    def _news(self) -> Any:
        """What is to be used from now on; None when nothing has changed. Called by gRPC's own threads."""
        try:
            files = _read(self._tls)
            if files == self._seen:
                return None
            self._seen = files
            check(self._tls)
        except ConfigError as e:
            _log.error("the certificate is not renewed: %s", e)
            return None
        return _configuration(*files)


def check(tls: TlsConfig) -> None:
    """Shake hands with a client that trusts this very certificate; raises ConfigError when that fails."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(tls.certificate, tls.key, password=lambda: "")  # else OpenSSL asks the terminal
    except (OSError, ValueError) as e:  # SSLError is an OSError
        raise ConfigError(
            f"grpc_tls: certificate {tls.certificate} and key {tls.key} are no pair ({_reason(e)}); give PEM files that "
            "belong together, and a key without password"
        ) from None
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # by which names it is known, only clients can tell
    client.load_verify_locations(tls.certificate)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its CA need not be known here
    try:
        _shake_hands(server, client)
    except ssl.SSLError as e:
        raise ConfigError(f"grpc_tls: certificate {tls.certificate} is refused by clients: {_reason(e)}") from None
    if tls.client_ca is not None:
        try:
            server.load_verify_locations(tls.client_ca)
        except OSError as e:
            raise ConfigError(f"grpc_tls: client_ca {tls.client_ca} holds no certificates ({_reason(e)})") from None


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """In memory; raises SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for side, _ in zip(cycle(sides), range(_MAX_STEPS), strict=False):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def _read(tls: TlsConfig) -> tuple[bytes, bytes, bytes | None]:
    """Certificate, key and clients' CAs."""
    ca = None if tls.client_ca is None else _file("client_ca", tls.client_ca)
    return _file("certificate", tls.certificate), _file("key", tls.key), ca


def _file(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"grpc_tls: {name} {path} cannot be read: {e.strerror}") from None


def _configuration(certificate: bytes, key: bytes, client_ca: bytes | None) -> Any:
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=client_ca)


def _reason(error: Exception) -> str:
    """OpenSSL's own words, in small letters."""
    words = getattr(error, "verify_message", "") or getattr(error, "reason", None) or getattr(error, "strerror", None)
    return str(words or error).replace("_", " ").lower()
