"""`ernie-cluster doctor`: what it reads, whom it asks, what it prints, and its exit code."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ernie_cluster.actors import checkup
from ernie_cluster.cli import doctor
from ernie_cluster.cli.doctor_view import render
from ernie_cluster.cli.main import main
from ernie_cluster.doctor.checks import CHECKS
from ernie_cluster.doctor.facts import Clock, Cpu, Gpus, Link, Memory, Missing, Node, OpenFiles, Program
from ernie_cluster.doctor.finding import Finding
from ernie_cluster.doctor.need import Need
from ernie_cluster.errors import ConfigError
from tests.tiny import tiny_folder

GIB = 1 << 30
WELL = {
    "cpu": Cpu("Xeon", 8, frozenset({"amx_bf16"})),
    "gpus": Gpus((), "no driver"),
    "haproxy": Program("/usr/sbin/haproxy", "HAProxy version 2.8"),
    "memory": Memory(64 * GIB, 60 * GIB),
    "open_files": OpenFiles(1024, 65_536),
}
ONLY = "cpu,gpus,haproxy,memory,open_files"


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of this machine; what is put here is found."""
    found: dict[str, Any] = dict(WELL)

    def gather(names: Collection[str], need: Need) -> dict[str, Any]:
        return {name: found.get(name, Missing("not in this test")) for name in names}

    monkeypatch.setattr(doctor, "gather", gather)
    for name in [name for name in doctor.os.environ if name.startswith("ERNIE__")]:
        monkeypatch.delenv(name)
    return found


def findings(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[Finding]]:
    code = main(["doctor", "--json", *argv])
    return code, [Finding(**row) for row in json.loads(capsys.readouterr().out)]


def tiny(tmp_path: Path, path: str) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(f"models: [{{preset: tiny, path: {path}}}]", encoding="utf-8")
    return str(file)


