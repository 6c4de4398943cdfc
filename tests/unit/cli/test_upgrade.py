"""A pool whose replicas are replaced one by one, played a second at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ernie_cluster.api.operator import ClusterView, Order, ReplicaView
from ernie_cluster.cli import upgrade
from ernie_cluster.cli.operate import Cluster, Unreachable
from ernie_cluster.errors import ErnieClusterError

NOW_S = 1000.0


class Played(Cluster):
    """A replica that is to be replaced is gone after a second, and another one ready three seconds later.

    Args:
        names: of the pool m/decode.
        never: whose successor does not come.
    """

    def __init__(self, names: list[str], never: str | None = None) -> None:
        self.replicas = [ReplicaView(f"m/decode/{n}", "m", "decode", "decode", "ready", "", 1.0) for n in names]
        self.replicas.append(ReplicaView("m/prefill/p", "m", "prefill", "prefill", "ready", "", 1.0))
        self.orders: list[Order] = []
        self.fewest = len(names)
        self.now_s, self._never = 0.0, never
        self._coming: list[tuple[float, ReplicaView]] = []

    def view(self) -> ClusterView:
        if self.now_s == 2.0:
            raise Unreachable("no answer")
        self.replicas += [r for at_s, r in self._coming if at_s <= self.now_s]
        self._coming = [(at_s, r) for at_s, r in self._coming if at_s > self.now_s]
        return ClusterView((), tuple(self.replicas), False, 1.0, 1.0, "GPUs", ())

    def order(self, order: Order) -> ReplicaView:
        self.orders.append(order)
        (old,) = (r for r in self.replicas if r.replica == order.replica)
        return replace(old, phase="draining")

    def pause(self, seconds: float) -> None:
        self.now_s += seconds
        last = self.orders[-1].replica
        for old in [r for r in self.replicas if r.replica == last]:
            self.replicas.remove(old)
            new = replace(old, replica=f"{last}+", started_s=NOW_S + self.now_s)
            if last != f"m/decode/{self._never}":
                self._coming.append((self.now_s + 3, new))
        self.fewest = min(self.fewest, sum(r.home == "decode" for r in self.replicas))

    def run(self, pool: str, before_s: float = NOW_S, within_s: float | None = None) -> int:
        return upgrade.run(self, pool, within_s, 20.0, before_s, clock=lambda: self.now_s, pause=self.pause)


def test_one_by_one_and_each_once() -> None:
    site = Played(["a", "b", "c"])
    assert site.run("m/decode", within_s=5.0) == 0
    assert site.orders == [Order(f"m/decode/{n}", "restart", within_s=5.0) for n in "abc"]
    assert site.fewest == 2, "never more than one is away"
    site = Played(["a"])
    assert site.run("m") == 0
    assert [o.replica for o in site.orders] == ["m/decode/a", "m/prefill/p"]


def test_a_successor_that_does_not_come_ends_it_and_it_goes_on_from_there(capsys: pytest.CaptureFixture[str]) -> None:
    site = Played(["a", "b", "c"], never="b")
    assert site.run("m/decode") == 1
    said = capsys.readouterr().out
    assert "m/decode/b was not replaced within 20 s: 1 of 3 are" in said
    assert f"ernie-cluster upgrade m/decode --before {NOW_S:.0f}" in said
    assert [o.replica for o in site.orders] == ["m/decode/a", "m/decode/b"]
    assert site.run("m/decode") == 0
    assert [o.replica for o in site.orders[2:]] == ["m/decode/c"]


def test_a_pool_that_is_not_there() -> None:
    with pytest.raises(ErnieClusterError, match=r"no pool 'm/vision'.* there are: m/decode, m/prefill"):
        Played(["a"]).run("m/vision")
