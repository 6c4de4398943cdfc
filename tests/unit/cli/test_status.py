"""`ernie-cluster status`: what it shows of a cluster, at any width and size."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from ernie_cluster.api.operator import ClusterView, DecisionView, ModelView, Phase, ReplicaView, Role
from ernie_cluster.api.views import readable, view_of
from ernie_cluster.cli import status
from ernie_cluster.cli.main import main
from ernie_cluster.cli.status_view import ROWS_PER_POOL, render
from ernie_cluster.errors import ErnieClusterError, ReplicaLost
from tests.fakes import NO_CLUSTER, FakeBackend
from tests.unit.api.clusters import PREFILL, VIEW
from tests.unit.cli.site import Site

NOW_S = 1012.0

WORDS = st.text("ab-/[]é中\x1b\n\t", max_size=30)
COUNTS = st.integers(0, 10**9)
NUMBERS = st.floats(0, 1e9)
ROLES = st.sampled_from(get_args(Role))
MODELS = st.builds(
    ModelView,
    WORDS,
    st.booleans(),
    WORDS,
    COUNTS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.none() | NUMBERS,
    st.none() | NUMBERS,
    st.none() | st.dictionaries(ROLES, NUMBERS, max_size=2),
)
REPLICAS = st.builds(
    ReplicaView,
    WORDS,
    WORDS,
    ROLES,
    ROLES,
    st.sampled_from(get_args(Phase)),
    WORDS,
    NUMBERS,
    COUNTS,
    COUNTS,
    COUNTS,
    COUNTS,
    COUNTS,
    NUMBERS,
)
DECISIONS = st.builds(DecisionView, NUMBERS, WORDS, WORDS, st.just((PREFILL.replica,)), WORDS, WORDS)
VIEWS = st.builds(
    ClusterView,
    st.lists(MODELS, max_size=2).map(tuple),
    st.lists(REPLICAS, max_size=4).map(tuple),
    st.booleans(),
    NUMBERS,
    NUMBERS,
    st.sampled_from(["GPUs", "cores"]),
    st.lists(DECISIONS, max_size=2).map(tuple),
)


def shown(view: ClusterView, width: int = 80, rows_per_pool: int | None = ROWS_PER_POOL) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(view, NOW_S, rows_per_pool=rows_per_pool))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


# Laws


@settings(max_examples=25, deadline=None)
@given(VIEWS)
def test_a_view_comes_back_from_json(view: ClusterView) -> None:
    assert view_of(ClusterView, readable(view).encode()) == view


@settings(max_examples=25, deadline=None)
@given(VIEWS, st.sampled_from([80, 132]))
def test_any_view_fits_the_terminal_and_cannot_rule_it(view: ClusterView, width: int) -> None:
    text = shown(view, width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    assert all(c == "\n" or c.isprintable() for c in text)


# Examples


def test_an_example() -> None:
    assert lines(shown(VIEW)) == [
        "used 6 of 8 GPUs, autoscaled; 5 replicas: 2 ready, 1 starting, 1 switching, 1",
        "draining",
        "",
        "tokens tokens TTFT TPOT",
        "model ready req/s in/s out/s p90 p90 held",
        "org/m yes 3.2 12,345 1,234 420 ms 31 ms 2",
        "asleep no 0.0 0 0 - - 0",
        "org/m has 1 (and 1 starting) of 1.1 decode, 1 of 2.3 prefill",
        "asleep: waiting for a mixed replica",
        "",
        "org/m, vision pool: 1 replica",
        "replica role phase KV used run wait tokens age node",
        "v1 vision ready - 0 0 0 0.9 s node-2",
        "",
        "org/m, prefill pool: 2 replicas",
        "replica role phase KV used run wait tokens age node",
        "abd456 decode switching #....... 10% 1 0 0 0.2 s node-1",
        "abc123 prefill ready ###..... 40% 3 2 4,096 0.1 s node-1",
        "",
        "org/m, decode pool: 2 replicas",
        "replica role phase KV used run wait tokens age node",
        "xyz789 decode draining #######. 90% 7 0 0 0.3 s node-2",
        "new1 decode starting - 0 0 0 0.0 s -",
        "",
        "last decisions",
        "12 s ago org/m switch_role 1 prefill -> decode: decode is short of replicas",
        "22 s ago note nothing: the budget is used up",
    ]


def test_an_empty_cluster() -> None:
    assert lines(shown(NO_CLUSTER))[0] == "used 0 of 0 GPUs, not autoscaled; 0 replicas"


def test_many_replicas_are_summarised_those_that_are_not_just_ready_first() -> None:
    pool = [replace(PREFILL, replica=f"org/m/prefill/r{i:03}") for i in range(300)]
    pool[200] = replace(pool[200], phase="draining")
    view = replace(VIEW, replicas=tuple(pool))
    text = lines(shown(view))
    start = text.index("org/m, prefill pool: 300 replicas") + 2
    assert [line.split()[0] for line in text[start : start + ROWS_PER_POOL]] == [
        "r200",
        *(f"r{i:03}" for i in range(7)),
    ]
    assert text[start + ROWS_PER_POOL] == "and 292 more (292 ready); --all shows them"
    everything = lines(shown(view, rows_per_pool=None))
    assert sum("###" in line for line in everything) == 300
    assert not any("more" in line for line in everything)


def test_numbers_stay_short() -> None:
    busy = replace(PREFILL, waiting_tokens=123_456_789, num_running=12_345, age_s=7200.0, node="n" * 200)
    (row,) = [line for line in lines(shown(replace(VIEW, replicas=(busy,)))) if line.startswith("abc123")]
    assert row.startswith("abc123 prefill ready ###..... 40% 12,345 2 123.5M 2 h nnn")
    assert row.endswith("n…")


# The command


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    found = Site()
    monkeypatch.setattr(status, "connect", lambda args: found.cluster())
    return found


@pytest.mark.parametrize("options", [[], ["--watch"], ["--all"]])
def test_without_a_terminal_it_is_plain_text_once(
    options: list[str], site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", *options]) == 0
    out = capsys.readouterr().out
    assert "abc123" in out
    assert "\x1b" not in out


def test_json_is_the_view(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 0
    assert view_of(ClusterView, capsys.readouterr().out.encode()) == VIEW


def test_a_router_that_is_gone_is_an_error(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.backend.cluster_news = ReplicaLost("gone")
    assert main(["status"]) == 2
    assert "error: http://site cannot tell now" in capsys.readouterr().err


def watched(backend: FakeBackend, *changes: Callable[[], None]) -> str:
    """What a terminal gets when each pause brings a change, and the last one Ctrl-C."""
    left = list(changes)

    def pause(_: float) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    out = io.StringIO()
    console = Console(file=out, width=80, height=60, force_terminal=True, color_system=None)
    assert status.watch(Site(backend).cluster(), console, 2.0, None, clock=lambda: NOW_S, pause=pause) == 0
    return out.getvalue()


def test_watching_shows_changes_and_outlives_a_server_that_is_away() -> None:
    backend = Site().backend

    def put(news: ClusterView | Exception) -> Callable[[], None]:
        return lambda: setattr(backend, "cluster_news", news)

    text = watched(backend, put(ReplicaLost("gone")), put(replace(VIEW, used=7.0)))
    order = [text.index(words) for words in ("used 6 of 8", "not up to date: http://site", "used 7 of 8")]
    assert order == sorted(order)


def test_watching_what_is_not_there_from_the_start_is_an_error() -> None:
    backend = Site().backend
    backend.cluster_news = ReplicaLost("gone")
    with pytest.raises(ErnieClusterError, match="cannot tell now"):
        watched(backend)
