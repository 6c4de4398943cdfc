"""The terminal client against a made-up server."""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ernie_cluster.cli import chat
from ernie_cluster.errors import ErnieClusterError

Handler = Callable[[dict[str, Any]], httpx.Response]


def sse(*events: dict[str, Any] | str) -> httpx.Response:
    lines = [e if isinstance(e, str) else json.dumps(e) for e in events]
    return httpx.Response(200, text="".join(f"data: {line}\n\n" for line in lines))


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


class Fake:
    """A server that answers chats by a function, and remembers what it was asked."""

    def __init__(self, answer: Handler) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self._answer = answer

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.keys.add(request.headers.get("authorization"))
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        assert request.url.path == "/v1/chat/completions"
        self.bodies.append(json.loads(request.content))
        return self._answer(self.bodies[-1])

    def run(self, **options: Any) -> int:
        return chat.run("http://test/v1", transport=httpx.MockTransport(self), **options)


def hello(_: dict[str, Any]) -> httpx.Response:
    return sse(piece("Hel"), piece("lo"), {"choices": []}, "[DONE]")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    server = Fake(hello)
    assert server.run(prompt="hi", once=True, system="be kind", thinking=False, max_tokens=9) == 0
    assert capsys.readouterr().out == "Hello\n"
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
            "max_tokens": 9,
            "stream": True,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ]


def test_turns_pictures_and_commands(typed: Callable[[str], None], tmp_path: Path) -> None:
    picture = tmp_path / "a cat.png"
    picture.write_bytes(b"pixels")
    server = Fake(hello)
    typed(f"one\n/image {picture}\ntwo\n/what\n\n/new\nthree\n/quit\nnever\n")
    assert server.run() == 0
    first, second, third = (body["messages"] for body in server.bodies)
    assert first == [{"role": "user", "content": "one"}]
    assert second[:2] == [*first, {"role": "assistant", "content": "Hello"}]
    url = f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"
    assert second[2]["content"] == [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "two"}]
    assert third == [{"role": "user", "content": "three"}]


def test_reasoning_and_calls_are_told_apart_and_not_sent_back(
    typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": index, "function": function}]}}]}

    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "wh"}, {"reasoning_content": "y"}]
    events: list[dict[str, Any] | str] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    events += [piece("Hel"), piece("lo"), call(0, name="f", arguments=""), call(0, arguments="{}"), call(1, name="g")]
    server = Fake(lambda _: sse(*events, "[DONE]"))
    typed("again\n")
    assert server.run(prompt="x") == 0
    assert "thinking: why\nHello\ncall 1: f {}\ncall 2: g \n" in capsys.readouterr().out
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "Hello"}


def test_videos(typed: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "dance.gif").write_bytes(b"moves")
    frames = tmp_path / "frames"
    frames.mkdir()
    for name in ("2.jpg", "10.txt", "1.JPEG"):
        (frames / name).write_bytes(name.encode())
    server = Fake(hello)
    typed(f"/video {frames}\ntwo\n")
    assert server.run(videos=[str(tmp_path / "dance.gif")], prompt="one") == 0
    urls = [body["messages"][-1]["content"][0]["video_url"]["url"] for body in server.bodies]
    encoded = [base64.b64encode(data).decode() for data in (b"moves", b"1.JPEG", b"2.jpg")]
    assert urls == [f"data:image/gif;base64,{encoded[0]}", f"data:video/jpeg;base64,{encoded[1]},{encoded[2]}"]


@pytest.mark.parametrize(("name", "kind"), [("a.MP4", "video/mp4"), ("b.m4v", "video/mp4"), ("c.webm", "video/webm")])
def test_video_files(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"container")
    server = Fake(hello)
    assert server.run(videos=[str(tmp_path / name)], prompt="x", once=True) == 0
    url = f"data:{kind};base64,{base64.b64encode(b'container').decode()}"
    assert server.bodies[0]["messages"][-1]["content"][0] == {"type": "video_url", "video_url": {"url": url}}


@pytest.mark.parametrize("name", ["missing.gif", "film.avi", "empty"])
def test_an_unusable_video(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "film.avi").write_bytes(b"container")
    (tmp_path / "empty").mkdir()
    assert Fake(hello).run(videos=[str(tmp_path / name)], prompt="x", once=True) == 1
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "environment", "shown"),
    [
        (None, None, None),
        ("k1", None, "Bearer k1"),
        (None, "k2", "Bearer k2"),
        ("k1", "k2", "Bearer k1"),
        ("", "", None),
    ],
)
def test_a_key_goes_with_every_request(
    given: str | None, environment: str | None, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ERNIE_API_KEY", raising=False)
    if environment is not None:
        monkeypatch.setenv("ERNIE_API_KEY", environment)
    server = Fake(hello)
    assert server.run(prompt="x", once=True, api_key=given) == 0
    assert server.keys == {shown}


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines"])
def test_a_key_that_no_header_can_hold(key: str) -> None:
    with pytest.raises(ErnieClusterError, match="--api-key"):
        Fake(hello).run(prompt="x", once=True, api_key=key)


def test_the_end_of_input_ends_the_chat(typed: Callable[[str], None]) -> None:
    typed("")
    assert Fake(hello).run() == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(429, json={"error": {"message": "no room"}}), "no room (HTTP 429)"),
        (httpx.Response(502, text="bad gateway"), "bad gateway (HTTP 502)"),
        (sse(piece("Hel"), {"error": {"message": "replica lost"}}), "replica lost"),
        (sse(piece("Hel")), "broke off"),
    ],
)
def test_a_failed_turn_is_told_and_forgotten(
    answer: httpx.Response, message: str, capsys: pytest.CaptureFixture[str], typed: Callable[[str], None]
) -> None:
    server = Fake(lambda body: answer if len(server.bodies) == 1 else hello(body))
    typed("again\n")
    assert server.run(prompt="first") == 0
    assert message in capsys.readouterr().err
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "again"}]
    assert Fake(lambda _: answer).run(prompt="x", once=True) == 1


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    assert chat.run("http://test", transport=httpx.MockTransport(refuse)) == 1
    assert "http://test cannot be reached (connection refused)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing.png", "notes.txt"])
def test_an_unusable_picture(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert Fake(hello).run(images=[str(tmp_path / name)], prompt="x", once=True) == 1
    assert name in capsys.readouterr().err


def test_a_model_does_not_rule_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Fake(lambda _: sse(piece("a\x1b[2Jb\r\n\tc\u202e"), "[DONE]")).run(prompt="x", once=True)
    assert capsys.readouterr().out == "a[2Jb\n\tc\n"


def test_options_are_those_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    args = parser.parse_args(
        [
            "hi",
            "--image",
            "a.png",
            "--image",
            "b.png",
            "--video",
            "c",
            "--no-thinking",
            "--url",
            "http://127.0.0.1:9",
            "--api-key",
            "k",
        ]
    )
    assert (args.videos, args.api_key) == (["c"], "k")
    assert (args.prompt, args.images, args.thinking, args.model) == ("hi", ["a.png", "b.png"], False, None)
    assert chat.main(args) == 1  # nobody listens on that port
    assert "cannot be reached" in capsys.readouterr().err
