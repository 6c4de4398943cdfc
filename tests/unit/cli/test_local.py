"""When a server of our own is started for a chat, and when not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ernie_cluster.actors.environment import free_port
from ernie_cluster.cli import local
from ernie_cluster.cli.local import is_listening, server_or_pocket
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.presets import pocket_mixed


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done to serve; nothing is started, and nothing listens on the default port."""
    events: list[str] = []

    @contextmanager
    def serving(config: ClusterConfig, progress: object) -> Iterator[str]:
        events.append("start")
        assert config.models == pocket_mixed().models
        assert config.api.port != 8000
        try:
            yield f"http://127.0.0.1:{config.api.port}"
        finally:
            events.append("stop")

    monkeypatch.setattr(local, "serving", serving)
    monkeypatch.setattr(local, "DEFAULT_URL", f"http://127.0.0.1:{free_port()}")
    return events


@pytest.mark.parametrize(("url", "model"), [("http://a:1", None), ("http://a:1", "m"), (None, "m")])
def test_nothing_is_started_for_a_server_or_model_that_is_named(
    url: str | None, model: str | None, served: list[str]
) -> None:
    with server_or_pocket(url, model) as found:
        assert found == (url or local.DEFAULT_URL)
    assert served == []


def test_a_server_on_the_default_port_is_used(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(local, "DEFAULT_URL", url)
        with server_or_pocket(None, None) as found:
            assert found == url
    assert served == []


def test_else_pocket_is_served_as_long_as_the_chat_lasts(served: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def chat() -> None:
        with server_or_pocket(None, None) as found:
            assert found.startswith("http://127.0.0.1:")
            assert served == ["start"]
            raise KeyError

    with pytest.raises(KeyError):
        chat()
    assert served == ["start", "stop"]
    assert f"nothing listens on {local.DEFAULT_URL}" in capsys.readouterr().err


def test_listening() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert is_listening(url)
    assert not is_listening(url)
