"""Text to token ids and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.api.tokens import detokenize, tokenize
from tests.fakes import EOS, FakeProcessor, bytes_of
from tests.unit.api.client import Server, chat_body

pytestmark = pytest.mark.timeout(120)

PROCESSOR = FakeProcessor()


def find(_: str) -> FakeProcessor:
    return PROCESSOR


@settings(max_examples=50)
@given(st.text(min_size=1, max_size=50))
def test_there_and_back(prompt: str) -> None:
    found = tokenize({"model": "tiny", "prompt": prompt}, find)
    assert found["count"] == len(found["tokens"]) == len(prompt.encode())
    assert detokenize({"model": "tiny", "tokens": found["tokens"]}, find) == {"prompt": prompt}


@pytest.mark.anyio
async def test_a_prompt() -> None:
    server = Server()
    body = (await server.post("/tokenize", {"model": "tiny", "prompt": "é!", "return_token_strs": True})).json()
    assert body == {"count": 3, "max_model_len": 512, "tokens": list(bytes_of("é!")), "token_strs": ["�", "�", "!"]}
    assert server.backend.requests == []


@pytest.mark.anyio
async def test_a_conversation_gives_the_prompt_that_chat_would_use() -> None:
    server, thinking = Server(), {"chat_template_kwargs": {"enable_thinking": True}}
    open_ended = (await server.post("/tokenize", chat_body(**thinking))).json()["tokens"]
    closed = (await server.post("/tokenize", chat_body(**thinking, add_generation_prompt=False))).json()["tokens"]
    await server.chat(**thinking)
    assert open_ended == server.backend.requests[0].prompt_token_ids.tolist()
    assert closed == list(bytes_of("<user>hi"))


@pytest.mark.anyio
async def test_control_tokens_have_a_text() -> None:
    response = await Server().post("/detokenize", {"model": "tiny", "tokens": [104, EOS]})
    assert response.json() == {"prompt": "h<eos>"}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("url", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": 1}, 400, "prompt"),
        ("/tokenize", {"prompt": "x" * 600}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"model": "none", "prompt": "x"}, 404, "model"),
        ("/detokenize", {"tokens": [1, EOS + 1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"model": "none", "tokens": []}, 404, "model"),
    ],
)
async def test_bad_requests_name_the_field(url: str, fields: dict[str, Any], status: int, param: str) -> None:
    response = await Server().post(url, {"model": "tiny"} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


@pytest.mark.anyio
async def test_they_are_no_part_of_a_models_traffic() -> None:
    server = Server()
    await server.post("/tokenize", {"model": "tiny", "prompt": "x"})
    text = server.metrics.render()
    text = text if isinstance(text, str) else text.decode()
    assert 'model="tiny"' not in text
    assert 'model="unknown"' in text


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("url", "part", "param"),
    [
        ("/tokenize", {"type": "image_url", "image_url": {"url": "https://a.test/b.png"}}, "messages[0].content[0].image_url.url"),
        ("/tokenize", {"type": "video_url", "video_url": {"url": "file:///b.mp4"}}, "messages[0].content[0].video_url.url"),
        (
            "/v1/messages/count_tokens",
            {"type": "image", "source": {"type": "url", "url": "https://a.test/b.png"}},
            "messages[0].content[0].source.url",
        ),
    ],
)  # fmt: skip
async def test_nothing_is_fetched_to_count_tokens(url: str, part: dict[str, Any], param: str) -> None:
    response = await Server().post(url, {"model": "tiny", "messages": [{"role": "user", "content": [part]}]})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"{param}: nothing is fetched only to count tokens")
