"""Reads PromQL as far as its metrics and labels go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ernie_cluster
from ernie_cluster.observe.metrics import METRICS
from ernie_cluster.render.watch.objectives import recording_rules

_METRIC = re.compile(r"\b((?:model:)?ernie_\w+(?::\w+)?)(?:\{([^}]*)\})?")
_GROUPED = re.compile(r"\bby \(([^)]*)\) \(")
PACKAGE = Path(ernie_cluster.__file__).parent
ALWAYS = {"ernie_open_promises"}
"""Without labels, so that it is there from a process's first moment."""
OF_SCRAPE = {"instance", "job"}
"""Labels that Prometheus adds."""


@dataclass(frozen=True)
class Selector:
    """One metric in an expression."""

    name: str
    labels: frozenset[str]
    """That are matched."""


@cache
def recorded() -> frozenset[str]:
    """Metrics that some code of the product names beside the table: the others have a row in it and no values."""
    places = (
        p for p in PACKAGE.rglob("*.py") if p.name != "metrics.py" and "render" not in p.parts and p.name != "zeros.py"
    )
    return frozenset(name for p in places for name in re.findall(r'"(ernie_\w+)"', p.read_text(encoding="utf-8")))


def known() -> dict[str, frozenset[str]]:
    """Series name -> labels, of all that the product shows and of what rules record."""
    found: dict[str, frozenset[str]] = {}
    for metric in METRICS:
        if metric.name not in recorded() and metric.name not in ALWAYS:
            continue
        labels = frozenset(metric.labels)
        if metric.kind == "histogram":
            found |= {f"{metric.name}_{part}": labels for part in ("count", "sum")}
            found[f"{metric.name}_bucket"] = labels | {"le"}
        else:
            found[metric.name] = labels
    return found | {rule["record"]: frozenset({"model"}) for rule in recording_rules()}


def selectors(expr: str) -> list[Selector]:
    return [
        Selector(name, frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)))
        for name, inside in _METRIC.findall(expr)
    ]


def groups(expr: str) -> Iterator[tuple[frozenset[str], list[Selector]]]:
    """(labels, metrics within) of each `by (labels) (...)`."""
    for match in _GROUPED.finditer(expr):
        labels = frozenset(filter(None, re.split(r"[,\s]+", match[1])))
        yield labels, selectors(_within(expr, match.end()))


def faults(expr: str, *, legend: str = "") -> list[str]:
    """What an expression, or the legend of its lines, names and is not there."""
    names, found = known(), []
    used = selectors(expr)
    if not used:
        return [f"no metric of ours in {expr}"]
    unknown = [s.name for s in used if s.name not in names]
    if unknown:
        return [f"no metric {name}" for name in unknown]
    for selector in used:
        found += [f"{selector.name} has no label {label}" for label in selector.labels - names[selector.name]]
    for labels, inner in groups(expr):
        for selector in inner:
            found += [f"{selector.name} has no label {label}" for label in labels - names[selector.name] - OF_SCRAPE]
    kept = min((labels for labels, _ in groups(expr)), key=len, default=names[used[0].name])
    for label in re.findall(r"\{\{(\w+)\}\}", legend):
        if label not in kept:
            found.append(f"the legend names {label}, and lines have {sorted(kept)}")
    return found


def _within(expr: str, start: int) -> str:
    """Up to the parenthesis that closes the one before `start`."""
    depth = 1
    for i in range(start, len(expr)):
        depth += {"(": 1, ")": -1}.get(expr[i], 0)
        if not depth:
            return expr[start:i]
    raise ValueError(f"no end of the parenthesis at {start}: {expr}")
