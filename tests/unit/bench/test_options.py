"""Options as users and Locust's web UI write them."""

from __future__ import annotations

import argparse

import pytest

from ernie_cluster.bench.options import add_load_arguments, check_length, duration, slo_of, source_of
from ernie_cluster.bench.record import Slo
from ernie_cluster.bench.scenarios import find
from ernie_cluster.errors import ConfigError


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_load_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("30s", 30), ("5m", 300), ("2", 2), ("1.5h", 5400)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1d", "nan", "inf", "1e3", "25h", "5 m", "٣"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no time such as"):
        duration(text)


def test_targets_are_told_as_they_were_given() -> None:
    args = parsed("--slo-ttft", "500ms", "--slo-tpot", "none", "--slo-latency", "10s")
    assert slo_of(args) == Slo(0.5, None, 10.0)
    assert str(slo_of(args)) == "TTFT <= 0.5 s, E2E <= 10 s"
    assert str(Slo(None, None)) == "a whole answer"


@pytest.mark.parametrize(("text", "seconds"), [("", None), ("None", None), ("3s", 3.0)])
def test_targets_from_a_form_are_text(text: str, seconds: float | None) -> None:
    args = parsed()
    args.slo_latency = text
    assert slo_of(args).latency_s == seconds


def test_a_trace_takes_the_place_of_the_scenario() -> None:
    assert source_of(parsed("--scenario", "long")).name == "long"
    assert source_of(parsed("--scenario", "long", "--trace", "azure-code")).name == "trace"


def test_a_shrink_that_was_advised_is_enough() -> None:
    with pytest.raises(ConfigError, match=r"--shrink 5\b"):
        check_length(find("long"), 2048, "m")
    check_length(find("long").shrunk(5), 2048, "m")
    check_length(find("long"), None, "m")
