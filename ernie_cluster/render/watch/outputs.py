"""Alerts and dashboards as those read them who are to use them: Prometheus, its operator, Grafana."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_cluster.config.api import ApiConfig
from ernie_cluster.render.text import Document
from ernie_cluster.render.watch.alerts import rule_groups
from ernie_cluster.render.watch.objectives import FIRST_TOKEN_S, OBJECTIVES
from ernie_cluster.render.watch.panels import Board, dashboard
from ernie_cluster.render.watch.pools_board import POOLS
from ernie_cluster.render.watch.recovery_board import RECOVERY
from ernie_cluster.render.watch.service_board import SERVICE

BOARDS: tuple[Board, ...] = (SERVICE, POOLS, RECOVERY)

_PROMISES = "; ".join(f"{o.name}: {o.share:.1%}" for o in OBJECTIVES)
_OBJECTIVES = f"""objectives  {_PROMISES} of a month's requests ({FIRST_TOKEN_S:g} s to the first token): other ones go into
              ernie_cluster/render/watch/objectives.py, for alerts and dashboards have them from there"""

KUBE_HEADERS: Mapping[str, str] = {
    "alerts": "What somebody has to be told of; docs/runbook.md says of each what to do.\n\nChange first:\n"
    "  labels      those by which your Prometheus chooses PrometheusRules\n"
    f"  {_OBJECTIVES}",
    "dashboards": "What Grafana shows, for its sidecar that gathers dashboards; the same as in deploy/grafana.\n\n"
    "Change first:\n  labels  those by which your sidecar chooses ConfigMaps",
}

_RULES_HEADER = f"""Alerts for a Prometheus without Kubernetes, and what they read; docs/runbook.md says of each what to do.

Change first:
  {_OBJECTIVES}"""

_PROMETHEUS_HEADER = """A Prometheus beside a cluster of ours: `prometheus --config.file=prometheus.yaml`, from this folder.

Change first:
  targets  each process of the API by itself. With one of them it is behind the API's port. Several have ports of their own, on
           each node from RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT (30000) on: name those, for what comes in by the API's
           port goes to any of them.
With api.admin_key_sha256 set, /metrics needs that key: add `authorization: {credentials_file: PATH}` to the job.
To have alerts sent, add `alerting` with your Alertmanager."""


def prometheus_files() -> dict[str, tuple[str, Sequence[Document]]]:
    """File -> (header, documents), as they lie in deploy/prometheus."""
    job = {
        "job_name": "ernie-api",
        "metrics_path": "/metrics",
        "static_configs": [{"targets": [f"127.0.0.1:{ApiConfig().port}"]}],
    }
    prometheus = {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [job],
    }
    return {
        "prometheus.yaml": (_PROMETHEUS_HEADER, [prometheus]),
        "rules.yaml": (_RULES_HEADER, [{"groups": rule_groups()}]),
    }


def dashboards() -> dict[str, Mapping[str, Any]]:
    """File -> dashboard, as they lie in deploy/grafana."""
    return {f"{board.uid}.json": dashboard(board) for board in BOARDS}


def prometheus_rule() -> Document:
    """The rules, for Prometheus' operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "ernie", "labels": {"release": "prometheus"}},
        "spec": {"groups": rule_groups()},
    }


def config_map() -> Document:
    """The dashboards, one long line each: they are read in deploy/grafana, and by machines here."""
    lines = {name: json.dumps(found, separators=(",", ":")) + "\n" for name, found in dashboards().items()}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "ernie-dashboards", "labels": {"grafana_dashboard": "1"}},
        "data": lines,
    }
