"""Options that `ernie-cluster bench` and the load tests share: what is asked, and what is good enough."""

from __future__ import annotations

import argparse
import math
import re
from functools import cache
from typing import Any

from ernie_cluster.bench import scenarios, traces
from ernie_cluster.bench.record import Slo
from ernie_cluster.bench.scenarios import SCENARIOS, Source
from ernie_cluster.errors import ConfigError

_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|)")
_MOST_S = 86_400.0


def duration(text: str) -> float:
    """Seconds: `500ms`, `30s`, `5m`, `2`; raises ArgumentTypeError."""
    match = _DURATION.fullmatch(text)
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < value <= _MOST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 500ms, 30s or 5m, a day at most")
    return value


def target(text: str) -> float | None:
    """A duration, or `none` where nothing is promised."""
    return None if text == "none" else duration(text)


def above_zero(text: str) -> float:
    """A number above 0; raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def add_load_arguments(parser: Any) -> None:
    """What `source_of` and `slo_of` take. `parser` is argparse's or Locust's."""
    parser.add_argument(
        "--scenario", metavar="NAME", default="chat", help=f"one of {', '.join(SCENARIOS)} (default: chat)"
    )
    parser.add_argument(
        "--trace",
        metavar="TRACE",
        help=f"in place of a scenario: lengths of a trace, {' or '.join(traces.PACKAGED)}, or a CSV file with columns "
        f"{','.join(traces.COLUMNS)}",
    )
    parser.add_argument(
        "--shrink",
        metavar="N",
        type=above_zero,
        default=1.0,
        help="texts and answers N times shorter, for models with a short context (default: 1)",
    )
    for name, default, what in (
        ("ttft", "2s", "time to first token"),
        ("tpot", "100ms", "time per output token"),
        ("latency", "none", "time to the end of the answer"),
    ):
        parser.add_argument(
            f"--slo-{name}",
            metavar="TIME",
            type=target,
            default=target(default),
            help=f"goodput counts answers whose {what} is within this; none = whatever (default: {default})",
        )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="only fields that OpenAI knows: answers end where the model ends them, and not at a length that is drawn",
    )


def source_of(args: argparse.Namespace) -> Source:
    """Whose requests the options name; raises ConfigError."""
    return _source(args.scenario, args.trace or "", args.shrink)


@cache
def _source(scenario: str, trace: str, shrink: float) -> Source:
    if trace:
        return traces.Trace("trace", traces.read(trace)).shrunk(shrink)
    return scenarios.find(scenario).shrunk(shrink)


def slo_of(args: argparse.Namespace) -> Slo:
    """The targets, which Locust's web UI gives as text where none was set before."""
    return Slo(*(_target_of(value) for value in (args.slo_ttft, args.slo_tpot, args.slo_latency)))


def _target_of(value: float | str | None) -> float | None:
    return (target(value.lower()) if value else None) if isinstance(value, str) else value


def check_length(source: Source, max_model_len: int | None, model: str) -> None:
    """Refuse a load that the model cannot take, before it is sent; raises ConfigError with the remedy.

    Args:
        max_model_len: as the server tells it; None where it does not.
    """
    most = source.most_tokens
    if max_model_len is not None and most > max_model_len:
        raise ConfigError(
            f"{source.name} asks for up to about {most:,} tokens, and {model} has a context of {max_model_len:,}; "
            f"add --shrink {math.ceil(1.2 * most / max_model_len)}, or choose another --scenario"
        )
