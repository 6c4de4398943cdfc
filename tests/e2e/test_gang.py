"""Replicas of several ranks: the same answers while experts move between them, and a gang that loses a rank is replaced whole."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import pytest
import ray

from ernie_cluster.actors.messages import NAMESPACE
from tests.e2e.application import Application, Streamed, chat_body, eventually, run

pytestmark = pytest.mark.slow  # five more processes beside the others

PROMPTS = [("Once upon a time", None, None), ("What is this?", 3, None), ("And this?", None, 2), ("ab " * 150, 4, None)]


@pytest.mark.parametrize(("text", "picture", "video"), PROMPTS)
def test_a_gang_answers_as_single_ranks_do(app: Application, text: str, picture: int | None, video: int | None) -> None:
    asked = {"picture": picture, "video": video, "max_tokens": 24}
    assert app.text("gang", text, **asked) == app.text("tiny", text, **asked)


def test_experts_have_moved_meanwhile(app: Application) -> None:
    app.text("gang", "Tell me of the sea", picture=3, max_tokens=48)

    def objection() -> str:
        lines = app.get("/metrics").text.splitlines()
        moves = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("ernie_expert_moves{")}
        moved = [name for name, count in moves.items() if 'model="gang"' in name and count]
        has_both = all(any(f'role="{role}"' in name for name in moved) for role in ("prefill", "decode"))
        return "" if has_both else f"not all have moved: {moves}"

    eventually(objection, 60)
    gang = [r for r in app.get("/debug/experts").json()["data"] if r["model"] == "gang"]
    assert sorted(r["role"] for r in gang) == ["decode", "decode", "prefill"]
    assert all(len(layer["table"]) == 2 for r in gang for layer in r["layers"])
    assert all(sum(layer["tokens"]) for r in gang if r["role"] == "prefill" for layer in r["layers"])


def test_both_decode_groups_answer_at_once(app: Application) -> None:
    wanted = app.text("tiny", "Tell me a story", max_tokens=64)
    lanes = app.replicas("gang", "decode")
    assert len(lanes) == 2

    async def play() -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:
            body = chat_body("gang", "Tell me a story", max_tokens=64)
            answers = await asyncio.gather(
                *(client.post(f"{app.url}/v1/chat/completions", json=body) for _ in range(6))
            )
            return [answer.json()["choices"][0]["message"]["content"] for answer in answers]

    assert run(play()) == [wanted] * 6


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_gang_that_loses_a_rank_is_replaced_whole(whole_app: Application, role: str) -> None:
    app, body = whole_app, chat_body("gang", "A long time ago", max_tokens=120)
    wanted = app.text("tiny", "A long time ago", max_tokens=120)
    before = app.replicas("gang", role)
    rank = ray.get_actor(f"{min(i.actor_name for i in before)}:1", NAMESPACE)

    async def play() -> Streamed:
        answer = Streamed()
        async with httpx.AsyncClient() as client:
            async for answer in app.stream(client, body):
                if answer.num_chunks == 5:
                    ray.kill(rank)
        return answer

    answer = run(play())
    assert (answer.error, answer.text, answer.finish_reason) == (None, wanted, "length")
    gone = {i.incarnation for i in before}
    eventually(
        lambda: "the old gang is there" if gone & {i.incarnation for i in app.replicas("gang", role)} else "", 60
    )
    eventually(app.objection_to_ready, 180)
    assert app.text("gang", "A long time ago", max_tokens=120) == wanted


@pytest.mark.parametrize(("role", "num_words"), [("prefill", 400), ("decode", 4)])
def test_a_gang_that_is_told_to_end_fails_nobody(whole_app: Application, role: str, num_words: int) -> None:
    """All its ranks at once, as on a machine that is taken away; none ends while another needs it."""
    app, text = whole_app, "ab " * num_words
    body, wanted = chat_body("gang", text, max_tokens=120), app.text("tiny", text, max_tokens=120)
    before, failures = app.replicas("gang", role), retries(app)
    first = min(i.actor_name for i in before)
    ranks = [ray.get_actor(name, NAMESPACE) for name in (first, f"{first}:1")]
    pids = ray.get([rank.__ray_call__.remote(lambda _: os.getpid()) for rank in ranks])

    async def play() -> Streamed:
        async with httpx.AsyncClient(timeout=180) as client:
            answer = asyncio.create_task(app.read(client, body))
            while not any((load := app.load(i)).num_prompts + load.num_answers for i in before):  # noqa: ASYNC110  Ray says so
                await asyncio.sleep(0)
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            return await answer

    answer = run(play())
    assert (answer.error, answer.text, answer.finish_reason) == (None, wanted, "length")
    assert retries(app) == failures, "it has failed, and not moved"
    gone = {i.incarnation for i in before}
    eventually(lambda: "it is there" if gone & {i.incarnation for i in app.replicas("gang", role)} else "", 60)
    eventually(app.objection_to_ready, 180)


def retries(app: Application) -> float:
    lines = app.get("/metrics").text.splitlines()
    return sum(float(x.split()[1]) for x in lines if x.startswith("ernie_request_retries_total{") and "gang" in x)
