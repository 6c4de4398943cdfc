"""Which files a target consists of, and those that lie in the repository."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ernie_cluster.render import ray_up, ray_up_notes, serve_config
from ernie_cluster.render.groups import node_groups
from ernie_cluster.render.kube_base import base_files
from ernie_cluster.render.machines import Cloud, machines_of
from ernie_cluster.render.options import Options
from ernie_cluster.render.overlay import overlay_files
from ernie_cluster.render.ray_up import Where
from ernie_cluster.render.setup import SETUPS, Setup, local_setup, preset_setup
from ernie_cluster.render.text import Document, file_text, json_text
from ernie_cluster.render.watch import outputs

Target = Literal["serve", "ray-up", "kuberay", "monitoring"]

CLOUDS: tuple[Cloud, ...] = get_args(Cloud)
LOCAL: tuple[str, ...] = ("pocket",)
"""Setups whose files in deploy/ are for one machine."""


@dataclass(frozen=True, slots=True)
class File:
    """One file: a comment, and documents under it."""

    header: str
    documents: Sequence[Document]

    @property
    def text(self) -> str:
        return file_text(self.header, *self.documents)


@dataclass(frozen=True, slots=True)
class JsonFile:
    """One file with one document, and no room for a comment."""

    document: Document

    @property
    def documents(self) -> Sequence[Document]:
        return [self.document]

    @property
    def text(self) -> str:
        return json_text(self.document)


Files = Mapping[str, File | JsonFile]
"""By path below the repository's root."""


def serve_files(setup: Setup) -> Files:
    """The file of `serve deploy`."""
    return {f"deploy/serve.{setup.name}.yaml": File(serve_config.header(setup), [serve_config.serve_config(setup)])}


def ray_up_files(setup: Setup, where: Where, options: Options, only: Sequence[str] = ()) -> Files:
    """The file of `ray up`, and the application that it copies to the head; raises ConfigError when a replica fits on no machine."""
    if where != "local-cpu":
        setup.check_reachable()
    groups = () if where == "local-cpu" else node_groups(setup, machines_of(where, only), fill=True)
    cluster = ray_up.cluster_file(setup, groups, where, options)
    header = ray_up_notes.header(setup, groups, where, options.models_folder)
    return {f"deploy/ray-up.{where}.{setup.name}.yaml": File(header, [cluster]), **serve_files(setup)}


def kuberay_files(setup: Setup, options: Options, only: Sequence[str] = ()) -> Files:
    """Base and overlay for kustomize; raises ConfigError for what cannot run there."""
    setup.check_pods(options.models_folder)
    groups = node_groups(setup, machines_of("on-prem", only), fill=False)
    base = base_files(setup.config.api)
    overlay = overlay_files(setup, groups, options)
    found = {f"k8s/base/{name}": File(*parts) for name, parts in base.items()}
    return found | {f"k8s/overlays/{setup.name}/{name}": File(*parts) for name, parts in overlay.items()}


def monitoring_files() -> Files:
    """For a Prometheus and a Grafana without Kubernetes: what to scrape, rules, dashboards."""
    rules: dict[str, File | JsonFile] = {
        f"deploy/prometheus/{n}": File(*p) for n, p in outputs.prometheus_files().items()
    }
    return rules | {f"deploy/grafana/{name}": JsonFile(found) for name, found in outputs.dashboards().items()}


def checked_in(version: str) -> dict[str, File | JsonFile]:
    """All files of this repository that are rendered."""
    options = Options(version)
    found: dict[str, File | JsonFile] = {}
    for files in _all(options):
        found |= files
    return found


def _all(options: Options) -> Iterator[Files]:
    yield monitoring_files()
    for name in SETUPS:
        setup = preset_setup(name, options.models_folder)
        yield kuberay_files(setup, options)
        if name in LOCAL:
            yield ray_up_files(local_setup(name, options.models_folder), "local-cpu", options)
            continue
        yield serve_files(setup)
        if name in ("28b", "424b", "both"):
            for cloud in CLOUDS:
                yield ray_up_files(setup, cloud, options)
