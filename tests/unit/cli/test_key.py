"""`ernie-cluster key`: what it prints works."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie_cluster.api.keys import owner_of
from ernie_cluster.cli.main import main
from ernie_cluster.config.keys_file import load_keys


def make(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The key, and the line for the file."""
    assert main(["key", "--name", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    (key,) = [line.strip() for line in lines if line.startswith("  sk-ernie-")]
    return key, lines[-1]


def test_the_line_lets_the_key_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {name: make(name, capsys) for name in ("alice", "team:b/1+x@y")}
    path = tmp_path / "keys.yaml"
    path.write_text("".join(line + "\n" for _, line in made.values()), encoding="utf-8")
    keys = load_keys(path)
    for name, (key, line) in made.items():
        owner = owner_of(key.encode(), keys)
        assert owner is not None
        assert owner.name == name
        assert key not in line
    assert len({key for key, _ in made.values()}) == 2


def test_a_name_that_cannot_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "--name", "a b"]) == 2
    assert "name must be" in capsys.readouterr().err
