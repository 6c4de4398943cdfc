"""A process that is told to end does its work first, once, and then ends as it would have."""

from __future__ import annotations

import asyncio
import threading

import pytest
from ray._private import worker

from ernie_cluster.actors import notice
from ernie_cluster.actors.notice import Notice


def sigterm() -> None:
    """What Ray's handler does, on a thread of its own."""
    thread = threading.Thread(target=lambda: worker.raise_sys_exit_with_custom_error_message("SIGTERM", exit_code=1))
    thread.start()
    thread.join()


@pytest.mark.parametrize("fails", [False, True])
def test_work_comes_first_and_then_the_end_that_ray_makes(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    did: list[str] = []
    monkeypatch.setattr(worker, notice._RAISE, lambda message, exit_code: did.append(f"{message} {exit_code}"))

    async def play() -> None:
        may_end, ended = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            did.append("work")
            await may_end.wait()
            if fails:
                raise TimeoutError

        def end() -> None:
            sigterm()
            ended.set()

        taken = Notice(work, end)
        for _ in range(2):
            await asyncio.to_thread(sigterm)
        assert did == ["work"]
        may_end.set()
        await ended.wait()
        assert taken._task is not None
        taken._task.cancel()

    asyncio.run(asyncio.wait_for(play(), 30))
    assert did == ["work", "SIGTERM 1"]


def test_a_ray_without_that_function_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(worker, notice._RAISE)

    async def play() -> None:
        Notice(asyncio.Event().wait)  # type: ignore[arg-type]

    asyncio.run(play())
    assert not hasattr(worker, notice._RAISE)
