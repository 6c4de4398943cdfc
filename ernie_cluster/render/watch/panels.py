"""A Grafana dashboard from few words: boards of rows of panels of queries. Knows no metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ernie_cluster.errors import ConfigError

SCHEMA_VERSION = 39
"""Of dashboards, as Grafana 10.4 writes them; later ones read it."""
COLUMNS = 24
"""Of Grafana's grid."""
_HEIGHT = 8
_PER_LINE = 3
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Unit = Literal["short", "s", "reqps", "cps", "Bps", "percentunit", "none"]
"""Grafana's ids: a number, seconds, requests and events per second, bytes per second, a part of 1, a plain number."""


@dataclass(frozen=True, slots=True)
class Query:
    """One line, or one per set of labels."""

    expr: str
    """PromQL; `$model` is the chosen models as a regular expression."""
    legend: str
    """With `{{label}}` where it differs from line to line."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph over time."""

    title: str
    text: str
    """What it shows, and what to think of it."""
    unit: Unit
    queries: Sequence[Query]
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard."""

    uid: str
    """Stays the same from version to version, so that links and imports find it."""
    title: str
    text: str
    rows: Sequence[Row]
    models_of: str
    """Metric whose `model` label has all that may be chosen."""

    @property
    def panels(self) -> Sequence[Panel]:
        return [panel for row in self.rows for panel in row.panels]


def dashboard(board: Board) -> Mapping[str, Any]:
    """As Grafana imports it; raises ConfigError where two panels have one title, for nobody could tell them apart."""
    titles = [panel.title for panel in board.panels]
    if len(set(titles)) < len(titles):
        raise ConfigError(f"dashboard {board.title!r}: {titles} names a panel twice; give each its own title")
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.text,
        "tags": ["ernie-cluster"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source_variable(), _model_variable(board.models_of)]},
        "annotations": {"list": []},
        "links": [_other_boards()],
        "panels": _laid_out(board.rows),
    }


def _laid_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """From top to bottom, three in a line, the last line filled; ids count from 1."""
    found: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        top += 1
        for i in range(0, len(row.panels), _PER_LINE):
            line = row.panels[i : i + _PER_LINE]
            width = COLUMNS // len(line)
            for j, panel in enumerate(line):
                place = {"x": j * width, "y": top, "w": width, "h": _HEIGHT}
                found.append({"id": len(found) + 1, **_graph(panel), "gridPos": place})
            top += _HEIGHT
    return found


def _graph(panel: Panel) -> dict[str, Any]:
    style: dict[str, Any] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
    style["stacking"] = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": style}
    if panel.unit == "percentunit":
        defaults["max"] = 1
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": q.expr, "legendFormat": q.legend, "range": True}
            for i, q in enumerate(panel.queries)
        ],
    }


def _source_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "refresh": 1,
    }


def _model_variable(metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "model"},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _other_boards() -> dict[str, Any]:
    return {
        "title": "ernie_cluster",
        "type": "dashboards",
        "tags": ["ernie-cluster"],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
    }
