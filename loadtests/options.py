"""Options that our load tests add to Locust's; the web UI shows them, too."""

from __future__ import annotations

import random
from typing import Any

from locust import events
from locust.env import Environment

from ernie_cluster.bench.options import add_load_arguments, duration, source_of


@events.init_command_line_parser.add_listener
def _add(parser: Any) -> None:
    parser.add_argument("--model", default="", help="served model name (default: the first that the server lists)")
    parser.add_argument(
        "--model-key",
        default="",
        env_var="ERNIE_API_KEY",
        is_secret=True,
        help="API key of the server (default: the environment's ERNIE_API_KEY)",
    )
    parser.add_argument("--ca-file", default="", help="PEM file of the CA that has signed the server's certificate")
    add_load_arguments(parser)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="(default: any)")
    parser.add_argument("--answer-timeout", type=duration, default=300.0, help="of one answer (default: 300s)")
    parser.add_argument("--think-time", type=float, default=0.0, help="seconds between an answer and the next question")
    parser.add_argument("--svg", default="", help="draw the course of the run into this file at its end")
    parser.add_argument("--step-time", type=duration, default=60.0, help="of shapes: of a step, or from spike to spike")


@events.init.add_listener
def _check(environment: Environment, **_: Any) -> None:
    """Refuse what cannot be asked before there are users."""
    source_of(environment.parsed_options)
