"""An answer whose replica is lost at any token goes on as if nothing had been: the same bytes at the API, with all that
can shape them. A real engine on the tiny model stands behind the API; the attempts at it are played.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

import httpx
import pytest

from ernie_cluster.actors.attempts import Attempts
from ernie_cluster.actors.cluster_backend import ClusterBackend
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.config.presets import PRESETS
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.errors import ReplicaLost
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.observe.metrics import InMemoryMetrics
from ernie_cluster.policy.retries import RetryBudget
from ernie_cluster.request import GenerationRequest, Span, TokenEvent
from tests.tiny import _wait_for_grammars, make_worker, tiny_folder

NUM_TOKENS = 12
CUTS: ContextVar[frozenset[int]] = ContextVar("CUTS")
"""Numbers of tokens after which each answer to the present client loses its replica."""

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": PERSON}}


class CutAttempts(Attempts):
    """Each is answered by the one engine until its replica is lost."""

    def __init__(self) -> None:
        self.worker, _ = make_worker(num_blocks=1024, max_batch_tokens=256, max_num_seqs=64)
        self.worker.engine.emit = self.worker._emit = self._take
        self._queues: dict[str, asyncio.Queue[TokenEvent]] = {}

    def _take(self, outcomes: list[Any]) -> None:
        for outcome in outcomes:
            assert isinstance(outcome, TokenEvent), outcome.error
            if outcome.request_id in self._queues:
                self._queues[outcome.request_id].put_nowait(outcome)

    async def generate(
        self, request: GenerationRequest, epoch: int, lost: set[str], spans: list[Span], accepted_s: float
    ) -> AsyncGenerator[list[TokenEvent], None]:
        first, key = len(request.output_token_ids), request.request_id
        end = min((cut for cut in CUTS.get() if cut > first), default=None)
        self._queues[key] = queue = asyncio.Queue()
        self.worker.open_prefill(request, 0, None)
        try:
            while True:
                await asyncio.sleep(0)  # all who are asked begin together
                if queue.empty():
                    assert self.worker.engine.step() or _wait_for_grammars(self.worker)
                    continue
                event = queue.get_nowait()
                yield [event]
                if event.finish_reason is not None:
                    return
                if event.index + 1 == end:
                    raise ReplicaLost(f"lost after {end} tokens")
        finally:
            del self._queues[key]
            self.worker.abort(key)
            while self.worker.engine.has_work() and key in self.worker.engine.sequences:
                self.worker.engine.step()


class CutBackend(ClusterBackend):
    """Its attempts are played."""

    def __init__(self) -> None:
        limits = RouterConfig(max_attempts=NUM_TOKENS + 1, retry_pause_s=0.0, retry_floor_per_s=1e6)
        self._config = dataclasses.replace(PRESETS["tiny"](tiny_folder()), router=limits)
        self._metrics, self._budget = InMemoryMetrics(), RetryBudget(limits)
        self._attempts = CutAttempts()

    @property
    def num_losses(self) -> float:
        assert isinstance(self._metrics, InMemoryMetrics)
        return self._metrics.value("ernie_request_retries_total", model="tiny", reason="ReplicaLost")


@functools.cache
def processor() -> ChatProcessor:
    return ChatProcessor.from_folder(tiny_folder(), served_name="tiny", max_model_len=512)


async def post(client: httpx.AsyncClient, body: dict[str, Any], cuts: frozenset[int]) -> list[Any]:
    """What a client makes of a streamed answer."""
    CUTS.set(cuts)
    response = await client.post("/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    choices: defaultdict[int, dict[str, Any]] = defaultdict(lambda: defaultdict(str))
    usage = None
    for event in map(json.loads, lines):
        assert "error" not in event, event
        usage = event.get("usage") or usage
        for given in event["choices"]:
            choice, delta = choices[given["index"]], given["delta"]
            for field in ("content", "reasoning_content"):
                choice[field] += delta.get(field) or ""
            for call in delta.get("tool_calls", ()):
                choice[f"call {call['index']}"] += json.dumps(call["function"].get("name", "")) + "|"
                choice[f"arguments {call['index']}"] += call["function"].get("arguments", "")
            choice["logprobs"] = [*(choice["logprobs"] or []), *((given.get("logprobs") or {}).get("content") or [])]
            choice["finish_reason"] = given["finish_reason"] or choice["finish_reason"]
    for choice in choices.values():
        choice.pop("call 0", None)  # how often a name is repeated is no part of the answer
    return [dict(sorted(choices.items())), usage]


VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "two answers, seeded": {"n": 2, "temperature": 1.2, "top_p": 0.95, "top_k": 50, "seed": 7},
    "min_p": {"temperature": 1.5, "min_p": 0.01, "seed": 8},
    "penalties": {"temperature": 0.9, "seed": 9, "presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    "logprobs": {"temperature": 1.0, "seed": 10, "logprobs": True, "top_logprobs": 3},
    "end tokens are free late": {"temperature": 2.0, "seed": 11, "ignore_eos": False, "min_tokens": 6,
                                 "logit_bias": {"2": 20}},
    "json": {"temperature": 2.0, "seed": 12, "ignore_eos": False,
             "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
    "a tool": {"temperature": 2.0, "seed": 13, "ignore_eos": False, "tools": [TOOL], "tool_choice": "required"},
    "thinking": {"temperature": 1.0, "seed": 14, "enable_thinking": True, "max_thinking_tokens": 5},
}  # fmt: skip


def body_of(variant: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Once upon a time there was a ship. " * 3}],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **variant,
    }


def played(body: dict[str, Any]) -> tuple[list[Any], dict[str, list[Any]]]:
    """The answer without a loss; and with one after each token, with some, and with one after every token."""
    cuts = {str(k): frozenset({k}) for k in range(1, NUM_TOKENS)}
    cuts |= {"three": frozenset({2, 3, 9}), "all": frozenset(range(NUM_TOKENS))}

    async def run() -> tuple[list[Any], dict[str, list[Any]]]:
        backend = CutBackend()
        app = create_app(backend, {"tiny": processor()}, ApiLimits(), InMemoryMetrics())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await post(client, body, frozenset())  # whose prompt all others find in the cache
            whole = await post(client, body, frozenset())
            tasks = [asyncio.create_task(post(client, body, cut)) for cut in cuts.values()]
            answers = dict(zip(cuts, await asyncio.gather(*tasks), strict=True))
        assert backend.num_losses > len(cuts)
        return whole, answers

    return asyncio.run(asyncio.wait_for(run(), 100))


def check_same(got: list[Any], whole: list[Any]) -> None:
    for choice, expected in zip(got[0].values(), whole[0].values(), strict=True):
        for key in expected.keys() | choice.keys():
            if key != "logprobs":
                assert choice[key] == expected[key], key
        for mine, theirs in zip(choice["logprobs"], expected["logprobs"], strict=True):
            assert (mine["token"], mine["bytes"]) == (theirs["token"], theirs["bytes"])
            assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
            assert [t["token"] for t in mine["top_logprobs"]] == [t["token"] for t in theirs["top_logprobs"]]
    assert got[1] == whole[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loss_at_any_token_changes_nothing(name: str) -> None:
    whole, cut = played(body_of(VARIANTS[name]))
    assert whole[1]["completion_tokens"] > 5, whole
    assert whole[1]["prompt_tokens_details"]["cached_tokens"] > 0
    for after, got in cut.items():
        try:
            check_same(got, whole)
        except AssertionError as e:
            raise AssertionError(f"lost after {after}: {e}\n{got}\n{whole}") from None


def test_a_stop_string_that_straddles_the_loss() -> None:
    """Every substring of the answer that tokens part in two."""
    body = body_of({"temperature": 0.9, "seed": 15})
    whole, _ = played(body)
    text = whole[0][0]["content"]
    stop = text[len(text) // 2 : len(text) // 2 + 6]
    assert len(stop) == 6
    stopped, cut = played(body | {"stop": [stop]})
    assert stopped[0][0]["content"] == text[: text.index(stop)]
    assert stopped[0][0]["finish_reason"] == "stop"
    for got in cut.values():
        check_same(got, stopped)
