"""Orders to replicas from the command line, through the API to a backend that carries them out."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace

import httpx
import pytest

from ernie_cluster.api.guard import Guard
from ernie_cluster.api.operator import Order, ReplicaView
from ernie_cluster.cli import drain, operate, role, undrain
from ernie_cluster.cli.main import main
from ernie_cluster.cli.operate import Cluster, Unreachable, connect, find_replica
from ernie_cluster.errors import ErnieClusterError, ReplicaLost
from ernie_cluster.observe.metrics import InMemoryMetrics
from tests.unit.api.clusters import DECODE, PREFILL, SWITCHED, VIEW, VISION
from tests.unit.cli.site import Site

# Naming a replica


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (PREFILL.replica, PREFILL),
        ("org/m/prefill/abc", PREFILL),
        ("org/m/v", VISION),
        ("abc123", PREFILL),
        ("abd", SWITCHED),
        ("x", DECODE),
    ],
)
def test_an_id_its_last_part_or_the_beginning_of_either(given: str, found: ReplicaView) -> None:
    assert find_replica(given, VIEW) == found


def test_a_whole_name_wins_over_a_longer_one() -> None:
    longer = replace(PREFILL, replica=PREFILL.replica + "4")
    view = replace(VIEW, replicas=(longer, PREFILL))
    assert [find_replica(given, view) for given in (PREFILL.replica, "abc123", "abc1234")] == [PREFILL, PREFILL, longer]


@pytest.mark.parametrize("given", ["ab", "org/m/prefill", "", "org/m/prefill/ab"])
def test_several_are_listed(given: str) -> None:
    with pytest.raises(ErnieClusterError, match="say more") as caught:
        find_replica(given, VIEW)
    assert PREFILL.replica in str(caught.value)
    assert SWITCHED.replica in str(caught.value)


def test_none_lists_those_that_are_there_up_to_a_bound() -> None:
    many = tuple(replace(PREFILL, replica=f"m/prefill/r{i}") for i in range(1000))
    with pytest.raises(ErnieClusterError) as caught:
        find_replica("nobody", replace(VIEW, replicas=many))
    assert "m/prefill/r0 " in str(caught.value)
    assert str(caught.value).endswith("and 990 more; `ernie-cluster status --all` shows them")
    with pytest.raises(ErnieClusterError, match="none at all"):
        find_replica("nobody", replace(VIEW, replicas=()))


# Orders


def test_drain_undrain_and_role(capsys: pytest.CaptureFixture[str]) -> None:
    site, name = Site(), PREFILL.replica
    codes = [
        drain.run(site.cluster(), "abc"),
        undrain.run(site.cluster(), "abc"),
        role.run(site.cluster(), "abc", "decode"),
    ]
    assert codes == [0, 0, 0]
    assert site.backend.orders == [Order(name, "drain"), Order(name, "undrain"), Order(name, "role", "decode")]
    assert capsys.readouterr().out.splitlines() == [
        f"{name} is draining: 3 running, 2 waiting, 4,096 tokens to compute",
        f"{name} is ready, as prefill",
        f"{name} is switching, as decode",
    ]  # fmt: skip


def test_an_order_that_is_refused_says_why() -> None:
    with pytest.raises(ErnieClusterError, match="no mixed pool"):
        role.run(Site().cluster(), "abc", "mixed")


class Draining:
    """A site in which a replica finishes its work: each pause shows the next of its states.

    Args:
        states: of the replica, one a second; None: it is gone. An error: the router tells nothing.
    """

    def __init__(self, *states: ReplicaView | ErnieClusterError | None) -> None:
        self.site, self.now_s, self._states = Site(), 0.0, list(states)

    def run(self, wait_s: float) -> int:
        return drain.run(self.site.cluster(), "abc123", wait_s, clock=lambda: self.now_s, pause=self._pause)

    def _pause(self, pause_s: float) -> None:
        self.now_s += pause_s
        state = self._states.pop(0)
        if isinstance(state, ErnieClusterError):
            self.site.backend.cluster_news = state
        else:
            self.site.backend.cluster_news = replace(VIEW, replicas=() if state is None else (state,))


BUSY = replace(PREFILL, phase="draining")
EMPTY = replace(BUSY, num_running=0, num_waiting=0, waiting_tokens=0)


def test_waiting_ends_when_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    less = replace(BUSY, num_waiting=0)
    assert Draining(BUSY, less, EMPTY).run(300.0) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"{PREFILL.replica} has nothing left"
    assert [line.partition("] ")[2] for line in err.splitlines()] == [
        "3 running, 2 waiting, 4,096 tokens to compute",
        "3 running, 0 waiting, 4,096 tokens to compute",
    ]  # each once


def test_what_a_replica_told_before_the_order_does_not_count() -> None:
    stale = replace(EMPTY, age_s=5.0)
    draining = Draining(stale, stale, EMPTY)
    assert draining.run(300.0) == 0
    assert draining.now_s == 3 * drain.PAUSE_S


def test_a_replica_that_is_gone_has_nothing_left() -> None:
    assert Draining(BUSY, None).run(300.0) == 0


def test_a_server_that_is_away_for_a_while_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert Draining(ReplicaLost("gone"), EMPTY).run(300.0) == 0
    assert "cannot tell now" in capsys.readouterr().err


def test_waiting_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert Draining(*[BUSY] * 9).run(4.0) == 1
    assert "not done after 4 s: 3 running" in capsys.readouterr().out


def test_another_order_ends_the_waiting() -> None:
    with pytest.raises(ErnieClusterError, match="is ready now"):
        Draining(BUSY, PREFILL).run(300.0)


# A server that does not answer well


def answering(status: int, **fields: object) -> Cluster:
    answer = httpx.Response(status, **fields)  # type: ignore[arg-type]
    return Cluster("http://site/", {}, transport=httpx.MockTransport(lambda _: answer))


def test_a_server_that_is_not_there() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    with pytest.raises(Unreachable, match=r"http://site cannot be reached \(connection refused\).*--url.*serve"):
        Cluster("http://site/v1/", {}, transport=httpx.MockTransport(refuse)).view()


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        (answering(404, json={"detail": "Not Found"}), "another server, or an older version"),
        (answering(500, text=""), "HTTP 500"),
        (answering(200, text="<html>"), "is the server an ernie_cluster of the same version"),
        (answering(200, json={"models": [{"name": 1}]}), r"models\.0\.name"),
        (answering(302, headers={"location": "/login"}), "HTTP 302"),
    ],
)
def test_a_server_of_another_kind(cluster: Cluster, words: str) -> None:
    with pytest.raises(ErnieClusterError, match=words):
        cluster.view()


@pytest.mark.parametrize("status", [502, 503, 504])
def test_what_may_be_there_again_soon(status: int) -> None:
    with pytest.raises(Unreachable, match=f"HTTP {status}"):
        answering(status, json={"error": {"message": "wait"}}).view()


def guard(admin: str | None) -> Guard:
    sha256 = None if admin is None else hashlib.sha256(admin.encode()).hexdigest()
    return Guard(None, admin_sha256=sha256, isolate_prefix_cache=False, metrics=InMemoryMetrics(), clock=lambda: 0.0)


def test_the_admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(guard=guard("root"))
    with pytest.raises(ErnieClusterError, match="--admin-key or in ERNIE_ADMIN_KEY"):
        site.cluster().view()
    assert drain.run(site.cluster(authorization="Bearer root"), "abc123") == 0
    parser = argparse.ArgumentParser()
    operate.add_server_arguments(parser)
    monkeypatch.setenv("ERNIE_ADMIN_KEY", "from the environment")
    monkeypatch.setenv("ERNIE_API_KEY", "a client's")
    for argv, key in ((["--admin-key", "given"], "given"), ([], "from the environment")):
        assert connect(parser.parse_args(argv))._client.headers["authorization"] == f"Bearer {key}"
    with pytest.raises(ErnieClusterError, match="check --admin-key and ERNIE_ADMIN_KEY"):
        connect(parser.parse_args(["--admin-key", "ключ"]))


def test_orders_without_an_admin_key_teach() -> None:
    with pytest.raises(ErnieClusterError, match=r"set api\.admin_key_sha256"):
        drain.run(Site(guard=guard(None)).cluster(), "abc123")


def test_a_refusal_cannot_rule_the_terminal() -> None:
    with pytest.raises(ErnieClusterError) as caught:
        answering(409, json={"error": {"message": "\x1b[2Jno\x07"}}).view()
    assert str(caught.value) == "[2Jno (HTTP 409)"


# The commands themselves


@pytest.mark.parametrize("command", ["drain", "undrain", "role", "status"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"  ernie-cluster {command} " in shown
    assert "ERNIE_ADMIN_KEY" in shown


def test_errors_exit_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    site = Site()
    for module in (drain, undrain, role):
        monkeypatch.setattr(module, "connect", lambda args: site.cluster())
    assert main(["drain", "nobody"]) == 2
    assert "error: no replica is called 'nobody'" in capsys.readouterr().err
    assert main(["role", "abc123", "mixed"]) == 2
    assert [main(["drain", "abc123"]), main(["undrain", "abc123"]), main(["role", "abc123", "decode"])] == [0, 0, 0]
    assert len(site.backend.orders) == 4


@pytest.mark.parametrize("argv", [["drain"], ["role", "abc", "vision"], ["drain", "abc", "--wait", "nan"], ["drain", "abc", "--wait", "0"]])  # fmt: skip
def test_a_wrong_command_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert f"usage: ernie-cluster {argv[0]}" in capsys.readouterr().err
