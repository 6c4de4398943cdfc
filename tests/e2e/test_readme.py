"""The requests that the README shows, asked of a running server as they stand there, but for its ports."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ernie_cluster.cli.local import is_packaged
from tests.e2e.application import Application, picture_url
from tests.unit.docs.pages import ROOT, Block, Page
from tests.unit.docs.shell import Command, commands_of

README = Page(ROOT / "README.md")
REQUESTS = [c for b in README.blocks if b.language == "sh" for c in commands_of(b) if c.program == "curl"]

pytestmark = pytest.mark.skipif(not is_packaged(), reason="the packaged model is not there")


def here(text: str, app: Application) -> str:
    return text.replace("8000", str(app.config.api.port)).replace("9000", str(app.config.api.grpc_port))


@pytest.mark.parametrize("block", [b for b in README.blocks if b.language == "python"], ids=str)
def test_python(
    block: Block,
    app: Application,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "photo.png").write_bytes(base64.b64decode(picture_url().partition(",")[2]))
    monkeypatch.chdir(tmp_path)
    exec(compile(here(block.text, app), str(block), "exec"), {})
    assert capsys.readouterr().out.strip(), "the model said nothing"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("command", REQUESTS, ids=str)
def test_curl(command: Command, app: Application) -> None:
    words = [here(word, app) for word in command.words]
    done = subprocess.run([*words, "--fail", "--max-time", "60"], capture_output=True, text=True, timeout=70)
    assert done.returncode == 0, done.stderr
    if "/metrics" not in words[-1]:
        assert json.loads(done.stdout)
