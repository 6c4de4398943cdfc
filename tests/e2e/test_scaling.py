"""Roles, drains and sleep, live: whatever changes, every request is answered, and answered the same."""

from __future__ import annotations

import asyncio
import urllib.parse
from typing import Any

import httpx
import pytest
import ray

from tests.e2e.application import Application, Streamed, chat_body, eventually

pytestmark = pytest.mark.timeout(300)

ANSWERS = 12


def replicas(app: Application, model: str) -> dict[str, dict[str, Any]]:
    """As `/admin/status` shows them, by id."""
    return {r["replica"]: r for r in app.get("/admin/status").json()["replicas"] if r["model"] == model}


def whole(app: Application) -> dict[str, tuple[str, str]]:
    """(role, phase) of every replica that there is."""
    return {r["replica"]: (r["role"], r["phase"]) for r in app.get("/admin/status").json()["replicas"]}


def order(app: Application, replica: str, action: str, **body: Any) -> httpx.Response:
    name = urllib.parse.quote(replica, safe="")
    return httpx.post(f"{app.url}/admin/replicas/{name}/{action}", json=body, timeout=20)


def decisions(app: Application, model: str) -> list[str]:
    """Newest first."""
    return [d["action"] for d in app.get("/admin/decisions").json()["data"] if d["model"] == model]


def read_beside(
    app: Application, bodies: list[dict[str, Any]], *orders: tuple[str, str, dict[str, Any]]
) -> list[Streamed]:
    """Read streamed answers; orders are given when the first token of the first has come."""
    return asyncio.run(_read_beside(app, bodies, orders))


async def _read_beside(
    app: Application, bodies: list[dict[str, Any]], orders: tuple[tuple[str, str, dict[str, Any]], ...]
) -> list[Streamed]:
    has_begun = asyncio.Event()

    async def read(client: httpx.AsyncClient, body: dict[str, Any]) -> Streamed:
        answer = Streamed()
        async for answer in app.stream(client, body):  # noqa: B007
            has_begun.set()
        return answer

    async with httpx.AsyncClient() as client:
        reading = [asyncio.create_task(read(client, body)) for body in bodies]
        await has_begun.wait()
        for replica, action, body in orders:
            response = await asyncio.to_thread(order, app, replica, action, **body)
            assert response.status_code == 200, response.text
        return await asyncio.gather(*reading)


def test_a_replica_changes_its_role_and_back_under_load(whole_app: Application) -> None:
    bodies = [chat_body("tiny", f"change {i}", max_tokens=60, picture=i % 3) for i in range(ANSWERS)]
    calm = [whole_app.post(b).json()["choices"][0]["message"]["content"] for b in bodies]
    decode = min(i for i, r in replicas(whole_app, "tiny").items() if r["home"] == "decode")
    there = read_beside(whole_app, bodies, (decode, "role", {"role": "prefill"}))
    assert replicas(whole_app, "tiny")[decode]["role"] == "prefill"
    changed = read_beside(whole_app, bodies)
    back = read_beside(whole_app, bodies, (decode, "role", {"role": "decode"}))
    assert replicas(whole_app, "tiny")[decode]["role"] == "decode"
    for answers in (there, changed, back):
        assert [(a.text, a.finish_reason, a.error) for a in answers] == [(text, "length", None) for text in calm]
    assert decisions(whole_app, "tiny")[:2] == ["role", "role"]


def test_a_drained_replica_finishes_and_gets_nothing_new(whole_app: Application) -> None:
    decode = min(i for i, r in replicas(whole_app, "tiny").items() if r["home"] == "decode")
    bodies = [chat_body("tiny", f"drain {i}", max_tokens=60) for i in range(ANSWERS)]
    answers = read_beside(whole_app, bodies, (decode, "drain", {}))
    assert {(a.finish_reason, a.error) for a in answers} == {("length", None)}

    def objection() -> str:
        now = replicas(whole_app, "tiny")[decode]
        return "" if (now["phase"], now["num_running"]) == ("draining", 0) else str(now)

    eventually(objection, 60)
    info = next(i for i in whole_app.replicas("tiny") if i.gang == decode)
    before = whole_app.load(info).work.output_tokens
    read_beside(whole_app, [chat_body("tiny", f"drained {i}") for i in range(4)])
    assert whole_app.load(info).work.output_tokens == before
    assert order(whole_app, decode, "undrain").json()["phase"] == "ready"

    def surplus() -> str:  # the autoscaler had another one started in its place, where there was room
        there = [r for r in replicas(whole_app, "tiny").values() if r["home"] == "decode"]
        return "" if [r["phase"] for r in there] == ["ready"] * 2 else str(there)

    eventually(surplus, 120)


def test_the_last_of_a_role_stays_what_it_is(app: Application) -> None:
    prefill = next(i for i, r in replicas(app, "tiny").items() if r["home"] == "prefill")
    response = order(app, prefill, "role", role="decode")
    assert response.status_code == 409
    assert "the last that does prefill" in response.json()["error"]["message"]
    assert order(app, "tiny/prefill/nobody", "drain").status_code == 404


def test_a_router_that_is_killed_leaves_everybody_what_he_was(whole_app: Application) -> None:
    app, body = whole_app, chat_body("tiny", "who are you now?", max_tokens=40)
    calm = app.post(body).json()["choices"][0]["message"]["content"]

    def objection(expected: dict[str, tuple[str, str]]) -> str:
        response = app.get("/admin/status")
        return response.text if response.status_code != 200 or whole(app) != expected else ""

    eventually(lambda: "sleepy is awake" if replicas(app, "sleepy") else "", 120)
    decode = min(i for i, r in replicas(app, "tiny").items() if r["home"] == "decode")
    changed = whole(app) | {decode: ("prefill", "ready")}
    assert order(app, decode, "role", role="prefill").status_code == 200
    eventually(lambda: objection(changed), 10)
    ray.kill(app.router())
    assert app.post(body).json()["choices"][0]["message"]["content"] == calm
    eventually(lambda: objection(changed), 60)
    assert app.get("/ready").status_code == 200, "who sleeps is ready"
    assert order(app, decode, "role", role="decode").status_code == 200
    assert app.post(body).json()["choices"][0]["message"]["content"] == calm
    eventually(lambda: objection(changed | {decode: ("decode", "ready")}), 10)
    actions = {d["action"] for d in app.get("/admin/decisions").json()["data"]}
    assert actions <= {"role", "note"}, "nothing is started or stopped for it"


@pytest.mark.slow  # it takes its time to fall asleep
def test_a_model_that_nobody_asks_sleeps_and_wakes_for_whoever_asks(app: Application) -> None:
    def objection() -> str:
        found = replicas(app, "sleepy")
        return f"still there: {found}" if found else ""

    assert app.post(chat_body("sleepy", "good night"), timeout_s=120).status_code == 200  # it may sleep already
    eventually(objection, 120)
    assert decisions(app, "sleepy")[0] == "scale_to_zero"
    assert app.get("/ready").status_code == 200
    answer = app.post(chat_body("sleepy", "good morning"), timeout_s=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 16
    assert decisions(app, "sleepy")[0] in (
        "wake_up",
        "move_gpus",
    )  # free cores, or those of somebody who has some to spare
