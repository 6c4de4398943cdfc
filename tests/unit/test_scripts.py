"""The shell scripts, with an interpreter that only says what it is asked to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/sh
# Plays Python: `-m venv DIR` puts a copy of it there; the rest goes to the log.
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/ernie-cluster" ;;
    --version) echo "Python $FAKE_VERSION"; exit ;;
    -c*) [ "$FAKE_VERSION" != 3.9.0 ]; exit ;;
    -) cat > /dev/null; [ "$FAKE_CPU_INDEX" = yes ]; exit ;;
esac
echo "${0##*/} $*" >> "$FAKE_LOG"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the scripts in a folder whose name has a space."""
    root = tmp_path / "a tree"
    root.mkdir()
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("bench"))
    (root / "pyproject.toml").write_text("one")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return root


def run(
    tree: Path, script: str, *args: str, version: str = "3.11.0", cpu_index: str = "no"
) -> tuple[int, str, list[str]]:
    """(exit code, standard error, what the interpreter was asked to do)."""
    log = tree / "log"
    log.write_text("")
    env = {
        **os.environ,
        "PYTHON": str(tree.parent / "python"),
        "FAKE_LOG": str(log),
        "FAKE_VERSION": version,
        "FAKE_CPU_INDEX": cpu_index,
    }
    done = subprocess.run(["sh", str(tree / "scripts" / script), *args], env=env, capture_output=True, text=True)
    return done.returncode, done.stderr, log.read_text().splitlines()


def test_demo_installs_once_and_passes_its_arguments(tree: Path) -> None:
    code, said, asked = run(tree, "demo", "--keep", "a b")
    assert code == 0, said
    assert asked == [
        f"python -m venv {tree}/.venv",
        "python -m pip install --quiet --upgrade pip",
        "python -m pip install torch==2.13.0",
        f"python -m pip install --editable {tree}",
        "ernie-cluster demo --keep a b",
    ]
    assert run(tree, "demo")[2] == ["ernie-cluster demo"]


@pytest.mark.skipif(Path("/dev/nvidia0").exists() or sys.platform != "linux", reason="takes the default build")
def test_without_a_gpu_torch_comes_from_the_cpu_index_where_it_answers(tree: Path) -> None:
    asked = run(tree, "demo", cpu_index="yes")[2]
    assert "python -m pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0" in asked
    assert sum("--index-url" in line for line in asked) == 1


def test_a_changed_pyproject_installs_again_into_the_same_environment(tree: Path) -> None:
    run(tree, "demo")
    (tree / "pyproject.toml").write_text("two")
    asked = run(tree, "demo")[2]
    assert f"python -m pip install --editable {tree}" in asked
    assert f"python -m venv {tree}/.venv" not in asked


def test_the_tests_need_more_than_the_demo_and_the_demo_no_more_than_the_tests(tree: Path) -> None:
    run(tree, "demo")
    asked = run(tree, "test", "-k", "x y")[2]
    assert f"python -m pip install --editable {tree}[dev]" in asked
    assert asked[-1] == "python -m pytest -k x y"
    assert run(tree, "demo")[2] == ["ernie-cluster demo"]


def test_an_old_python_is_refused_by_name(tree: Path) -> None:
    code, said, asked = run(tree, "demo", version="3.9.0")
    assert code == 1
    assert "must be Python 3.11 or newer, found: Python 3.9.0" in said
    assert asked == []
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test", "scripts/check", ".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/sh\n")
    assert subprocess.run(["sh", "-n", str(path)]).returncode == 0
