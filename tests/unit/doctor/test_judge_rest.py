"""What is thought of checkpoints, plans and clusters, and how checks are put together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.config.presets import pocket_mixed
from ernie_cluster.config.units import GIB
from ernie_cluster.doctor import judge_cluster, judge_config
from ernie_cluster.doctor.checks import CHECKS, facts_of, judge, judge_plan
from ernie_cluster.doctor.facts import Clock, Gpus, Link, Memory, Missing, Node, OpenFiles, Stored
from ernie_cluster.doctor.finding import Finding, exit_code
from ernie_cluster.doctor.gather import GATHERERS
from ernie_cluster.doctor.need import Need
from tests.unit.doctor.test_judge_machine import (
    A100,
    H100,
    NONE,
    NOTHING,
    ON_CPU,
    SHAPE,
    V100,
    levels,
    on_gpus,
    usable,
)

NAME = pocket_mixed().models[0].name
WHOLE = Stored(NAME, "/m", 317, 1, 10**7, ())


@pytest.mark.parametrize(
    ("need", "facts", "expected"),
    [
        (NOTHING, (), ["skipped"]),
        (ON_CPU, (WHOLE,), ["ok"]),
        (
            ON_CPU,
            (replace(WHOLE, faults=("a.safetensors: truncated; download it again", "b")),),
            ["problem", "problem"],
        ),
        (ON_CPU, (), ["skipped"]),
    ],
)
def test_checkpoints(need: Need, facts: tuple[Stored, ...], expected: list[str]) -> None:
    assert levels(judge_config.checkpoints(need, facts)) == expected


LARGE = Memory(512 * GIB, 500 * GIB)


@pytest.mark.parametrize(
    ("need", "machines", "expected"),
    [
        (NOTHING, [(NONE, LARGE)], "skipped"),
        (ON_CPU, [(NONE, LARGE)], "skipped"),  # the shape is not known
        (replace(ON_CPU, shapes={NAME: SHAPE}), [(NONE, LARGE)], "ok"),
        (replace(ON_CPU, shapes={NAME: SHAPE}), [(NONE, Memory(GIB, GIB))], "problem"),
        (on_gpus(), [(usable(H100), LARGE)], "ok"),
        (on_gpus(num_replicas=2), [(usable(H100), LARGE)], "problem"),
        (on_gpus(num_replicas=2), [(usable(H100), LARGE), (usable(A100), LARGE)], "ok"),
        (on_gpus(), [(NONE, LARGE)], "skipped"),
        (on_gpus(), [(usable(V100), LARGE)], "skipped"),
        (on_gpus(), [(usable(replace(H100, memory_bytes=10 * GIB)), LARGE)], "skipped"),  # a part of one
    ],
)
def test_plan(need: Need, machines: list[tuple[Gpus, Memory]], expected: str) -> None:
    assert levels(judge_config.plan(need, *zip(*machines, strict=True))) == [expected]


@pytest.mark.parametrize(
    ("card", "kind"),
    [
        (H100, "h100-80g"),
        (A100, "a100-80g"),
        (replace(A100, memory_bytes=40_960 << 20), "a100-40g"),
        (replace(H100, name="NVIDIA H200", memory_bytes=143_771 << 20), "h200-141g"),
        (replace(H100, name="NVIDIA GeForce RTX 4090", memory_bytes=24_564 << 20), "rtx4090-24g"),
        (V100, None),
    ],
)
def test_kinds_are_known_by_name_and_memory(card: Any, kind: str | None) -> None:
    found = judge_config.kind_of(card)
    assert (found and found.name) == kind


@pytest.mark.parametrize(
    ("ahead_s", "error_s", "expected"),
    [(0.0, 0.001, "ok"), (-0.3, 0.01, "warning"), (0.3, 0.2, "ok"), (60.0, 0.01, "problem"), (-6.0, 0.01, "problem")],
)
def test_clocks(ahead_s: float, error_s: float, expected: str) -> None:
    (finding,) = judge_cluster.clocks(NOTHING, [Clock("10.0.0.2", ahead_s, error_s)])
    assert (finding.level, finding.node, bool(finding.remedy)) == (expected, "10.0.0.2", expected != "ok")


@pytest.mark.parametrize(
    ("judge_links", "link", "expected"),
    [
        (judge_cluster.links, None, "skipped"),
        (judge_cluster.links, Link("a", "b", 0.0002, 1e9), "ok"),
        (judge_cluster.links, Link("a", "b", 0.0002, 1e8), "warning"),
        (judge_cluster.links, Link("a", "b", 0.02, 1e9), "warning"),
        (judge_cluster.links, Link("a", "b", error="refused"), "problem"),
        (judge_cluster.nccl_links, None, "skipped"),
        (judge_cluster.nccl_links, Link("a", "b", bytes_per_s=2e10), "ok"),
        (judge_cluster.nccl_links, Link("a", "b", bytes_per_s=1e9), "warning"),
        (judge_cluster.nccl_links, Link("a", "b", error="the sum is wrong"), "problem"),
        (judge_cluster.nccl_links, Link("a", "b", untried="no free GPU"), "skipped"),
    ],
)
def test_links(judge_links: Any, link: Link | None, expected: str) -> None:
    assert levels(judge_links(NOTHING, [] if link is None else [link])) == [expected]


def test_nodes_that_cannot_run_us_are_named_and_too_few_gpus_told() -> None:
    nodes = [Node("1", "10.0.0.1", 1.0), Node("2", "10.0.0.2", 0.0, "No module named 'ernie_cluster'")]
    assert levels(judge_cluster.nodes(on_gpus(), nodes)) == ["ok", "problem"]
    assert levels(judge_cluster.nodes(on_gpus(num_replicas=2), nodes)) == ["ok", "problem", "problem"]


def test_labels() -> None:
    assert levels(judge_cluster.labels(NOTHING, ())) == ["skipped"]
    assert levels(judge_cluster.labels(ON_CPU, ())) == ["ok"]
    assert levels(judge_cluster.labels(ON_CPU, [("pool decode", ("zone=a",))])) == ["problem"]


@given(st.integers(0, 40))
def test_every_node_is_tried_and_large_clusters_in_as_many_steps(num: int) -> None:
    names = [f"n{i:02}" for i in range(num)]
    pairs = judge_cluster.pairs_of(names)
    assert all(a != b for a, b in pairs)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) <= max(num, 15)
    assert {name for pair in pairs for name in pair} == set(names if num > 1 else [])


# How checks are put together


def test_names_are_unique_and_what_machines_are_asked_can_be_gathered() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert facts_of("machine", names) | facts_of("all", names) == GATHERERS.keys()


def test_a_fact_that_is_missing_skips_its_checks_alone() -> None:
    facts = {"open_files": OpenFiles(1024, 1024), "memory": Missing("no /proc"), "shm": Missing("gone")}
    found = list(judge("machine", {"open_files", "memory", "shm"}, NOTHING, facts, "10.0.0.3"))
    assert [(f.check, f.level, f.node) for f in found] == [
        ("shm", "skipped", "10.0.0.3"),
        ("open_files", "warning", "10.0.0.3"),
        ("memory", "skipped", "10.0.0.3"),
    ]


def test_without_cupy_it_depends_on_the_gpus() -> None:
    missing = Missing("cupy is not installed")
    assert levels(judge("machine", {"nccl"}, NOTHING, {"nccl": missing, "gpus": usable(H100)})) == ["warning"]
    assert levels(judge("machine", {"nccl"}, NOTHING, {"nccl": missing, "gpus": Missing("late")})) == ["skipped"]


def test_a_machine_that_does_not_tell_leaves_the_plan_open() -> None:
    told = {"gpus": NONE, "memory": LARGE}
    need = replace(ON_CPU, shapes={NAME: SHAPE})
    assert levels(judge_plan(need, [told])) == ["ok"]
    assert levels(judge_plan(need, [told, {"gpus": NONE, "memory": Missing("late")}])) == ["skipped"]


@pytest.mark.parametrize(("found", "code"), [([], 0), (["ok", "warning", "skipped"], 0), (["ok", "problem"], 1)])
def test_only_problems_count(found: Iterable[Any], code: int) -> None:
    assert exit_code([Finding("x", level, "y") for level in found]) == code
