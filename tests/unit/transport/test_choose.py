from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from ernie_cluster.transport.choose import Endpoint, GpuEndpoint, Wish, choices

HERE, THERE = "boot-1/net-1", "boot-2/net-1"
SHM = "shm:a:b"
FIRST, SECOND = GpuEndpoint("GPU-1", "gpu:h:1:t"), GpuEndpoint("GPU-2", "gpu:h:2:t")
NO_CUPY = GpuEndpoint("GPU-2", None, "cupy cannot be imported")


def kinds(sender: Endpoint, receiver: Endpoint, wish: Wish = "auto") -> list[str]:
    return [choice.kind for choice in choices(sender, receiver, wish)]


@pytest.mark.parametrize(
    ("sender_host", "receiver_host", "shm_address", "kind", "reason"),
    [
        (HERE, HERE, SHM, "shared_memory", "same host"),
        (HERE, HERE, None, "object_store", "offers no shared memory"),
        (HERE, THERE, SHM, "object_store", "different hosts"),
        (HERE, THERE, None, "object_store", "different hosts"),
    ],
)
def test_choice_on_the_cpu(
    sender_host: str, receiver_host: str, shm_address: str | None, kind: str, reason: str
) -> None:
    choice = choices(Endpoint(sender_host, None, "prefill-0"), Endpoint(receiver_host, shm_address, "decode-0"))[0]
    assert choice.kind == kind
    assert reason in choice.reason
    assert "not ipc or nccl: prefill-0 has its model on the CPU" in choice.reason


@pytest.mark.parametrize(
    ("sender_gpu", "receiver_host", "receiver_gpu", "ranking", "reason"),
    [
        (FIRST, HERE, SECOND, ["ipc", "nccl", "shared_memory", "object_store"], "are on the same host"),
        (FIRST, HERE, FIRST, ["ipc", "shared_memory", "object_store"], "are on the same host"),
        (FIRST, THERE, SECOND, ["nccl", "object_store"], "not ipc: they are on different hosts"),
        (FIRST, HERE, NO_CUPY, ["shared_memory", "object_store"], "decode-0 cannot reach other GPUs: cupy cannot be"),
        (FIRST, THERE, NO_CUPY, ["object_store"], "decode-0 cannot reach other GPUs: cupy cannot be imported"),
        (FIRST, HERE, None, ["shared_memory", "object_store"], "decode-0 has its model on the CPU"),
        (None, THERE, SECOND, ["object_store"], "prefill-0 has its model on the CPU"),
    ],
)  # fmt: skip
def test_choices_with_gpus(
    sender_gpu: GpuEndpoint | None,
    receiver_host: str,
    receiver_gpu: GpuEndpoint | None,
    ranking: list[str],
    reason: str,
) -> None:
    sender = Endpoint(HERE, None, "prefill-0", sender_gpu)
    receiver = Endpoint(receiver_host, SHM, "decode-0", receiver_gpu)
    found = choices(sender, receiver)
    assert [choice.kind for choice in found] == ranking
    assert reason in found[0].reason


EVERY_GPU = (None, FIRST, SECOND, NO_CUPY)
EVERY_WISH: tuple[Wish, ...] = ("auto", "local", "ipc", "nccl", "shared_memory", "nixl", "object_store")


@pytest.mark.parametrize("wish", EVERY_WISH)
def test_a_wish_comes_first_where_it_can_and_the_object_store_last(wish: Wish) -> None:
    for mine, theirs, host, shm in itertools.product(EVERY_GPU, EVERY_GPU, (HERE, THERE), (SHM, None)):
        sender, receiver = Endpoint(HERE, None, "a", mine), Endpoint(host, shm, "b", theirs)
        ranking, free = kinds(sender, receiver, wish), kinds(sender, receiver)
        assert ranking[-1] == "object_store"
        assert len(set(ranking)) == len(ranking)
        assert set(ranking) <= set(free)
        if wish in free:
            assert ranking[0] == wish
        elif wish not in ("auto", "local"):
            assert wish in choices(sender, receiver, wish)[0].reason
        if "nccl" in ranking:
            assert mine != theirs
        if {"ipc", "shared_memory"} & set(ranking):
            assert host == HERE


@pytest.mark.parametrize(("here", "there"), [*itertools.product((True, False), repeat=2)])
def test_nixl_joins_two_that_have_it_where_it_is_wished_for_and_else_nobody(here: bool, there: bool) -> None:
    sender, receiver = Endpoint(HERE, None, "a", has_nixl=here), Endpoint(THERE, None, "b", has_nixl=there)
    wished = choices(sender, receiver, "nixl")
    assert [choice.kind for choice in wished] == (["nixl"] if here and there else []) + ["object_store"]
    told = "transport.kind = nixl asks for it" if here and there else f"not nixl: {'b' if here else 'a'} has no NIXL"
    assert told in wished[0].reason
    for wish in set(EVERY_WISH) - {"nixl"}:
        (choice,) = choices(sender, receiver, wish)
        assert choice.kind == "object_store"
        assert wish == "object_store" or "not nixl: Ray calls its interface alpha" in choice.reason


def test_the_secret_address_is_not_printed() -> None:
    told = repr(Endpoint(HERE, SHM, "decode-0", FIRST))
    assert SHM not in told
    assert "gpu:h" not in told


@pytest.mark.parametrize("gpu", [None, FIRST, NO_CUPY])
@pytest.mark.parametrize("shm_address", [None, SHM])
def test_an_endpoint_survives_a_message(gpu: GpuEndpoint | None, shm_address: str | None) -> None:
    endpoint = Endpoint(HERE, shm_address, "prefill-0", gpu, has_nixl=shm_address is None)
    assert Endpoint.from_json(json.loads(json.dumps(endpoint.to_json()))) == endpoint


def test_a_gang_s_ranks_are_its_leader_and_the_others() -> None:
    leader, other = (Endpoint(HERE, SHM, f"decode-{n}", gpu) for n, gpu in enumerate((FIRST, SECOND)))
    assert leader.ranks == (leader,)
    assert dataclasses.replace(leader, others=(other,)).ranks == (leader, other)


def test_orders_need_no_gpu() -> None:
    leader, other = (Endpoint(HERE, SHM, f"decode-{n}", gpu) for n, gpu in enumerate((FIRST, SECOND)))
    choice = choices(leader, other.without_gpu("orders need none"))[0]
    assert choice.kind == "shared_memory"
    assert "decode-1 cannot reach other GPUs: orders need none" in choice.reason
    assert Endpoint(HERE, SHM, "decode-0").without_gpu("it has none").gpu is None
