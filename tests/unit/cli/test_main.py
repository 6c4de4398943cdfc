"""Parsing, dispatch and exit codes of `ernie-cluster`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ernie_cluster import __version__
from ernie_cluster.cli.main import COMMANDS, main
from ernie_cluster.config.load import load_config
from ernie_cluster.config.presets import tiny
from ernie_cluster.errors import ConfigError

FakeCommand = Callable[[Callable[[argparse.Namespace], int]], None]


@pytest.fixture
def fake_serve(monkeypatch: pytest.MonkeyPatch) -> FakeCommand:
    """Puts a function in the place of `cli.serve`, with one option."""

    def put(run: Callable[[argparse.Namespace], int]) -> None:
        fake = SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--depth", type=int), main=run)
        monkeypatch.setitem(sys.modules, "ernie_cluster.cli.serve", fake)

    return put


def test_help_names_every_command_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown and summary in shown for name, summary in COMMANDS.items())
    assert "examples:" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"ernie-cluster {__version__}\n")


@pytest.mark.parametrize("argv", [[], ["sreve"], ["config", "--sett", "x=1"]])
def test_a_wrong_command_line_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: ernie-cluster" in capsys.readouterr().err


def test_a_command_gets_its_options_and_gives_the_exit_code(fake_serve: FakeCommand) -> None:
    fake_serve(lambda args: int(args.depth))
    assert main(["serve", "--depth", "7"]) == 7


def test_an_error_of_ours_is_one_line(fake_serve: FakeCommand, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ConfigError("api.port: expected a whole number")

    fake_serve(fail)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == "error: api.port: expected a whole number\n"


def test_a_bug_of_ours_keeps_its_traceback(fake_serve: FakeCommand) -> None:
    fake_serve(lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["serve"])


def test_an_interrupt_exits_with_130(fake_serve: FakeCommand) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    fake_serve(interrupt)
    assert main(["serve"]) == 130


def test_a_wrong_log_level_is_refused(
    fake_serve: FakeCommand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_serve(lambda args: 0)
    monkeypatch.setenv("ERNIE_LOG_LEVEL", "LOUD")
    assert main(["serve"]) == 2
    assert "error: ERNIE_LOG_LEVEL: log level 'LOUD' must be one of" in capsys.readouterr().err


def test_config_prints_what_can_be_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, copy = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_text("models: [{preset: tiny, path: /t}]", encoding="utf-8")
    monkeypatch.setenv("ERNIE__API__MAX_IMAGES", "4")
    assert main(["config", str(source), "--set", "api.port=9000", "--set", "router.max_attempts=3"]) == 0
    copy.write_text(capsys.readouterr().out, encoding="utf-8")
    config = load_config(copy, {})
    assert config.models == tiny("/t").models
    assert (config.api.port, config.api.max_images, config.router.max_attempts) == (9000, 4, 3)
