"""Dashboards name what is there, and are laid out as Grafana wants them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args

import pytest

from ernie_cluster.errors import ConfigError
from ernie_cluster.render.watch.outputs import BOARDS, config_map, dashboards
from ernie_cluster.render.watch.panels import COLUMNS, Board, Unit, dashboard
from tests.unit.render.watch.reading import faults, known

LARGEST = 256 * 1024
"""Bytes that `kubectl apply` can keep of an object."""


@pytest.mark.parametrize("board", BOARDS, ids=lambda b: b.uid)
def test_queries_name_what_the_product_shows(board: Board) -> None:
    found = {f"{p.title}: {f}" for p in board.panels for q in p.queries for f in faults(q.expr, legend=q.legend)}
    assert found == set()
    assert "model" in known()[board.models_of]


@pytest.mark.parametrize("board", BOARDS, ids=lambda b: b.uid)
def test_dashboards_are_laid_out_without_gaps_and_overlaps(board: Board) -> None:
    panels = dashboard(board)["panels"]
    assert [p["id"] for p in panels] == list(range(1, len(panels) + 1))
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    bottom = max(y for _, y in taken) + 1
    assert len(taken) == COLUMNS * bottom


@pytest.mark.parametrize("board", BOARDS, ids=lambda b: b.uid)
def test_graphs_have_units_words_and_the_chosen_source(board: Board) -> None:
    document = dashboard(board)
    assert [v["name"] for v in document["templating"]["list"]] == ["datasource", "model"]
    for graph in (p for p in document["panels"] if p["type"] != "row"):
        assert graph["fieldConfig"]["defaults"]["unit"] in get_args(Unit), graph["title"]
        assert graph["description"].endswith("."), graph["title"]
        refs = [t["refId"] for t in graph["targets"]]
        assert len(set(refs)) == len(refs) > 0, graph["title"]
        for source in (graph["datasource"], *(t["datasource"] for t in graph["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}, graph["title"]


def test_boards_can_be_told_apart() -> None:
    assert len({b.uid for b in BOARDS}) == len({b.title for b in BOARDS}) == len(BOARDS)
    board = BOARDS[0]
    with pytest.raises(ConfigError, match="twice"):
        dashboard(dataclasses.replace(board, rows=board.rows * 2))


def test_the_config_map_has_the_same_and_can_be_applied() -> None:
    data: dict[str, Any] = config_map()["data"]
    assert {name: json.loads(text) for name, text in data.items()} == dashboards()
    assert len(json.dumps(config_map())) < LARGEST
