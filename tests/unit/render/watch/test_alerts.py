"""Alerts name what is there, say what to do, and fire when they should; the last by promtool, where it is installed."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_cluster.cli.main import main
from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.config.scaling import AutoscalerConfig
from ernie_cluster.observe.metrics import METRICS
from ernie_cluster.render.text import yaml_text
from ernie_cluster.render.watch.alerts import ALERTS, QUEUE_S, RUNBOOK, Alert, rule_groups
from ernie_cluster.render.watch.objectives import BAD, FIRST_TOKEN_S, OBJECTIVES, recording_rules
from ernie_cluster.render.watch.outputs import prometheus_files, prometheus_rule
from tests.unit.render.consistency import ROOT
from tests.unit.render.schemas import problem
from tests.unit.render.watch.reading import faults, known, selectors
from tests.unit.render.watch.worlds import HEALTHY, WORLDS, Series, World

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (prometheus)")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda a: a.name)
def test_alerts_name_what_the_product_shows(alert: Alert) -> None:
    assert faults(alert.expr) == []
    labels = set[str]().union(*(known()[s.name] for s in selectors(alert.expr)))
    assert set(re.findall(r"\$labels\.(\w+)", alert.summary + alert.description)) <= labels


def test_recorded_series_come_from_what_the_product_shows() -> None:
    assert {r["record"]: faults(r["expr"]) for r in recording_rules() if faults(r["expr"])} == {}
    buckets = {m.name: m.buckets for m in METRICS}
    assert FIRST_TOKEN_S in buckets["ernie_time_to_first_token_seconds"]
    assert QUEUE_S in buckets["ernie_queue_seconds"]
    assert len({r["record"] for r in recording_rules()}) == len(recording_rules())


def test_objectives_can_be_missed_and_their_outcomes_exist() -> None:
    from ernie_cluster.api.status import INTERNAL, TABLE

    assert set(BAD.split("|")) <= {INTERNAL.outcome, *(status.outcome for _, status in TABLE)}
    for alert in ALERTS[: 2 * len(OBJECTIVES)]:
        limits = [float(limit) for limit in re.findall(r"> ([\d.]+)", alert.expr)]
        assert len(limits) == 4, alert.name
        assert all(0 < limit < 1 for limit in limits), f"{alert.name} can never fire"


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    text = (ROOT / RUNBOOK).read_text(encoding="utf-8")
    sections = re.findall(r"^## (Ernie\w+)$", text, flags=re.M)
    assert sections == [alert.name for alert in ALERTS]
    for alert in ALERTS:
        assert alert.rule["annotations"]["runbook_url"] == f"docs/runbook.md#{alert.name.lower()}"
        section = text.partition(f"## {alert.name}\n")[2].partition("\n## ")[0]
        for part in ("**Means.**", "**Look at.**", "**Do.**"):
            assert part in section, f"{alert.name}: {part}"


def commands(text: str) -> list[list[str]]:
    """Words of each command of ours, in text and in blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ernie-cluster ")]


def test_the_runbook_names_metrics_commands_and_keys_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / RUNBOOK).read_text(encoding="utf-8")
    assert set(re.findall(r"\bernie_(?!cluster\b)[a-z0-9_]+", text)) <= set(known()) | {m.name for m in METRICS}
    found = commands(text)
    assert {words[0] for words in found} >= {"status", "undrain", "role", "plan", "upgrade"}
    for words in found:
        with pytest.raises(SystemExit):
            main([words[0], "--help"])
        told = capsys.readouterr().out
        for option in (word for word in words[1:] if word.startswith("--")):
            assert f"{option} " in told or f"{option}\n" in told or option == "--help", f"{words}: {option}"
    owners = {"api": ApiConfig, "router": RouterConfig, "scaling": AutoscalerConfig, "engine": EngineConfig}
    for owner, key in re.findall(r"`(api|router|scaling|engine)\.(\w+)", text):
        assert key in {f.name for f in dataclasses.fields(owners[owner])}, f"{owner}.{key}"


def test_rules_are_the_same_with_and_without_kubernetes() -> None:
    (plain,) = prometheus_files()["rules.yaml"][1]
    rule = dict(prometheus_rule())
    assert problem(rule) == ""
    assert rule["spec"] == plain == {"groups": rule_groups()}
    assert problem(rule | {"spec": {"groups": [{"name": "x", "rules": [{"alert": "A"}]}]}}) != ""


def call(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"


@promtool
def test_promtool_takes_the_files(tmp_path: Path) -> None:
    for name, (_, documents) in prometheus_files().items():
        (tmp_path / name).write_text(yaml_text(documents[0]), encoding="utf-8")
    call("check", "rules", tmp_path / "rules.yaml")
    call("check", "config", tmp_path / "prometheus.yaml")


def case(series: Series, at: str, expected: list[dict[str, Any]], names: str) -> dict[str, Any]:
    """One unit test of rules, in promtool's words: what fires at that time, of some alerts."""
    ask = {
        "expr": f'ALERTS{{alertstate="firing", alertname=~"{names}"}}',
        "eval_time": at,
        "exp_samples": expected,
    }
    rows = [{"series": name, "values": values} for name, values in series.items()]
    return {"interval": "1m", "input_series": rows, "promql_expr_test": [ask]}


def cases(alert: Alert, world: World) -> list[dict[str, Any]]:
    labels = {"alertname": alert.name, "alertstate": "firing", "severity": alert.severity, **world.labels}
    inside = ", ".join(f'{k}="{v}"' for k, v in labels.items())
    firing = [{"labels": f"ALERTS{{{inside}}}", "value": 1}]
    return [
        case(HEALTHY | world.bad, world.at, firing, alert.name),
        case(HEALTHY | world.nearly, world.at, [], alert.name),
    ]


def needed_by(alert: Alert) -> list[Any]:
    """A rule group with that alert, and what it reads."""
    names = {selector.name for selector in selectors(alert.expr)}
    rules = [rule for rule in recording_rules() if rule["record"] in names]
    return [{"name": "one", "rules": [*rules, alert.rule]}]


def write_test(folder: Path, name: str, groups: list[Any], tests: list[dict[str, Any]]) -> Path:
    """A test of rules, beside its rules; promtool may take several such."""
    rules, path = folder / f"{name}.rules.yaml", folder / f"{name}.yaml"
    rules.write_text(yaml_text({"groups": groups}), encoding="utf-8")
    path.write_text(yaml.safe_dump({"rule_files": [rules.name], "tests": tests}), encoding="utf-8")
    return path


@promtool
def test_each_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    assert set(WORLDS) == {alert.name for alert in ALERTS}
    paths = [write_test(tmp_path, a.name, needed_by(a), cases(a, WORLDS[a.name])) for a in ALERTS]
    call("test", "rules", *paths)


@promtool
def test_nothing_fires_where_all_is_well(tmp_path: Path) -> None:
    call("test", "rules", write_test(tmp_path, "all", rule_groups(), [case(HEALTHY, "40m", [], ".*")]))


@promtool
def test_a_case_that_does_not_hold_is_noticed(tmp_path: Path) -> None:
    alert = next(a for a in ALERTS if a.name == "ErnieQueueLong")
    right, wrong = cases(alert, WORLDS[alert.name])
    right["promql_expr_test"][0]["exp_samples"] = wrong["promql_expr_test"][0]["exp_samples"]
    path = write_test(tmp_path, "wrong", needed_by(alert), [right])
    with pytest.raises(AssertionError, match="ErnieQueueLong"):
        call("test", "rules", path)
