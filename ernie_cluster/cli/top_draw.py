"""A `TopView` for people: tables for rich, which fits them to the terminal. Pure: reads no clock."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ernie_cluster.api.operator import ReplicaView
from ernie_cluster.cli.cells import bare_table, clean, duration, kv_bar, latency, number, plain
from ernie_cluster.cli.operate import short_name
from ernie_cluster.cli.top_view import ModelTop, PoolTop, TopView

NUM_REPLICAS = 10

_NAME_CHARS = 12


def render(view: TopView, *, num_replicas: int = NUM_REPLICAS) -> RenderableType:
    """Models, pools, and the busiest replicas.

    Args:
        view: of one interval.
        num_replicas: to show; of the others only the number is told.
    """
    parts: list[RenderableType] = [_headline(view), Text(), _models(view.models), Text(), _pools(view.pools)]
    shown = view.replicas[:num_replicas]
    if shown:
        parts += [Text(), _replicas(shown)]
    if len(view.replicas) > len(shown):
        parts.append(Text(f"and {len(view.replicas) - len(shown):,} more; --num shows them", style="dim"))
    return Group(*parts)


def _headline(view: TopView) -> Text:
    if not view.interval_s:
        return Text("no rates yet: no process of the API answered twice", style="yellow")
    processes = f"{view.num_processes} process" + ("" if view.num_processes == 1 else "es")
    text = Text(f"the last {duration(view.interval_s)}", style="bold")
    text.append(f", of {processes} of the API", style="not bold")
    if view.num_missed:
        text.append(f"; {view.num_missed} answered one look only, their part is missing", style="yellow not bold")
    return text


def _models(models: Sequence[ModelTop]) -> Table:
    left = ("model", "req/s", "refused\n/s", "failed\n/s", "tokens\nin/s", "tokens\nout/s")
    names = (*left, "TTFT p50\np99", "ITL p50\np99", "in flight\nheld", "retries/s\nresumes/s")
    table = bare_table(names, (False, *[True] * (len(names) - 1)))
    for m in models:
        name = plain(m.name) if m.is_ready else Text(f"{clean(m.name)} (not ready)", style="bold red")
        table.add_row(
            name,
            f"{m.requests_per_s:.1f}",
            Text(_rate(m.refused_per_s), style="yellow" if m.refused_per_s else ""),
            Text(_rate(m.failed_per_s), style="bold red" if m.failed_per_s else ""),
            number(m.prompt_tokens_per_s),
            number(m.output_tokens_per_s),
            f"{latency(m.ttft_p50_s)}\n{latency(m.ttft_p99_s)}",
            f"{_fine(m.itl_p50_s)}\n{_fine(m.itl_p99_s)}",
            f"{number(m.num_in_flight)}\n{number(m.num_held)}",
            f"{_rate(m.retries_per_s)}\n{_rate(m.resumes_per_s)}",
        )
    return table


def _pools(pools: Sequence[PoolTop]) -> Table:
    names = ("pool", "ready", "KV used", "run", "wait", "tokens")
    table = bare_table(names, (False, True, False, True, True, True))
    for p in pools:
        is_whole = p.num_ready == p.num_replicas
        table.add_row(
            plain(f"{p.model}/{p.home}"),
            Text(f"{p.num_ready:,} of {p.num_replicas:,}", style="" if is_whole else "yellow"),
            kv_bar(p.used_blocks, p.total_blocks),
            number(p.num_running),
            Text(number(p.num_waiting), style="yellow" if p.num_waiting else ""),
            number(p.waiting_tokens),
        )
    return table


def _replicas(replicas: Sequence[ReplicaView]) -> Table:
    names = ("replica", "role", "phase", "KV used", "run", "wait", "tokens", "age")
    table = bare_table(names, (False, False, False, False, True, True, True, True))
    table.add_column("node", overflow="ellipsis", no_wrap=True)
    for r in replicas:
        name = clean(short_name(r.replica))
        table.add_row(
            name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…",
            r.role,
            r.phase,
            kv_bar(r.total_blocks - r.free_blocks, r.total_blocks),
            number(r.num_running),
            number(r.num_waiting),
            number(r.waiting_tokens),
            duration(r.age_s),
            plain(r.node or "-"),
        )
    return table


def _rate(value: float) -> str:
    """Seldom things, of which a few count."""
    return f"{value:.2f}" if value else "0"


def _fine(seconds: float | None) -> str:
    """A gap between tokens, which may be shorter than a millisecond."""
    return f"{seconds * 1000:.1f} ms" if seconds is not None and seconds < 0.1 else latency(seconds)
