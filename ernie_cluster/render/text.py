"""Documents -> YAML, under a comment that says what to change first; or JSON, for who reads nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import yaml

from ernie_cluster.config.units import GIB, MIB

Document = Mapping[str, Any]


class _Dumper(yaml.SafeDumper):
    """Safe dumper without anchors, with texts of several lines as they are, and lists set in."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, "|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def yaml_text(document: Document) -> str:
    """One document, keys in their order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def file_text(header: str, *documents: Document) -> str:
    """A file: the header as a comment, then documents."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.strip().splitlines())
    return comment + "---\n".join(map(yaml_text, documents))


def json_text(document: Document) -> str:
    """One document, keys in their order."""
    return json.dumps(document, indent=1) + "\n"


def quantity(num_bytes: int) -> str:
    """As Kubernetes writes memory, rounded up: 12Gi."""
    if num_bytes % GIB and num_bytes < GIB:
        return f"{math.ceil(num_bytes / MIB)}Mi"
    return f"{math.ceil(num_bytes / GIB)}Gi"
