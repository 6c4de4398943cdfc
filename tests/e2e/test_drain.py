"""Replicas leave while they work. Their streams go on elsewhere with the same text, and nothing has failed."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from urllib.parse import quote

import httpx
import pytest
import ray

from ernie_cluster.actors import launch
from ernie_cluster.actors.messages import ReplicaInfo
from tests.e2e.application import CHAT, Application, Streamed, chat_body, eventually, run

STORY = chat_body("tiny", "Once upon a time", max_tokens=160, include_timeline=True)


async def moved(app: Application, action: str) -> tuple[list[Streamed], ReplicaInfo]:
    """Streams under way on the busiest decode replica when it leaves; that replica."""
    begun = [asyncio.Event() for _ in range(4)]

    async with httpx.AsyncClient(timeout=120) as client:

        async def read(i: int) -> Streamed:
            answer = Streamed()
            async for answer in app.stream(client, STORY):
                if answer.num_chunks >= 5:
                    begun[i].set()
            return answer

        streams = [asyncio.create_task(read(i)) for i in range(len(begun))]
        for event in begun:
            await event.wait()
        busy = max(app.replicas("tiny", "decode"), key=lambda i: app.load(i).num_running)
        if action == "drain":
            url = f"{app.url}/admin/replicas/{quote(busy.gang, safe='')}/drain"
            response = await client.post(url, json={"within_s": 0})
            assert response.status_code == 200, response.text
        else:
            ready = await asyncio.wrap_future(app.rank(busy).ready.remote().future())
            os.kill(ready.pid, signal.SIGTERM)
        return list(await asyncio.gather(*streams)), busy


def resumes(app: Application) -> float:
    lines = app.get("/metrics").text.splitlines()
    return sum(float(x.split()[1]) for x in lines if x.startswith("ernie_resumes_total{") and 'why="drained"' in x)


def phases(app: Application, replica: ReplicaInfo) -> list[str]:
    """Of a replica, as the router sees it."""
    view = app.get("/admin/status").json()
    return [r["phase"] for r in view["replicas"] if r["replica"] == replica.gang]


@pytest.mark.parametrize("action", ["drain", "SIGTERM"])
def test_streams_of_a_decode_replica_that_leaves_go_on(whole_app: Application, action: str) -> None:
    app = whole_app
    wanted = app.post(STORY).json()["choices"][0]["message"]["content"]
    before = resumes(app)
    answers, left = run(moved(app, action))
    for answer in answers:
        assert answer.error is None, answer.error
        assert (answer.is_done, answer.finish_reason, answer.text) == (True, "length", wanted)
    num_moved = sum(a.num_attempts > 1 for a in answers)  # a busy machine may take the next one for hung, too
    assert num_moved
    assert resumes(app) - before >= num_moved, "they were counted as failed"
    if action == "drain":
        eventually(lambda: "" if app.load(left).is_idle else "it is not empty", 10)
        url = f"{app.url}/admin/replicas/{quote(left.gang, safe='')}/undrain"
        assert httpx.post(url, timeout=10).status_code == 200
        eventually(lambda: "" if "ready" in phases(app, left) else "it is not back", 10)
    else:
        gone = {left.incarnation}
        eventually(lambda: "it is there" if gone & {i.incarnation for i in app.replicas("tiny")} else "", 30)
        with pytest.raises((ValueError, ray.exceptions.RayActorError), match="actor"):  # unknown, or just gone
            ray.get(app.rank(left).snapshot.remote(), timeout=10)


@pytest.mark.slow  # every replica is started anew, and then again
def test_a_changed_configuration_loses_no_request(whole_app: Application) -> None:
    app, text = whole_app, "Once upon a time"
    wanted = app.text("mixed", text)
    story = app.text("tiny", text, max_tokens=160)
    changed = dataclasses.replace(app.config, router=dataclasses.replace(app.config.router, retry_after_s=0.5))

    async def play() -> tuple[list[httpx.Response], Streamed]:
        answers: list[httpx.Response] = []
        async with httpx.AsyncClient(timeout=150) as client:
            long = asyncio.create_task(app.read(client, STORY))
            deployed = asyncio.create_task(asyncio.to_thread(launch.start, changed, print, timeout_s=140.0))
            while not deployed.done():
                answers.append(await client.post(app.url + CHAT, json=chat_body("mixed", text)))
                await asyncio.sleep(0.1)
            await deployed
            return answers, await long

    before = {i.incarnation for i in app.replicas()}
    answers, streamed = run(play())
    assert (streamed.error, streamed.text) == (None, story)
    refused = [a for a in answers if a.status_code != 200]
    assert all(a.status_code in (429, 503) and "retry-after" in a.headers for a in refused), refused
    assert {a.json()["choices"][0]["message"]["content"] for a in answers if a.status_code == 200} == {wanted}
    assert ray.get(app.router().has.remote(changed), timeout=10)
    eventually(lambda: "old ones" if before & {i.incarnation for i in app.replicas()} else "", 60)
    launch.start(app.config, print, timeout_s=140.0)