def test_a_machine_that_is_well(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(["--only", ONLY], capsys)
    assert code == 0
    assert [(f.check, f.level) for f in found] == [
        ("cpu", "ok"),
        ("gpus", "skipped"),
        ("haproxy", "ok"),
        ("open_files", "ok"),
        ("memory", "ok"),
    ]


def test_a_problem_is_the_exit_code_and_has_its_remedy(
    facts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    facts["haproxy"] = Program("", "")
    assert main(["doctor", "--only", "haproxy,cpu"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "ok cpu Xeon, 8 cores, amx_bf16",
        "problem haproxy not found",
        "should be: an executable, for Serve's proxy",
        'remedy: pip install "ray[serve]", which brings one, or the system\'s package haproxy',
        "",
        "1 ok, 1 problem",
    ]


def test_every_check_says_something_when_nothing_can_be_found(
    facts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    facts.clear()
    code, found = findings([], capsys)
    assert code == 0
    assert {f.check for f in found} == {check.name for check in CHECKS if check.scope != "cluster"}
    assert {f.level for f in found} == {"skipped"}


def test_a_configuration_is_held_against_checkpoint_and_machine(
    facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [tiny(tmp_path, tiny_folder()), "--only", "config,memory,plan"]
    code, found = findings(argv, capsys)
    assert (code, [f.level for f in found]) == (0, ["ok", "ok", "ok"])
    facts["memory"] = Memory(GIB // 64, GIB // 64)
    code, found = findings(argv, capsys)
    assert (code, [f.level for f in found]) == (1, ["ok", "problem", "problem"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("models: []", "models is empty"),
        ("models: [{preset: tiny, path: /no/such/folder}]", "/no/such/folder/config.json: not found"),
        ("api: {prot: 1}", "prot"),
        (None, "c.yaml"),
    ],
)
def test_a_broken_configuration_is_a_finding_and_the_rest_is_checked(
    content: str | None, words: str, facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    code, found = findings([str(file), "--only", "config,cpu,plan"], capsys)
    assert code == 1
    assert [f.check for f in found] == ["config", "cpu", "plan"]
    assert words in found[0].seen
    assert (found[0].level, bool(found[0].remedy)) == ("problem", True)


def test_a_pool_that_its_model_cannot_have_is_a_finding(
    facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [tiny(tmp_path, tiny_folder()), "--set", "models.0.pools.1.tp=3", "--only", "config,memory,plan"]
    code, found = findings(argv, capsys)
    assert code == 1
    assert [(f.check, f.level) for f in found] == [("config", "problem"), ("memory", "ok"), ("plan", "skipped")]


@pytest.mark.parametrize("only", ["cpuu", ",", "cpu,everything"])
def test_checks_that_there_are_not(only: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--only", only])
    assert "--only" in capsys.readouterr().err


def test_the_list_has_all_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [check.name for check in CHECKS]


# A cluster


FIRST, SECOND = Node("1", "10.0.0.1", 0.0), Node("2", "10.0.0.2", 0.0)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[Node, dict[str, Any]]:
    """Two nodes that are well."""
    nodes: dict[Node, dict[str, Any]] = {FIRST: dict(WELL), SECOND: dict(WELL)}

    def between(names: Collection[str], need: Need, asked: list[Node]) -> dict[str, Any]:
        told = {
            "nodes": asked,
            "labels": (),
            "clocks": [Clock(node.name, 0.02, 0.001) for node in asked],
            "links": [Link(FIRST.name, SECOND.name, 0.0001, 1e9)],
            "nccl_links": [],
        }
        return {name: told[name] for name in names}

    calls: list[str] = []
    monkeypatch.setattr(checkup, "connect", calls.append)
    monkeypatch.setattr(checkup, "disconnect", lambda: calls.append("end"))
    monkeypatch.setattr(checkup, "facts_of_nodes", lambda names, need: nodes)
    monkeypatch.setattr(checkup, "facts_between", between)
    return nodes


def test_every_node_is_named_in_its_findings(
    cluster: dict[Node, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster[SECOND]["haproxy"] = Program("", "")
    code, found = findings(["--cluster", "--only", "haproxy,clocks,links,nodes,nccl_links"], capsys)
    assert code == 1
    assert [(f.check, f.level, f.node) for f in found] == [
        ("haproxy", "ok", "10.0.0.1"),
        ("haproxy", "problem", "10.0.0.2"),
        ("nodes", "ok", "10.0.0.1"),
        ("nodes", "ok", "10.0.0.2"),
        ("clocks", "ok", "10.0.0.1"),
        ("clocks", "ok", "10.0.0.2"),
        ("links", "ok", "10.0.0.1 and 10.0.0.2"),
        ("nccl_links", "skipped", ""),
    ]


def test_a_node_that_runs_nothing_is_a_problem_and_the_others_are_checked(
    cluster: dict[Node, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    del cluster[SECOND]
    cluster[replace(SECOND, error="No module named 'ernie_cluster'")] = {"cpu": Missing("nothing runs there")}
    code, found = findings(["--address", "10.0.0.1:6379", "--only", "cpu,nodes"], capsys)
    assert code == 1
    assert [(f.check, f.level, f.node) for f in found] == [
        ("cpu", "ok", "10.0.0.1"),
        ("nodes", "ok", "10.0.0.1"),
        ("nodes", "problem", "10.0.0.2"),
    ]


def test_memory_of_all_nodes_counts_for_the_plan(
    cluster: dict[Node, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [tiny(tmp_path, tiny_folder()), "--cluster", "--only", "plan"]
    assert findings(argv, capsys)[0] == 0
    for facts in cluster.values():
        facts["memory"] = Memory(GIB // 64, GIB // 64)
    assert findings(argv, capsys)[0] == 1


def test_no_cluster_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(address: str) -> None:
        raise ConfigError(f"no Ray cluster at {address}")

    monkeypatch.setattr(checkup, "connect", refuse)
    assert main(["doctor", "--address", "10.9.9.9:1"]) == 2
    assert "error: no Ray cluster at 10.9.9.9:1" in capsys.readouterr().err


# How it is drawn


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.builds(
            Finding,
            st.sampled_from([check.name for check in CHECKS]),
            st.sampled_from(["ok", "warning", "problem", "skipped"]),
            *[st.text("ab /[]é\x1b\n\t", max_size=30)] * 4,
        ),
        max_size=5,
    )
)
def test_any_finding_stays_on_its_lines_and_cannot_rule_the_terminal(found: list[Finding]) -> None:
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    console.print(render(found))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(c == "\n" or c.isprintable() for c in text)
    shown = [(bool(f.bound), bool(f.remedy)) if f.level in ("warning", "problem") else () for f in found]
    assert len(text.splitlines()) == len(found) + sum(map(sum, shown)) + 2
