"""The actor of a rank that only follows: weights, a share of the KV heads, and a thread that does what is announced."""

from __future__ import annotations

import threading

import ray

from ernie_cluster.actors import process
from ernie_cluster.actors.messages import Meeting, RankArgs
from ernie_cluster.errors import EngineFailed, GangBroken


@ray.remote(num_cpus=0, max_restarts=0)
class FollowerRank:
    """A rank of a gang that is not the first of its tensor-parallel group."""

    def __init__(self, args: RankArgs) -> None:
        process.share_interpreter()
        process.log_lines()
        self._args = args
        self._failure: EngineFailed | None = None

    async def load(self, meeting: Meeting | None) -> None:
        """Join the gang and load this rank's share; raises as `load_runner` does."""
        from ernie_cluster.actors.load_worker import join_gang, load_runner

        assert meeting is not None, "a follower has a gang"
        place = join_gang(self._args, meeting)
        runner = load_runner(self._args, place)

        def follow() -> None:
            try:
                runner.follow(place.tp)
            except Exception as e:
                self._failure = e if isinstance(e, GangBroken) else EngineFailed(f"{type(e).__name__}: {e}")

        threading.Thread(target=follow, name="follower", daemon=True).start()

    async def snapshot(self) -> None:
        """Raises EngineFailed when this rank has stopped, so that its gang is replaced."""
        if self._failure is not None:
            raise self._failure
