"""A view of the cluster for people: tables for rich, which fits them to the terminal. Pure: reads no clock."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ernie_cluster.api.operator import ClusterView, DecisionView, ModelView, Phase, ReplicaView
from ernie_cluster.cli.cells import bare_table, clean, duration, kv_bar, latency, number, plain
from ernie_cluster.cli.operate import short_name

ROWS_PER_POOL = 8
NUM_DECISIONS = 5

_NAME_CHARS = 12
"""Of a replica; as much of it as is shown names it in an order, too."""
_PHASES: dict[Phase, str] = {"ready": "green", "starting": "cyan", "switching": "magenta", "draining": "yellow"}
"""Phase -> colour."""
_COLUMNS = ("replica", "role", "phase", "KV used", "run", "wait", "tokens", "age")
_IS_RIGHT = (False, False, False, False, True, True, True, True)


def render(view: ClusterView, now_s: float, *, rows_per_pool: int | None = ROWS_PER_POOL) -> RenderableType:
    """Models, pools, and what was decided lately.

    Args:
        view: of one moment.
        now_s: Unix time, for ages.
        rows_per_pool: of further replicas only the number is told, those that are not just ready come first; None
            shows all.
    """
    parts: list[RenderableType] = [_headline(view), Text(), _models(view.models)]
    parts += _remarks(view)
    parts += _pools(view.replicas, rows_per_pool)
    if view.decisions:
        parts += [Text(), Text("last decisions", style="bold"), _decisions(view.decisions[:NUM_DECISIONS], now_s)]
    return Group(*parts)


def _headline(view: ClusterView) -> Text:
    text = Text(f"used {view.used:g} of {view.budget:g} {view.budget_unit}", style="bold")
    phases = Counter(replica.phase for replica in view.replicas)
    counts = ", ".join(f"{phases[phase]:,} {phase}" for phase in _PHASES if phases[phase])
    text.append(", autoscaled" if view.is_autoscaled else ", not autoscaled", style="not bold")
    text.append(f"; {_replicas(len(view.replicas))}" + (f": {counts}" if counts else ""), style="not bold")
    return text


def _models(models: Sequence[ModelView]) -> Table:
    table = bare_table(
        ("model", "ready", "req/s", "tokens\nin/s", "tokens\nout/s", "TTFT\np90", "TPOT\np90", "held"),
        (False, False, True, True, True, True, True, True),
    )
    for model in models:
        table.add_row(
            plain(model.name),
            Text("yes", style="green") if model.is_ready else Text("no", style="bold red"),
            f"{model.requests_per_s:.1f}",
            number(model.prompt_tokens_per_s),
            number(model.output_tokens_per_s),
            latency(model.ttft_p90_s),
            latency(model.tpot_p90_s),
            Text(number(model.num_held), style="yellow" if model.num_held else ""),
        )
    return table


def _remarks(view: ClusterView) -> Iterator[Text]:
    """What a model waits for, and what it has of what it needs."""
    for model in view.models:
        if not model.is_ready:
            yield Text(f"{clean(model.name)}: {clean(model.detail) or 'not ready'}", style="red")
        if not model.needs:
            continue
        mine = [r for r in view.replicas if r.model == model.name]
        text = Text(f"{clean(model.name)} has ")
        for i, (role, need) in enumerate(sorted(model.needs.items())):
            phases = Counter(r.phase for r in mine if r.role == role)
            num = phases["ready"] + phases["switching"]
            coming = f" (and {phases['starting']} starting)" if phases["starting"] else ""
            text.append(", " if i else "")
            text.append(f"{num}{coming} of {need:.1f} {clean(role)}", style="yellow" if num < need else "green")
        yield text


def _pools(replicas: Iterable[ReplicaView], rows_per_pool: int | None) -> Iterator[RenderableType]:
    pools: dict[tuple[str, str], list[ReplicaView]] = {}
    for replica in replicas:
        pools.setdefault((replica.model, replica.home), []).append(replica)
    shown = {pool: _first(members, rows_per_pool) for pool, members in pools.items()}
    rows = {pool: [_row(replica) for replica in some] for pool, some in shown.items()}
    widths = [
        max([len(name), *(row[i].cell_len for row in itertools.chain(*rows.values()))])
        for i, name in enumerate(_COLUMNS)
    ]
    for (model, home), members in pools.items():
        yield Text()
        yield Text(f"{clean(model)}, {home} pool: {_replicas(len(members))}", style="bold")
        table = bare_table(_COLUMNS, _IS_RIGHT, widths)
        table.add_column("node", overflow="ellipsis")
        for replica, row in zip(shown[model, home], rows[model, home], strict=True):
            table.add_row(*row, plain(replica.node or "-"))
        yield table
        rest = Counter(r.phase for r in members) - Counter(r.phase for r in shown[model, home])
        if rest:
            counts = ", ".join(f"{num:,} {phase}" for phase, num in rest.items())
            yield Text(f"and {rest.total():,} more ({counts}); --all shows them", style="dim")


def _first(members: Sequence[ReplicaView], num: int | None) -> list[ReplicaView]:
    """The most telling ones: those that are not just ready, then by the order in the view."""
    return sorted(members, key=lambda r: r.phase == "ready")[:num]


def _row(replica: ReplicaView) -> list[Text]:
    """Cells of `_COLUMNS`."""
    name = clean(short_name(replica.replica))
    return [
        Text(name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 1] + "…"),
        Text(replica.role, style="" if replica.role == replica.home else "magenta"),
        Text(replica.phase, style=_PHASES[replica.phase]),
        kv_bar(replica.total_blocks - replica.free_blocks, replica.total_blocks),
        Text(number(replica.num_running)),
        Text(number(replica.num_waiting)),
        Text(number(replica.waiting_tokens)),
        Text(duration(replica.age_s)),
    ]


def _decisions(decisions: Sequence[DecisionView], now_s: float) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for decision in decisions:
        what = Text(clean(decision.detail))
        what.append(f": {clean(decision.reason)}" if decision.reason else "", style="dim")
        age = duration(now_s - decision.at_s)
        table.add_row(
            Text(f"{age} ago", justify="right", no_wrap=True), plain(decision.model), plain(decision.action), what
        )
    return table


def _replicas(num: int) -> str:
    return f"{num:,} replica" + ("" if num == 1 else "s")
