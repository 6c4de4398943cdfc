from __future__ import annotations

import pytest

from ernie_cluster.transport.choose import Endpoint, choose

HERE, THERE = "boot-1/net-1", "boot-2/net-1"


@pytest.mark.parametrize(
    ("sender_host", "receiver_host", "shm_address", "kind", "reason"),
    [
        (HERE, HERE, "shm:a:b", "shared_memory", "same host"),
        (HERE, HERE, None, "object_store", "offers no shared memory"),
        (HERE, THERE, "shm:a:b", "object_store", "different hosts"),
        (HERE, THERE, None, "object_store", "different hosts"),
    ],
)
def test_choice(sender_host: str, receiver_host: str, shm_address: str | None, kind: str, reason: str) -> None:
    choice = choose(Endpoint(sender_host, None, "prefill-0"), Endpoint(receiver_host, shm_address, "decode-0"))
    assert choice.kind == kind
    assert reason in choice.reason


def test_the_secret_address_is_not_printed() -> None:
    assert "shm:a:b" not in repr(Endpoint(HERE, "shm:a:b", "decode-0"))
