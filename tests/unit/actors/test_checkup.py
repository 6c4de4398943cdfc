"""Asking the nodes of a cluster, where Ray is a twin that runs everything here: whom it asks, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayError

from ernie_cluster.actors import checkup
from ernie_cluster.doctor import tcp
from ernie_cluster.doctor.facts import Link, Missing, Node, OpenFiles
from ernie_cluster.doctor.need import Need

IDS = ["0" * 56, "1" * 56]


class TwinRay:
    """Calls happen when they are waited for; `mishaps` by node and method raise instead."""

    def __init__(self, *gpus: float) -> None:
        self.gpus, self.mishaps, self.num_alive = gpus, dict[tuple[str, str], Exception](), 0

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"NodeID": "f" * 56, "NodeManagerAddress": "127.0.0.9", "Alive": False, "Resources": {}}
        alive = [
            {"NodeID": IDS[i], "NodeManagerAddress": f"127.0.0.{i + 1}", "Alive": True, "Resources": {"GPU": gpus}}
            for i, gpus in enumerate(self.gpus)
        ]
        return [*alive, gone]

    def remote(self, *, num_cpus: int, num_gpus: int) -> Callable[[Any], Any]:
        assert num_cpus == 0, "a cluster at work has no core to spare"
        return lambda what: _Remote(self, what)

    def get(self, asked: Any, *, timeout: float) -> Any:
        assert timeout >= 0
        return [call() for call in asked] if isinstance(asked, list) else asked()

    def kill(self, actor: Any) -> None:
        self.num_alive -= 1


class _Remote:
    def __init__(self, ray: TwinRay, what: Any, node: str = "") -> None:
        self._ray, self._what, self._node = ray, what, node

    def options(self, *, scheduling_strategy: Any) -> _Remote:
        assert not scheduling_strategy.soft
        return _Remote(self._ray, self._what, scheduling_strategy.node_id)

    def remote(self, *args: Any) -> Any:
        if isinstance(self._what, type):
            self._ray.num_alive += 1
            return _Actor(self._ray, self._what, self._node)
        return self.call(self._what.__name__, lambda: self._what(*args))

    def call(self, name: str, work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            if error := self._ray.mishaps.get((self._node, name)):
                raise error
            return work()

        return run


class _Actor:
    def __init__(self, ray: TwinRay, kind: type, node: str) -> None:
        self._remote, self._one = _Remote(ray, kind, node), kind() if kind is checkup._Wire else _FakeGpu()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._one, name)
        here = self._remote

        class Method:
            @staticmethod
            def remote(*args: Any) -> Callable[[], Any]:
                return here.call(name, lambda: method(*args))

        return Method


class _FakeGpu:
    def unique_id(self) -> bytes:
        return b"id"

    def meet(self, uid: bytes, rank: int) -> float:
        assert uid == b"id"
        return [3e9, 2.5e9][rank]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> TwinRay:
    twin = TwinRay(1.0, 1.0)
    monkeypatch.setattr(checkup, "ray", twin)
    monkeypatch.setattr(tcp, "BULK_BYTES", 1 << 20)
    monkeypatch.setattr(checkup, "gather", lambda names, need: dict.fromkeys(names, OpenFiles(1, 2)))
    return twin


NODES = [Node(IDS[0], "127.0.0.1", 1.0), Node(IDS[1], "127.0.0.2", 1.0)]
BETWEEN = ("nodes", "labels", "clocks", "links", "nccl_links")


def test_every_node_that_is_alive_is_asked(ray: TwinRay) -> None:
    assert checkup.facts_of_nodes({"open_files"}, Need()) == {node: {"open_files": OpenFiles(1, 2)} for node in NODES}


@pytest.mark.parametrize(
    ("mishap", "words"),
    [(RayError("x\nNo module named 'ernie_cluster'"), "No module named"), (GetTimeoutError(), "no answer in time")],
)
def test_a_node_that_does_not_answer_is_told_and_the_others_are_there(
    mishap: Exception, words: str, ray: TwinRay
) -> None:
    ray.mishaps[IDS[1], "_look"] = mishap
    first, second = checkup.facts_of_nodes({"open_files"}, Need()).items()
    assert first == (NODES[0], {"open_files": OpenFiles(1, 2)})
    assert words in second[0].error
    assert isinstance(second[1]["open_files"], Missing)


def test_what_lies_between_two_nodes(ray: TwinRay) -> None:
    found = checkup.facts_between(BETWEEN, Need(), NODES)
    assert found["nodes"] == NODES
    assert list(found["labels"]) == []
    assert [clock.node for clock in found["clocks"]] == ["127.0.0.1", "127.0.0.2"]
    assert all(abs(clock.ahead_s) <= clock.error_s + 0.1 for clock in found["clocks"])
    (link,) = found["links"]
    assert (link.first, link.second, link.error) == ("127.0.0.1", "127.0.0.2", "")
    assert min(link.round_trip_s, link.bytes_per_s) > 0
    assert found["nccl_links"] == [Link("127.0.0.1", "127.0.0.2", bytes_per_s=2.5e9)]
    assert ray.num_alive == 0


def test_nothing_lies_between_a_node_and_itself(ray: TwinRay) -> None:
    found = checkup.facts_between(("links", "nccl_links"), Need(), NODES[:1])
    assert found == {"links": [], "nccl_links": []}


@pytest.mark.parametrize(
    ("call", "mishap", "name", "field", "words"),
    [
        ("measure", RayError("Connection refused"), "links", "error", "Connection refused"),
        ("measure", GetTimeoutError(), "links", "error", "no answer in time"),
        ("unique_id", GetTimeoutError(), "nccl_links", "untried", "no free GPU"),
        ("unique_id", RayError("cupy cannot be imported"), "nccl_links", "error", "cupy"),
        ("meet", GetTimeoutError(), "nccl_links", "error", "no answer in time"),
    ],
)
def test_a_way_that_there_is_not_is_told_and_nothing_is_left(
    call: str, mishap: Exception, name: str, field: str, words: str, ray: TwinRay
) -> None:
    ray.mishaps[IDS[0], call] = mishap
    (link,) = checkup.facts_between((name,), Need(), NODES)[name]
    assert words in getattr(link, field)
    assert ray.num_alive == 0


def test_a_node_that_leaves_while_its_clock_is_read(ray: TwinRay) -> None:
    ray.mishaps[IDS[0], "_time"] = RayError("the node has died")
    assert checkup.facts_between(("clocks",), Need(), NODES) == {"clocks": Missing("the node has died")}
