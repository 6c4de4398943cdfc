"""gRPC behind a certificate: who trusts whom, what is refused at the start, and what happens when it is renewed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from ernie_cluster.api.tls import Certificate
from ernie_cluster.client import Client
from ernie_cluster.config.api import TlsConfig
from ernie_cluster.errors import ConfigError, ReplicaError
from tests.certificates import DAY, Authority
from tests.unit.api.grpc_face import Face, face

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("lasting_loop"), pytest.mark.timeout(180)]


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def models(f: Face, **trust: Any) -> list[str]:
    """What a new client gets to see; raises as it does."""

    def ask() -> list[str]:
        with Client(f.target, **trust) as client:
            return [model.name for model in client.models()]

    return await asyncio.to_thread(ask)


async def test_who_trusts_the_ca_is_served_and_nobody_else(ca: Authority, tmp_path: Path) -> None:
    credentials = Certificate(ca.issue()).credentials()
    other = Authority(tmp_path, "other")
    async with face(credentials=credentials) as f:
        assert await models(f, ca_file=ca.file) == ["tiny"]
        for trust in ({}, {"ca_file": other.file}, {"credentials": grpc.ssl_channel_credentials()}):
            with pytest.raises(ReplicaError):
                await models(f, **trust)


async def test_clients_show_certificates_where_they_must(ca: Authority, tmp_path: Path) -> None:
    server = replace(ca.issue(), client_ca=str(ca.file))
    ca.issue(stem="client", usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    files = (tmp_path / name for name in ("ca.pem", "client.key", "client.pem"))
    shown = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
    async with face(credentials=Certificate(server).credentials()) as f:
        assert await models(f, credentials=shown) == ["tiny"]
        with pytest.raises(ReplicaError):
            await models(f, ca_file=ca.file)


async def test_a_renewed_certificate_counts_and_half_a_pair_does_not(
    ca: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    credentials, key_file = Certificate(ca.issue()).credentials(), tmp_path / "server.key"
    async with face(credentials=credentials) as f:
        new_ca = Authority(tmp_path, "new")
        old_key = key_file.read_bytes()
        new_ca.issue()
        new_key = key_file.read_bytes()
        key_file.write_bytes(old_key)
        assert await models(f, ca_file=ca.file) == ["tiny"]
        assert "not renewed" in caplog.text
        key_file.write_bytes(new_key)
        assert await models(f, ca_file=new_ca.file) == ["tiny"]
        with pytest.raises(ReplicaError):
            await models(f, ca_file=ca.file)
        key_file.unlink()
        assert await models(f, ca_file=new_ca.file) == ["tiny"]


def mismatched(ca: Authority) -> TlsConfig:
    return replace(ca.issue(), key=ca.issue(stem="other").key)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda ca: replace(ca.issue(), certificate="/none.pem"), "certificate /none.pem cannot be read"),
        (lambda ca: replace(ca.issue(), key="/none.key"), "key /none.key cannot be read"),
        (lambda ca: replace(ca.issue(), client_ca="/none.pem"), "client_ca /none.pem cannot be read"),
        (lambda ca: replace(ca.issue(), certificate=ca.issue().key), "are no pair"),
        (mismatched, r"are no pair \(key values mismatch\)"),
        (lambda ca: ca.issue(password=b"secret"), "a key without password"),
        (lambda ca: ca.issue(end=-DAY / 2), "refused by clients: certificate has expired"),
        (lambda ca: ca.issue(start=DAY / 2), "certificate is not yet valid"),
        (lambda ca: ca.issue(usage=ExtendedKeyUsageOID.CLIENT_AUTH), "purpose"),
        (lambda ca: replace(ca.issue(), client_ca=ca.issue().key), "holds no certificates"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(
    make: Callable[[Authority], TlsConfig], words: str, ca: Authority
) -> None:
    files = make(ca)
    with pytest.raises(ConfigError, match=f"^grpc_tls: .*{words}"):
        Certificate(files)


def test_a_client_trusts_one_way(ca: Authority, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Client("localhost:1", ca_file=tmp_path / "none.pem")
    with pytest.raises(ConfigError, match="not both"):
        Client("localhost:1", ca_file=ca.file, credentials=grpc.ssl_channel_credentials())
