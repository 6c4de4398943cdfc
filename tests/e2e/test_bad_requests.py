"""Every bad request gets OpenAI's error object with the right status and field, and harms nobody."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.e2e.application import Application, chat_body, video_url


def with_picture(data: bytes, mime: str = "image/png") -> dict[str, Any]:
    body = chat_body("tiny", "What is this?", picture=0)
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    body["messages"][0]["content"][0]["image_url"]["url"] = url
    return body


def with_video(url: str, **wishes: object) -> dict[str, Any]:
    body = chat_body("tiny", "What happens?", video=0)
    body["messages"][0]["content"][0]["video_url"] = {"url": url, **wishes}
    return body


def bomb() -> bytes:
    """16 million pixels in some kilobytes."""
    out = io.BytesIO()
    Image.new("1", (4000, 4000)).save(out, "PNG")
    return out.getvalue()


IMAGE = "messages[0].content[0].image_url.url"
VIDEO = "messages[0].content[0].video_url.url"
HELLO = chat_body("tiny", "Hello")
CASES: dict[str, tuple[Any, int, str | None]] = {
    "unknown model": (HELLO | {"model": "gpt-9"}, 404, "model"),
    "malformed JSON": (b'{"model": "tiny", "messages": [', 400, None),
    "not an object": (b"[1, 2]", 400, None),
    "wrong type": (HELLO | {"max_tokens": "many"}, 400, "max_tokens"),
    "messages of a wrong type": (HELLO | {"messages": "Hello"}, 400, "messages"),
    "no messages": (HELLO | {"messages": []}, 400, "messages"),
    "n below one": (HELLO | {"n": 0}, 400, "n"),
    "temperature below zero": (HELLO | {"temperature": -1}, 400, "temperature"),
    "not a picture": (with_picture(b"this is no picture"), 400, IMAGE),
    "not a picture by its type": (with_picture(b"%PDF-1.7", "application/pdf"), 400, IMAGE),
    "picture with too many bytes": (with_picture(bytes(1_100_000)), 400, IMAGE),
    "picture with too many pixels": (with_picture(bomb()), 400, IMAGE),
    "video in a container": (with_video("data:video/mp4;base64,AAAA"), 400, VIDEO),
    "half a video": (with_video(video_url()[: len(video_url()) // 8 * 4]), 400, VIDEO),
    "video of one frame": (with_video(video_url(num_frames=1)), 400, VIDEO),
    "more frames than the model sees": (with_video(video_url(), max_frames=999), 400, VIDEO[:-3] + "max_frames"),
    "video for a model without a vision pool": (chat_body("small", "?", video=0), 400, VIDEO),
    "picture for a model without a vision pool": (chat_body("small", "?", picture=0), 400, IMAGE),
    "prompt longer than the context": (chat_body("tiny", "word " * 6000), 400, "messages"),
    "answer longer than the context": (HELLO | {"max_tokens": 5000}, 400, "max_tokens"),
    "more than any replica holds": (chat_body("small", "Hello", max_tokens=1000), 400, "max_tokens"),
    "body too large": (HELLO | {"padding": "x" * (5 << 20)}, 413, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_request_is_told_what_is_wrong(app: Application, name: str) -> None:
    body, status, param = CASES[name]
    response = app.post(body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert app.get("/health").status_code == 200
    assert app.get("/ready").status_code == 200


def test_bad_streams_have_a_status_of_their_own(app: Application) -> None:
    response = app.post(chat_body("gpt-9", "Hello", stream=True))
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"


def test_good_requests_are_answered_between_bad_ones(app: Application) -> None:
    before = app.text("tiny", "Hello")
    for body, status, _ in CASES.values():
        assert app.post(body).status_code == status
    assert app.text("tiny", "Hello") == before


def test_wrong_paths_and_methods(app: Application) -> None:
    assert app.get("/v1/nothing").status_code == 404
    assert app.get("/v1/chat/completions").status_code == 405
