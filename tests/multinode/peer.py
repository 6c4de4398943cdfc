"""One end of a direct connection, as a program; the other is on another machine.

serve HOST             says its address, then "without peers" each time when the last connection has ended
call ADDRESS [talk]    says "connected"; then waits for an answer that never comes, or calls again and again, and
                       says "lost" when the connection is
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import sys

from ernie_cluster.actors.direct import DirectPeer, DirectServer
from ernie_cluster.errors import ReplicaLost


async def echo(value: object) -> object:
    return value


async def never() -> None:
    await asyncio.Event().wait()


def say(words: str) -> None:
    print(words, flush=True)


async def serve(host: str) -> None:
    server = DirectServer({"echo": echo, "never": never})
    say(pickle.dumps(await server.start(host)).hex())
    while True:
        while not server._writers:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        while server._writers:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        say("without peers")


async def call(address: str, *, talks: bool) -> None:
    peer = await DirectPeer.connect(pickle.loads(bytes.fromhex(address)), "the other machine")
    await peer.call("echo", 1)
    say("connected")
    with contextlib.suppress(ReplicaLost):
        if not talks:
            await peer.call("never")
        while True:
            await peer.call("echo", 2)
            await asyncio.sleep(0.05)
    say("lost")


if __name__ == "__main__":
    verb, where, *more = sys.argv[1:]
    asyncio.run(serve(where) if verb == "serve" else call(where, talks=more == ["talk"]))
