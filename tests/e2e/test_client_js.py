"""The official JavaScript client and Vercel's AI SDK, under Node, with the packaged model. What they do is in `js/`."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from ernie_cluster.cli.local import is_packaged
from tests.e2e.application import Application
from tests.e2e.shown import as_json

pytestmark = [
    pytest.mark.skipif(not is_packaged(), reason="no pocket checkpoint in this tree"),
    pytest.mark.timeout(600),
]

FOLDER = Path(__file__).with_name("js")
LEAST_NODE = 20
INSTALL_S = 300
RUN_S = 240  # more than all limits of the tests in there together
MANIFESTS = ("package.json", "package-lock.json")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `js/` beside its packages, which stay in the user's cache."""
    if node_version() < LEAST_NODE or shutil.which("npm") is None:
        pytest.skip(f"needs npm and Node {LEAST_NODE} or newer")
    folder = tmp_path_factory.mktemp("js")
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("node_modules"), dirs_exist_ok=True)
    (folder / "node_modules").symlink_to(installed() / "node_modules")
    return folder


def node_version() -> int:
    """The first number of Node's version; 0 without Node."""
    if shutil.which("node") is None:
        return 0
    said = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    return int(said.removeprefix("v").partition(".")[0])


def installed() -> Path:
    """A folder with the packages of the lock file; skips the tests where no registry can be reached."""
    digest = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in MANIFESTS)).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ernie_cluster"
    cache = root / f"node-{digest[:16]}"
    if cache.exists():
        return cache
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        for name in MANIFESTS:
            shutil.copy(FOLDER / name, fresh)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm could not install the clients within {INSTALL_S} s")
        if done.returncode != 0:
            assert not re.search("EUSAGE|EINTEGRITY", done.stderr), done.stderr  # the lock file is wrong
            pytest.skip(f"npm cannot install the clients: {done.stderr[-300:]}")
        if not cache.exists():  # another run may have been quicker
            fresh.rename(cache)
    return cache


@pytest.mark.parametrize("name", ["openai.test.mjs", "ai_sdk.test.mjs"])
def test_client(app: Application, scripts: Path, name: str) -> None:
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", str(scripts / name)],
        env={**os.environ, "ERNIE_URL": app.url, "ERNIE_SHOWN": as_json()},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    report = done.stdout + done.stderr
    counts = {kind: int(count) for kind, count in re.findall(r"^# (pass|fail|skipped) (\d+)$", report, re.MULTILINE)}
    assert done.returncode == 0, report
    assert counts == {"pass": (scripts / name).read_text().count("\ntest("), "fail": 0, "skipped": 0}, report
