"""The server's rounds make the very prompts that a client makes which runs the tools itself, as `eval` does.

A model that was trained on the one must not notice the other. Nothing is faked here but the model's words.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.cli.eval_run import Examiner
from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.observe.metrics import InMemoryMetrics
from ernie_cluster.request import FinishReason, GenerationRequest, TokenEvent
from ernie_cluster.skills.catalog import draw
from ernie_cluster.skills.sample import Sample
from ernie_cluster.skills.tools import CALCULATOR, WEATHER, ZOOM
from tests.fakes import FakeBackend
from tests.unit.api.rounds import call

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]


class Speaker(FakeBackend):
    """Calls the sample's tool, and answers when it has the result; in the tokens of a real tokenizer."""

    def __init__(self, processor: ChatProcessor, sample: Sample) -> None:
        super().__init__()
        assert sample.tool_call is not None
        self._processor = processor
        self._prefix = f"{sample.reasoning}\n</think>\n\n" if sample.enable_thinking else ""
        self._call = call(sample.tool_call.name, dict(sample.tool_call.arguments))
        self._answer = sample.answer

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
        text = self._prefix + (self._answer if self.requests else self._call)
        self.requests.append(request)
        ids = self._processor.tokenizer.encode(text, allow_special=False)
        yield [TokenEvent(request.request_id, 0, (*ids, request.eos_token_ids[0]), FinishReason.STOP)]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ChatProcessor:
    folder: Path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return ChatProcessor.from_folder(folder, served_name="tiny", max_model_len=100_000)


def samples() -> list[Sample]:
    """One of each way to need a tool: a region, typed and drawn sums; with and without thinking."""
    drawn = [draw(skill, seed) for skill in ("zoom", "tool") for seed in range(40)]
    with_ours = [s for s in drawn if s.tool_call is not None and s.tool_call.name != "get_weather"]
    kinds = {(s.skill, bool(s.pictures), s.enable_thinking): s for s in with_ours}
    return list(kinds.values())


def as_ours(sample: Sample) -> list[dict[str, Any]]:
    """The tools on offer, ours by name."""
    names = {tool["function"]["name"]: {"type": tool["function"]["name"]} for tool in (CALCULATOR, ZOOM)}
    return [names.get(tool["function"]["name"], dict(WEATHER)) for tool in sample.tools]


@pytest.mark.parametrize("sample", samples(), ids=lambda s: f"{s.skill}-{len(s.pictures)}-{s.enable_thinking}")
async def test_prompts_are_those_of_eval(processor: ChatProcessor, sample: Sample) -> None:
    theirs, ours = Speaker(processor, sample), Speaker(processor, sample)
    clients = [
        httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(backend, {"tiny": processor}, ApiLimits(), InMemoryMetrics())),
            base_url="http://test",
        )
        for backend in (theirs, ours)
    ]
    result = await Examiner(clients[0], "tiny").examine(sample, (sample.skill, "en", 0))
    assert (result.error, result.is_right) == ("", True)
    body = {
        "model": "tiny",
        "messages": sample.wire_messages(),
        "tools": as_ours(sample),
        "temperature": 0,
        "max_tokens": 4096,
        "chat_template_kwargs": {"enable_thinking": sample.enable_thinking},
    }
    response = await clients[1].post("/v1/chat/completions", json=body)
    for client in clients:
        await client.aclose()
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == sample.answer
    assert len(theirs.requests) == len(ours.requests) == 2
    for their, our in zip(theirs.requests, ours.requests, strict=True):
        assert our.prompt_token_ids.tolist() == their.prompt_token_ids.tolist()
        assert [m.media_hash for m in our.media] == [m.media_hash for m in their.media]
        assert our.positions.tolist() == their.positions.tolist()
    assert len(ours.requests[1].media) == len(sample.pictures) + (sample.skill == "zoom")
