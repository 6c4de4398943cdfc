"""The options of `chaos`, and what it says before anything is struck."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from ernie_cluster.cli import chaos
from ernie_cluster.cli import main as cli
from ernie_cluster.config.faults import POINTS


def parsed(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chaos.add_arguments(parser)
    return parser.parse_args(args)


def test_defaults() -> None:
    args = parsed()
    assert (args.for_s, args.seed, "api" in args.pools) == (60.0, 0, False)


@pytest.mark.parametrize(
    ("text", "seconds"), [("60s", 60.0), ("5m", 300.0), ("1h", 3600.0), ("90", 90.0), ("0.5s", 0.5)]
)
def test_times(text: str, seconds: float) -> None:
    assert parsed("--for", text).for_s == seconds


@pytest.mark.parametrize(
    "wrong",
    [
        ("--for", "0s"), ("--for", "2d"), ("--for", "s"), ("--for", "nan"), ("--for", "1ms"), ("--only", "explode"),
        ("--pools", "decode,moon"), ("--clients", "0"), ("--clients", "257"), ("--max-tokens", "x"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*wrong)
    assert wrong[0] in capsys.readouterr().err


def test_the_points_are_listed_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chaos", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(point in said for point in POINTS)


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert cli.main(["chaos", "--url", "http://127.0.0.1:9"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
