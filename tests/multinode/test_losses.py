"""Machines are lost, cut off from each other, and come back. Clients see a pause; only an API's own connections break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.e2e.application import CHAT, chat_body, eventually
from tests.multinode.conftest import WHOLE_TIMEOUT_S
from tests.multinode.ray_nodes import Redis
from tests.multinode.site import Door, Site, Watched

STORY = chat_body("tiny", "Once upon a time", max_tokens=200)
"""Of ten seconds."""
LONG = chat_body("tiny", "Once upon a time", max_tokens=800)
HELLO = chat_body("tiny", "Hello", max_tokens=8)
LIMIT_S = 200.0
"""For a scene; no client waits longer for anything."""
AGAIN_S = 0.5
"""Before a client who was told to come back does."""


def calm_text(site: Site, body: dict[str, object]) -> str:
    text: str = site.door().post(body).json()["choices"][0]["message"]["content"]
    return text


def check_whole(watched: Watched, text: str) -> None:
    answer = watched.answer
    assert answer.error is None, answer.error
    assert (answer.is_done, answer.finish_reason) == (True, "length")
    assert answer.text == text


@asynccontextmanager
async def streaming(
    door: Door, num_streams: int, body: dict[str, object] = STORY
) -> AsyncGenerator[Callable[[], Awaitable[list[Watched]]]]:
    """Streams that have begun; called, what it gives waits for their ends."""
    async with httpx.AsyncClient() as client, asyncio.TaskGroup() as group:
        begun = [asyncio.Event() for _ in range(num_streams)]

        async def read(i: int) -> Watched:
            watched = Watched()
            async for watched in door.watch(client, body):
                if watched.answer.num_chunks >= 5:
                    begun[i].set()
            return watched

        tasks = [group.create_task(read(i)) for i in range(num_streams)]
        for event in begun:
            await event.wait()

        async def ended() -> list[Watched]:
            return list(await asyncio.gather(*tasks))

        yield ended


async def ask(door: Door, body: dict[str, object]) -> str:
    """An answer to a client who comes again as long as it is told to; anything else than 429 and 503 is a failure."""
    async with httpx.AsyncClient(timeout=120) as client:
        while True:
            response = await client.post(door.url + CHAT, json=body)
            if response.status_code == 200:
                text: str = response.json()["choices"][0]["message"]["content"]
                return text
            assert response.status_code in (429, 503), response.text
            await asyncio.sleep(AGAIN_S)


def play(scene: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scene

    asyncio.run(limited())


def report(what: str, streams: list[Watched]) -> None:
    """The times, for whoever runs this with -rP."""
    print(f"{what}: longest waits {', '.join(f'{w.longest_wait_s:.1f} s' for w in streams)}")


@pytest.mark.parametrize("is_silent", [False, True], ids=["killed", "unplugged"])
def test_decode_machine_lost_in_mid_stream(site: Site, is_silent: bool) -> None:
    """Killed, it closes its connections; unplugged, nobody hears anything of it."""
    text, door = calm_text(site, STORY), site.door()

    async def scene() -> None:
        async with streaming(door, 4) as ended:
            victim = await asyncio.to_thread(site.busiest, "decode")
            if is_silent:
                site.spaces.unplug(victim)
            else:
                await asyncio.to_thread(site.nodes.kill, victim)
            streams = await ended()
        await asyncio.to_thread(site.nodes.kill, victim)
        site.spaces.plug(victim)
        site.nodes.start(victim)
        report(f"decode machine {'unplugged' if is_silent else 'killed'}", streams)
        for stream in streams:
            check_whole(stream, text)

    play(scene())


def test_prefill_machine_lost(site: Site) -> None:
    """Streams that decode do not notice; what was being prefilled there is prefilled elsewhere."""
    text, door = calm_text(site, STORY), site.door()
    prompts = [chat_body("tiny", f"{i} times all work and no play. " * 40, max_tokens=8) for i in range(4)]
    texts = [calm_text(site, prompt) for prompt in prompts]

    async def scene() -> None:
        async with streaming(door, 2) as ended:
            asked = [asyncio.create_task(ask(door, prompt)) for prompt in prompts]
            await asyncio.to_thread(site.nodes.kill, "prefill2")
            start = time.monotonic()
            assert await asyncio.gather(*asked) == texts
            print(f"prefill machine lost: last answer after {time.monotonic() - start:.1f} s")
            streams = await ended()
            site.nodes.start("prefill2")
        report("prefill machine lost", streams)
        for stream in streams:
            check_whole(stream, text)

    play(scene())


def test_prefill_and_decode_machines_parted(site: Site) -> None:
    """Both reach everybody else, so nobody is dead: hand-overs between the two fail and go other ways, until it is healed."""
    story, door = calm_text(site, STORY), site.door()
    prompts = [chat_body("tiny", f"{i} times no work and all play. " * 10, max_tokens=8) for i in range(12)]
    texts = [calm_text(site, prompt) for prompt in prompts]
    fresh = [chat_body("tiny", prompt["messages"][0]["content"] + "!", max_tokens=8) for prompt in prompts]

    async def answers(bodies: list[dict[str, object]], what: str) -> list[str]:
        texts, times = [], []
        for body in bodies:
            start = time.monotonic()
            texts.append(await ask(door, body))
            times.append(time.monotonic() - start)
        print(f"{what}: answers took {', '.join(f'{s:.1f}' for s in times)} s")
        return texts

    async def scene() -> None:
        async with streaming(door, 2) as ended:
            with site.spaces.parted("prefill2", "decode2"):
                assert await answers(prompts, "parted") == texts
                during = await answers(fresh, "parted, new prompts")
                streams = await ended()
            after = await answers(prompts, "healed")
        assert after == texts
        assert during == [calm_text(site, body) for body in fresh]
        for stream in streams:
            check_whole(stream, story)

    play(scene())


def test_api_machine_lost(site: Site) -> None:
    """Connections that an API replica there served break, whatever machine took them in; the others stay, the other API
    replica serves, and what was held for those that broke is free again."""
    text, door = calm_text(site, STORY), site.door("front")

    async def read(client: httpx.AsyncClient, begun: asyncio.Event) -> Watched | None:
        """None: it broke."""
        watched = Watched()
        try:
            async for watched in door.watch(client, STORY):  # noqa: B007
                begun.set()
        except httpx.TransportError:
            return None
        return watched

    async def scene() -> None:
        async with httpx.AsyncClient() as client:
            begun = [asyncio.Event() for _ in range(6)]
            tasks = [asyncio.create_task(read(client, event)) for event in begun]
            for event in begun:
                await event.wait()
            await asyncio.to_thread(site.nodes.kill, "prefill1")
            start = time.monotonic()
            hello = await ask(door, HELLO)
            print(f"API machine lost: next answer after {time.monotonic() - start:.1f} s")
            streams = await asyncio.gather(*tasks)
            assert hello == await ask(door, HELLO)
        whole = [stream for stream in streams if stream is not None]
        report(f"API machine lost: {len(streams) - len(whole)} of {len(streams)} connections broke", whole)
        assert whole, "one API replica was left"
        for stream in whole:
            check_whole(stream, text)

    play(scene())
    start = time.monotonic()

    def held() -> str:
        left = [r for r in door.replicas_of("decode") if r["num_running"] or r["free_blocks"] < r["total_blocks"]]
        return f"still held: {left}" if left else ""

    eventually(held, 60)
    print(f"API machine lost: at rest {time.monotonic() - start:.1f} s after the last answer")
    site.nodes.start("prefill1")


@pytest.mark.skipif(not Redis.is_installed(), reason="a head that comes back needs its tables: install redis-server")
def test_head_restarted(site: Site) -> None:
    """Nothing of ours is on the head: streams go on, and new requests are served while it is away and afterwards."""
    text, door = calm_text(site, HELLO), site.door()

    async def scene() -> None:
        async with streaming(door, 2, LONG) as ended:
            await asyncio.to_thread(site.nodes.kill, site.nodes.head)
            start = time.monotonic()
            for _ in range(5):
                assert await ask(door, HELLO) == text
            print(f"head lost: five answers after {time.monotonic() - start:.1f} s")
            await asyncio.to_thread(site.nodes.start, site.nodes.head)
            print(f"head back after {time.monotonic() - start:.1f} s")
            assert await ask(door, HELLO) == text
            streams = await ended()
        report("head restarted", streams)
        long_text = await ask(door, LONG)
        for stream in streams:
            check_whole(stream, long_text)

    play(scene())
    eventually(lambda: site.door("head").objection(), WHOLE_TIMEOUT_S)  # its own door, too
