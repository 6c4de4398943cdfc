"""Configurations in the documents are configurations: each `yaml` block is held to what reads it.

What a block is follows from its keys, so none has to be marked, and one that nobody knows fails.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.keys_file import load_keys
from ernie_cluster.config.load import from_tree, load_config
from ernie_cluster.config.reference import sections
from ernie_cluster.errors import ConfigError
from tests.unit.docs.pages import ROOT, Block, Page, blocks, pages

CONFIG_KEYS = {field.name for field in dataclasses.fields(ClusterConfig)}

_SPOKEN_KEY = re.compile(
    r"`((?:api|router|engine|transport|faults|scaling|auto_model|targets|eplb)\.[a-z][a-z0-9_.]*[a-z0-9])"
)

SECTIONS = [(path, {key.name for key in keys}) for path, _, keys in sections()]

SERVED = {"models": [{"preset": "pocket"}]}
"""What a block is about that leaves `models` out."""

OTHERS = ({"scrape_configs"}, {"groups"}, {"apiVersion", "kind"}, {"receivers", "service"}, {"route", "receivers"})
"""Keys by which files of Prometheus, Kubernetes, the collector of OpenTelemetry and Alertmanager are known; valid YAML is
all that is asked of them here. Those that we ship have tests of their own."""


def check(block: str, folder: Path) -> None:
    """Fail unless a block is a file that something here reads."""
    documents = list(yaml.safe_load_all(block))
    assert documents, "it is empty"
    for document in documents:
        if isinstance(document, list):
            path = folder / "keys.yaml"
            path.write_text(yaml.safe_dump(document))
            load_keys(path)
        elif set(document) <= CONFIG_KEYS:
            path = folder / "cluster.yaml"
            path.write_text(block)
            load_config(path, {}) if "models" in document else from_tree({**SERVED, **document}, {})
        elif set(document) == {"deployments"}:  # of an application in a file for `serve deploy`
            assert all(set(each) <= {"name", "num_replicas"} for each in document["deployments"])
        elif "resources" in document:
            _check_kustomization(document)
        else:
            assert any(known <= set(document) for known in OTHERS), f"what reads {sorted(document)}? Teach this test"


def _check_kustomization(document: dict[str, Any]) -> None:
    for resource in document["resources"]:
        inside = resource.rpartition("ernie_cluster/")[2]
        assert (ROOT / inside).exists(), f"{resource} is not there"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_read(block: Block, tmp_path: Path) -> None:
    check(block.text, tmp_path)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_keys_that_are_spoken_of_are_there(page: Page) -> None:
    spoken = {key for _, line in page.prose for key in _SPOKEN_KEY.findall(line)}
    assert not {key for key in spoken if not is_key(key)}


def is_key(key: str) -> bool:
    """Whether `section.name` is a key; sections within a model or a pool go by their last name, as `engine.dtype`."""
    section, _, name = key.rpartition(".")
    return any(path.endswith(section) and name in names for path, names in SECTIONS)


def test_a_key_that_is_not_there_is_seen() -> None:
    assert is_key("api.image_search.folder")
    assert is_key("engine.dtype")
    assert not is_key("router.no_such")
    assert not is_key("api.image_search.no_such")


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize(
    "text",
    ["models: [{preset: pocket, nme: x}]", "router: {max_waiting: -1}", "models: []", "- {name: a, sha256: short}"],
)
def test_what_cannot_work_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        check(text, tmp_path)


@pytest.mark.parametrize("text", ["surprise: 1", "resources: [k8s/overlays/no-such]", ""])
def test_what_nobody_reads_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check(text, tmp_path)
