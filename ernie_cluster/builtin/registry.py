"""The tools that this server runs itself, by name. A new one is an object with `run`, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from ernie_cluster.builtin.base import BuiltinTool
from ernie_cluster.builtin.calculator import Calculator
from ernie_cluster.builtin.search import ImageSearch
from ernie_cluster.builtin.zoom import Zoom

TOOLS: Mapping[str, BuiltinTool] = {tool.name: tool for tool in (Zoom(), Calculator(), ImageSearch())}
