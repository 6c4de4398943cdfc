"""When nothing more is to be expected of a request that has left its engine."""

from __future__ import annotations

from ernie_cluster.actors.strays import SETTLE_S, Strays


def test_who_has_been_gone_for_long_enough_is_over() -> None:
    strays = Strays()
    assert strays.over(["a"], 0.0) == []
    assert strays.over(["a", "b"], SETTLE_S - 1) == []
    assert strays.over(["a", "b"], SETTLE_S) == ["a"]
    assert strays.over(["b"], 2 * SETTLE_S) == ["b"]
    assert strays.over([], 3 * SETTLE_S) == []
    assert len(strays) == 0


def test_who_comes_back_was_never_gone() -> None:
    """Its channel took long to make, or another attempt of it has begun."""
    strays = Strays()
    strays.over(["a"], 0.0)
    strays.over([], 1.0)
    assert strays.over(["a"], SETTLE_S) == []
