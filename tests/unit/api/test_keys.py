"""Keys in headers, and a file of them that changes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path

import pytest

from ernie_cluster.api.keys import KeyRing, given_key, owner_of
from ernie_cluster.config.keys import ApiKey
from ernie_cluster.errors import ConfigError

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


def entry(name: str, key: str) -> ApiKey:
    return ApiKey(name, hashlib.sha256(key.encode()).hexdigest())


def write(path: Path, *names: str) -> None:
    """Keys called like their owners, in the place of the old file."""
    lines = [f"- {{name: {k.name}, sha256: {k.sha256}}}\n" for k in (entry(name, name) for name in names)]
    new = path.with_suffix(".new")
    new.write_text("".join(lines) or "[]", encoding="utf-8")
    new.replace(path)


class Ring:
    """A ring over a file, and a clock for it."""

    def __init__(self, path: Path) -> None:
        self.now_s = 0.0
        self.ring = KeyRing(path, lambda: self.now_s)

    async def names(self, after_s: float = 1.0) -> list[str]:
        self.now_s += after_s
        return [key.name for key in await self.ring.keys()]


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([], None),
        ([(b"authorization", b"Bearer k")], b"k"),
        ([(b"authorization", b"bearer   k ")], b"k"),
        ([(b"authorization", b"Bearer")], b""),
        ([(b"authorization", b"Basic k")], None),
        ([(b"authorization", b"k")], None),
        ([(b"x-api-key", b" k ")], b"k"),
        ([(b"x-api-key", b"x"), (b"authorization", b"Bearer k")], b"k"),
        ([(b"authorization", b"Basic b"), (b"x-api-key", b"x")], b"x"),
        ([(b"authorization", b"Bearer 1"), (b"authorization", b"Bearer 2")], b"1"),
        ([(b"authorization", "Bearer ключ\udc80".encode("utf-8", "surrogateescape"))], "ключ".encode() + b"\x80"),
    ],
)
def test_where_a_key_stands(headers: list[tuple[bytes, bytes]], key: bytes | None) -> None:
    assert given_key(headers) == key


def test_each_key_has_its_owner() -> None:
    keys = [entry("a", "key-a"), entry("b", "key-b")]
    assert owner_of(b"key-a", keys) is keys[0]
    assert owner_of(b"key-b", keys) is keys[1]
    for wrong in (b"", b"key-", b"key-a ", b"\xff", keys[0].sha256.encode()):
        assert owner_of(wrong, keys) is None
    assert owner_of(b"key-a", []) is None


async def test_a_new_file_counts_after_a_second(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(path, "alice")
    ring = Ring(path)
    write(path, "alice", "bob")
    assert await ring.names(after_s=0.5) == ["alice"]
    assert await ring.names(after_s=0.5) == ["alice", "bob"]
    write(path)
    assert await ring.names() == []


async def test_a_link_that_points_elsewhere_counts(tmp_path: Path) -> None:
    """As Kubernetes changes a mounted secret."""
    for name in ("alice", "carol"):  # of one length
        write(tmp_path / name, name)
        os.utime(tmp_path / name, (1, 1))
    link = tmp_path / "keys.yaml"
    link.symlink_to(tmp_path / "alice")
    ring = Ring(link)
    assert await ring.names() == ["alice"]
    link.unlink()
    link.symlink_to(tmp_path / "carol")
    assert await ring.names() == ["carol"]


async def test_a_broken_file_keeps_the_old_keys_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    write(path, "alice")
    ring = Ring(path)
    with caplog.at_level(logging.ERROR, "ernie_cluster"):
        path.write_text("- {s3cret", encoding="utf-8")
        for _ in range(3):
            assert await ring.names() == ["alice"]
        path.unlink()
        for _ in range(3):
            assert await ring.names() == ["alice"]
    assert [("YAML" in m, "cannot be read" in m) for m in caplog.messages] == [(True, False), (False, True)]
    assert "s3cret" not in caplog.text
    write(path, "bob")
    assert await ring.names() == ["bob"]


async def test_one_look_at_a_time_and_off_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.yaml"
    write(path, "alice")
    ring = Ring(path)
    looks: list[asyncio.Future[None]] = []

    async def to_thread(check: object) -> None:
        looks.append(asyncio.get_running_loop().create_future())
        await looks[-1]

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    first = asyncio.create_task(ring.names())
    await asyncio.sleep(0)
    assert await ring.names(after_s=5) == ["alice"]  # while the first look goes on
    assert len(looks) == 1
    looks[0].set_result(None)
    assert await first == ["alice"]


def test_no_start_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing(tmp_path / "none.yaml", lambda: 0.0)
