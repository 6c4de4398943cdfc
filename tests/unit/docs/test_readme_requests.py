"""The README's programs against the API over fakes, on loopback ports; tests/e2e asks a real model by the same text."""

from __future__ import annotations

import asyncio
import contextlib
import io
from pathlib import Path

import pytest

from tests.fakes import FakeProcessor
from tests.unit.api.client import Server
from tests.unit.api.grpc_face import face
from tests.unit.api.test_slow_clients import listening
from tests.unit.docs.pages import ROOT, Block, Page

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("lasting_loop"), pytest.mark.timeout(120)]

PROGRAMS = [block for block in Page(ROOT / "README.md").blocks if block.language == "python"]


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.png").write_bytes(b"picture")
    monkeypatch.chdir(tmp_path)


def test_there_is_one_for_each_door() -> None:
    assert ["grpc" if "9000" in block.text else "http" for block in PROGRAMS] == ["http", "grpc"]


async def printed(block: Block, port: int) -> str:
    """What a program prints, in a thread beside the server's loop."""
    program = compile(block.text.replace("8000", str(port)).replace("9000", str(port)), str(block), "exec")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        await asyncio.to_thread(exec, program, {})
    return said.getvalue()


@pytest.mark.usefixtures("photo")
async def test_http() -> None:
    processor = FakeProcessor("ernie-pocket")
    async with listening(Server(processor=processor).app) as port:
        assert await printed(PROGRAMS[0], port) == "Hello"
    (call,) = processor.calls
    kinds = [part["type"] for part in call["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]


@pytest.mark.usefixtures("photo")
async def test_grpc() -> None:
    processor = FakeProcessor("ernie-pocket")
    async with face(processor=processor) as f:
        assert await printed(PROGRAMS[1], f.server.port) == "Hello"
    (call,) = processor.calls
    assert len(call["messages"][0]["content"]) == 2
