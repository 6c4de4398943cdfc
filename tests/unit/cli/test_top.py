"""`ernie-cluster top`: what it makes of two looks, how it draws them, and the command."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from ernie_cluster.api.operator import ClusterView
from ernie_cluster.api.views import view_of
from ernie_cluster.cli import top as command
from ernie_cluster.cli.main import main
from ernie_cluster.cli.top_draw import render
from ernie_cluster.cli.top_view import SORTS, Look, TopView, top
from ernie_cluster.errors import ErnieClusterError, ReplicaLost
from ernie_cluster.observe.metrics import PrometheusMetrics
from ernie_cluster.observe.reading import Reading, read
from tests.fakes import FakeBackend
from tests.unit.api.clusters import DECODE, PREFILL, VIEW
from tests.unit.cli.site import Site
from tests.unit.cli.test_status import VIEWS, lines

MODEL = "org/m"


def work(metrics: PrometheusMetrics, num: int = 1) -> None:
    """What the API counts for requests of which one in four is refused."""
    for i in range(4 * num):
        metrics.inc("ernie_request_total", model=MODEL, outcome="overloaded" if i % 4 == 3 else "success")
    for _ in range(num):
        metrics.inc("ernie_prompt_tokens_total", 1000, model=MODEL)
        metrics.inc("ernie_generation_tokens_total", 50, model=MODEL)
        metrics.observe("ernie_time_to_first_token_seconds", 0.2, model=MODEL)
        metrics.observe("ernie_inter_token_latency_seconds", 0.0015, model=MODEL)
        metrics.inc("ernie_request_retries_total", model=MODEL, reason="ReplicaLost")
        metrics.inc("ernie_resumes_total", model=MODEL, why="drained")
        metrics.set("ernie_requests_in_flight", 3, model=MODEL)


def look(at_s: float, *processes: PrometheusMetrics, view: ClusterView = VIEW) -> Look:
    readings = [read(m.render().decode()) for m in processes]
    return Look(view, {r.process: (at_s, r) for r in readings})


def drawn(view: TopView, width: int = 100, num_replicas: int = 3) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(view, num_replicas=num_replicas))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# What two looks tell


def test_rates_are_of_the_interval_alone() -> None:
    metrics = PrometheusMetrics()
    work(metrics, 7)
    before = look(100.0, metrics)
    work(metrics, 2)
    view = top(before, look(104.0, metrics))
    model = view.models[0]
    assert (view.interval_s, view.num_processes, view.num_missed) == (4.0, 1, 0)
    assert (model.requests_per_s, model.refused_per_s, model.failed_per_s) == (2.0, 0.5, 0.0)
    assert (model.prompt_tokens_per_s, model.output_tokens_per_s) == (500.0, 25.0)
    assert (model.retries_per_s, model.resumes_per_s) == (0.5, 0.5)
    assert (model.num_in_flight, model.num_held) == (3, 2)
    assert model.ttft_p50_s == pytest.approx(0.175)
    assert model.itl_p99_s == pytest.approx(0.001 + 0.0015 * 0.99)
    assert view.models[1].ttft_p50_s is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3))
def test_processes_add_up(counts: list[tuple[int, int]]) -> None:
    processes = [PrometheusMetrics() for _ in counts]
    for metrics, (first, _) in zip(processes, counts, strict=True):
        work(metrics, 1 + first)
    before = look(0.0, *processes)
    for metrics, (_, then) in zip(processes, counts, strict=True):
        work(metrics, then)
    view = top(before, look(2.0, *processes))
    assert view.num_processes == len(counts)
    assert view.models[0].requests_per_s == pytest.approx(2 * sum(then for _, then in counts))


def test_a_process_that_was_at_rest_is_known_by_its_first_count() -> None:
    metrics = PrometheusMetrics()
    before = look(0.0, metrics)
    work(metrics)
    assert top(before, look(1.0, metrics)).models[0].requests_per_s == 4.0


def test_a_process_that_began_anew_has_no_rates_yet() -> None:
    old, new = PrometheusMetrics(), PrometheusMetrics()
    work(old, 9)
    work(new)
    view = top(look(0.0, old), look(1.0, new))
    assert (view.interval_s, view.num_processes, view.num_missed) == (0.0, 0, 2)
    assert view.models[0].requests_per_s == 0.0
    assert "no rates yet" in drawn(view)


def test_those_turned_away_at_the_door_have_a_row() -> None:
    metrics = PrometheusMetrics()
    before = look(0.0, metrics)
    metrics.inc("ernie_request_refused_total", 4, model="unknown", reason="unauthorized")
    stranger = top(before, look(2.0, metrics)).models[-1]
    assert (stranger.name, stranger.requests_per_s, stranger.refused_per_s) == ("unknown", 2.0, 2.0)


def test_pools_add_up_their_replicas() -> None:
    prefill = top(look(0.0), look(1.0)).pools[1]
    assert (prefill.home, prefill.num_ready, prefill.num_replicas) == ("prefill", 2, 2)
    assert (prefill.num_running, prefill.num_waiting, prefill.waiting_tokens) == (4, 2, 4096)
    assert (prefill.used_blocks, prefill.total_blocks) == (50, 200)


@pytest.mark.parametrize(
    ("sort", "first"),
    [
        ("running", "xyz789"),
        ("waiting", "abc123"),
        ("tokens", "abc123"),
        ("kv", "xyz789"),
        ("age", "v1"),
        ("name", "v1"),
    ],
)
def test_replicas_are_sorted(sort: str, first: str) -> None:
    view = top(look(0.0), look(1.0), sort=sort)
    assert view.replicas[0].replica.endswith(first)
    assert sorted(r.replica for r in view.replicas) == sorted(r.replica for r in VIEW.replicas)


# How it is drawn


@settings(max_examples=25, deadline=None)
@given(VIEWS, st.sampled_from([80, 132]), st.sampled_from(list(SORTS)))
def test_any_view_fits_the_terminal_and_cannot_rule_it(cluster: ClusterView, width: int, sort: str) -> None:
    text = drawn(top(Look(cluster, {}), Look(cluster, {0.0: (1.0, Reading({}))}), sort=sort), width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    assert all(c == "\n" or c.isprintable() for c in text)


def test_an_example() -> None:
    metrics = PrometheusMetrics()
    before = look(100.0, metrics)
    work(metrics, 2)
    view = top(before, look(104.0, metrics, view=replace(VIEW, replicas=(PREFILL, DECODE))))
    assert lines(drawn(view, num_replicas=1)) == [
        "the last 4 s, of 1 process of the API",
        "",
        "refused failed tokens tokens TTFT p50 ITL p50 in flight retries/s",
        "model req/s /s /s in/s out/s p99 p99 held resumes/s",
        "org/m 2.0 0.50 0 500 25 175 ms 1.8 ms 3 0.50",
        "248 ms 2.5 ms 2 0.50",
        "asleep (not ready) 0.0 0 0 0 0 - - 0 0",
        "- - 0 0",
        "",
        "pool ready KV used run wait tokens",
        "org/m/prefill 1 of 1 ###..... 40% 3 2 4,096",
        "org/m/decode 0 of 1 #######. 90% 7 0 0",
        "",
        "replica role phase KV used run wait tokens age node",
        "xyz789 decode draining #######. 90% 7 0 0 0.3 s node-2",
        "and 1 more; --num shows them",
    ]


# The command, against the API itself


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    metrics = PrometheusMetrics()
    found = Site(metrics=metrics)
    monkeypatch.setattr(command, "connect", lambda args: found.cluster())
    monkeypatch.setattr(command.time, "sleep", lambda _: work(metrics))
    return found


def test_json_is_one_interval(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--json"]) == 0
    view = view_of(TopView, capsys.readouterr().out.encode())
    assert view.models[0].requests_per_s * view.interval_s == pytest.approx(4)
    assert view.replicas[0].replica == DECODE.replica


def test_once_into_a_pipe_is_plain_text(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--sort", "name", "--num", "1"]) == 0
    out = capsys.readouterr().out
    assert "and 4 more" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("argv", [["--sort", "best"], ["--num", "-1"], ["--num", "x"], ["--interval", "0"]])
def test_wrong_options_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", *argv])


def test_another_server_is_said(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PrometheusMetrics, "render", lambda self: b"<html> {")
    assert main(["top", "--once"]) == 2
    assert "/metrics is no text of Prometheus'" in capsys.readouterr().err


def watched(terminal: str, *changes: Callable[[FakeBackend, PrometheusMetrics], object]) -> str:
    """What comes out when each pause brings a change, and the last one Ctrl-C."""
    metrics, left, now = PrometheusMetrics(), list(changes), [0.0]
    site = Site(metrics=metrics)

    def pause(interval_s: float) -> None:
        if not left:
            raise KeyboardInterrupt
        now[0] += interval_s
        left.pop(0)(site.backend, metrics)

    out = io.StringIO()
    console = Console(
        file=out, width=100, height=60, force_terminal=True, color_system=None, _environ={"TERM": terminal}
    )
    assert command.watch(site.cluster(), console, 2.0, "running", 3, clock=lambda: now[0], pause=pause) == 0
    return out.getvalue()


CHANGES: list[Callable[[FakeBackend, PrometheusMetrics], object]] = [
    lambda backend, metrics: work(metrics, 1),
    lambda backend, metrics: setattr(backend, "cluster_news", ReplicaLost("gone")),
    lambda backend, metrics: (setattr(backend, "cluster_news", VIEW), work(metrics, 3)),
]


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_watching_outlives_a_server_that_is_away(terminal: str) -> None:
    text = watched(terminal, *CHANGES)
    order = [text.index(words) for words in ("the last 2 s", "not up to date: http://site", "the last 4 s")]
    assert order == sorted(order)
    assert ("\x1b" in text) == (terminal == "xterm")


def test_watching_what_is_not_there_from_the_start_is_an_error() -> None:
    site = Site()
    site.backend.cluster_news = ReplicaLost("gone")
    with pytest.raises(ErnieClusterError, match="cannot tell now"):
        command.watch(site.cluster(), Console(file=io.StringIO()), 2.0, "running", 3)
