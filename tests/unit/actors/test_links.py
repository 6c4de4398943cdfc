"""What comes out of calls, in words of our own."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, TaskCancelledError

from ernie_cluster.actors.direct import RemoteFailure
from ernie_cluster.actors.links import failure_of, translate
from ernie_cluster.errors import ContextTooLong, EngineFailed, ErnieClusterError, Overloaded, ReplicaLost


def told(cause: ErnieClusterError) -> RemoteFailure:
    return RemoteFailure(cause)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (told(ContextTooLong("too long")), ContextTooLong, "too long"),
        (told(Overloaded("full", 3.0)), Overloaded, "full"),
        (Overloaded("full"), Overloaded, "full"),
        (RayActorError(), ReplicaLost, "decode-0 is gone"),
        (ActorDiedError(), ReplicaLost, "decode-0 is gone"),
        (ActorUnavailableError("restarting", b"0" * 16), ReplicaLost, "decode-0 is gone"),
        (TimeoutError(), ReplicaLost, "decode-0 does not answer"),
        (TaskCancelledError(), EngineFailed, "decode-0: TaskCancelledError"),
        (RuntimeError("odd"), EngineFailed, "decode-0: RuntimeError: odd"),
    ],
)
def test_translate(error: Exception, kind: type[Exception], text: str) -> None:
    translated = translate(error, "decode-0")
    assert type(translated) is kind
    assert text in str(translated)


def test_retry_time_survives() -> None:
    error = translate(told(Overloaded("full", 3.0)), "decode-0")
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 3.0


def test_failure_knows_whether_the_replica_said_it_itself() -> None:
    assert failure_of(told(EngineFailed("stopped")), "decode-0").is_told
    assert not failure_of(ActorDiedError(), "decode-0").is_told
    assert failure_of(TimeoutError(), "decode-0").culprit(["prefill-0", "decode-0"]) == "decode-0"
