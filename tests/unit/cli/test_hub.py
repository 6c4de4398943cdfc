"""Where a model's files come from, with a hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ernie_cluster.cli.hub import cached_folder, local_folder, with_local_folders
from ernie_cluster.config.presets import pocket, tiny
from ernie_cluster.errors import CheckpointError

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: repository `owner/model`, with one revision more than main."""

    files: ClassVar[dict[str, bytes]] = {
        "config.json": b"{}", "model.safetensors": b"weights", "chat_template.jinja": b"x", "README.md": b"much text",
        "original/model.bin": b"the same once more",
    }  # fmt: skip
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Stay quiet."""

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if "/owner/model/" not in path:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        rest = path.partition("/owner/model/")[2]
        verb, _, name = rest.partition("/")
        if verb == "revision":
            if name not in COMMITS:
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self._json({"id": "owner/model", "sha": COMMITS[name], "siblings": []})
        commit = name.partition("/")[0]
        if verb == "tree":
            contents = {p: self._content(p, commit) for p in self.files}
            entries = [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in contents.items()]
            return self._json(entries)
        content = self._content(name.partition("/")[2], commit)
        return self._send(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit})

    def _content(self, path: str, commit: str) -> bytes:
        """Each revision's files end with its letter."""
        return self.files[path] + commit[:1].encode()

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """The library asks this server, and caches in a folder of the test."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    Hub.asked.clear()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def stop(server: ThreadingHTTPServer) -> None:
    """Nobody listens any more."""
    server.shutdown()
    server.server_close()


def fetch(path: str) -> Path:
    return Path(local_folder(path, lambda text: None))


def test_a_repository_is_fetched_without_what_nobody_reads(hub: ThreadingHTTPServer) -> None:
    said: list[str] = []
    folder = Path(local_folder("owner/model", said.append))
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "chat_template.jinja"}
    assert (folder / "model.safetensors").read_bytes() == b"weightsa"
    assert len(said) == 1
    assert "owner/model" in said[0]


def test_what_is_in_the_cache_is_found_without_asking(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert cached_folder("owner/model") == "owner/model"
    assert cached_folder(str(tmp_path)) == str(tmp_path)
    assert Hub.asked == []
    folder = fetch("owner/model")
    Hub.asked.clear()
    assert cached_folder("owner/model") == str(folder)
    assert Hub.asked == []


def test_a_revision_is_another_folder(hub: ThreadingHTTPServer) -> None:
    assert (fetch("owner/model@v2") / "config.json").read_bytes() == b"{}b"
    assert fetch("owner/model@v2") != fetch("owner/model")


def test_what_is_in_the_cache_needs_no_hub(hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("owner/model")
    stop(hub)
    assert fetch("owner/model") == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch("owner/model") == folder


def test_offline_says_what_to_do(hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        fetch("owner/model@v2")
    said = str(caught.value)
    assert said.startswith("owner/model@v2: no such folder, and not all of it is in the cache")
    assert "HF_HUB_OFFLINE is set" in said
    assert "`hf download owner/model --revision v2`" in said
    assert Hub.asked == []


def test_a_hub_out_of_reach_says_the_same(hub: ThreadingHTTPServer) -> None:
    stop(hub)
    with pytest.raises(CheckpointError, match="hub cannot be reached; `hf download owner/model`"):
        fetch("owner/model")


def test_a_repository_that_is_not_there(hub: ThreadingHTTPServer) -> None:
    with pytest.raises(
        CheckpointError, match="no such folder, and the Hugging Face hub shows no repository models/mine"
    ):
        fetch("models/mine")


def test_a_revision_that_is_not_there(hub: ThreadingHTTPServer) -> None:
    with pytest.raises(CheckpointError, match="owner/model of the Hugging Face hub has no revision 'v9'"):
        fetch("owner/model@v9")


def test_what_else_goes_wrong_is_told_in_one_line(hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError("no space left\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(CheckpointError, match="did not give it: no space left; try again"):
        fetch("owner/model")


def test_a_folder_wins_over_a_repository(
    hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("owner/model", pytest.fail) == "owner/model"
    assert Hub.asked == []


@pytest.mark.parametrize(
    "path", ["/models/mine", "./models/mine", "~/mine", "mine", "a/b/c", "owner/", "../mine", "a/b@"]
)
def test_paths_of_folders_are_never_asked_for(path: str) -> None:
    assert local_folder(path, pytest.fail) == path


def test_each_model_of_a_configuration_gets_its_folder(hub: ThreadingHTTPServer) -> None:
    config = tiny("owner/model")
    local = with_local_folders(config, lambda text: None)
    assert Path(local.models[0].path).is_dir()
    assert local.models[0].pools == config.models[0].pools
    assert with_local_folders(pocket(), pytest.fail) == pocket()
