"""What a user gets: through the official client, as a stream and in one piece, from all arrangements of pools."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.application import Application, chat_body, picture_url

QUESTION = "What is in this picture?"


@pytest.fixture
def client(app: Application) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", timeout=60, max_retries=0)


def messages(picture: int) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": picture_url(picture)}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def test_official_client_streams_an_answer_about_a_picture(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": messages(1), "max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    usage = chunks[-1].usage
    whole = client.chat.completions.create(**asked)
    assert whole.usage is not None
    assert usage is not None
    assert streamed == whole.choices[0].message.content != ""
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    assert len(chunks) > 5, "the answer was not streamed"
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 20)
    assert usage.total_tokens == usage.prompt_tokens + 20


def test_usage_counts_the_picture_and_what_the_second_ask_found_in_the_cache(app: Application) -> None:
    text_only = app.ask("tiny", QUESTION)["usage"]
    first = app.ask("tiny", QUESTION, picture=2)["usage"]
    second = app.ask("tiny", QUESTION, picture=2)["usage"]
    assert first["prompt_tokens"] >= text_only["prompt_tokens"] + 12, "112 x 84 pixels are 4 x 3 tokens"
    assert first["prompt_tokens"] == second["prompt_tokens"]
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < second["prompt_tokens"]
    assert cached % 16 == 0, "whole blocks"


def test_timeline_has_every_stage_with_its_bytes(app: Application) -> None:
    timeline = app.ask("tiny", QUESTION, picture=3, include_timeline=True)["timeline"]
    stages = {span["name"]: span for span in timeline}
    assert {"preprocess", "route", "encode", "embeddings", "prefill", "transfer", "decode"} <= stages.keys()
    assert stages["embeddings"]["bytes"] > 0
    assert stages["transfer"]["bytes"] > 0
    assert "decode tiny/decode/" in stages["route"]["why"]
    assert [s["start_s"] for s in timeline] == sorted(s["start_s"] for s in timeline)
    assert stages["preprocess"]["start_s"] <= stages["prefill"]["start_s"] <= stages["decode"]["start_s"]


@pytest.mark.parametrize("picture", [None, 4])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "seed": 11}, {"temperature": 0.7, "top_p": 0.8, "seed": 2, "n": 2}]
)
def test_hand_over_changes_no_token(app: Application, picture: int | None, sampling: dict[str, Any]) -> None:
    answers = [app.ask(m, "Tell me more.", picture=picture, max_tokens=40, **sampling) for m in ("tiny", "mixed")]
    texts = [[c["message"]["content"] for c in answer["choices"]] for answer in answers]
    assert texts[0] == texts[1]
    assert all(texts[0])
    assert answers[0]["usage"]["completion_tokens"] == answers[1]["usage"]["completion_tokens"]


@pytest.mark.parametrize("picture", [None, 5])
def test_hand_over_of_a_video_changes_no_token(app: Application, picture: int | None) -> None:
    answers = [
        app.ask(model, "What happens?", picture=picture, video=1, max_tokens=40, include_timeline=True)
        for model in ("tiny", "mixed")
    ]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1] != ""
    for answer in answers:
        encoded = [span["tokens"] for span in answer["timeline"] if span["name"] == "encode"]
        pairs_of_frames = 3 * (2 * 3)  # five frames of 84 x 56 pixels
        assert encoded == ([12] if picture is not None else []) + [pairs_of_frames]


def test_other_frames_are_another_video(app: Application) -> None:
    def cached_tokens(**wishes: object) -> int:
        body = chat_body("tiny", "What happens?", video=3)  # which no other test shows
        body["messages"][0]["content"][0]["video_url"] |= wishes
        cached: int = app.post(body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    assert cached_tokens() == 0
    assert cached_tokens(max_frames=4) == 0
    assert cached_tokens() > 0


@pytest.mark.parametrize("model", ["tiny", "mixed"])
def test_one_token_is_an_answer(app: Application, model: str) -> None:
    answer = app.ask(model, "One word.", max_tokens=1)
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "length"


def test_long_prompt_in_chunks_changes_no_token(app: Application) -> None:
    prompt = "All work and no play. " * 120  # more than the 512 tokens of one step
    texts = [app.text(model, prompt, max_tokens=12) for model in ("tiny", "mixed")]
    assert texts[0] == texts[1]


def test_operators_pages(app: Application) -> None:
    body = chat_body("tiny", "Hello")
    assert app.post(body).status_code == 200
    names = [model.name for model in app.config.models]
    assert [card["id"] for card in app.get("/v1/models").json()["data"]] == names
    assert app.get("/v1/models/mixed").json()["id"] == "mixed"
    assert app.get("/health").status_code == 200
    assert "playground" in app.get("/").text
    ready = app.get("/ready").json()
    assert ready["ready"]
    assert {m["model"] for m in ready["models"]} == set(names)
    metrics = app.get("/metrics").text
    assert 'ernie_request_total{model="tiny",outcome="success"}' in metrics
    assert "ernie_time_to_first_token_seconds_bucket" in metrics
    assert 'ernie_ready_replicas{model="tiny",role="decode"}' in metrics
    assert 'ernie_kv_blocks{model="mixed",replica="mixed/mixed/' in metrics
