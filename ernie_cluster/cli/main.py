"""The `ernie-cluster` command: parses, and hands over to one module per subcommand.

A subcommand's module is imported only when it is asked for, so `--help` needs neither torch nor Ray. Each has
`add_arguments(parser)` and `main(args) -> int`, and imports what is heavy inside `main`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from ernie_cluster import __version__
from ernie_cluster.errors import ConfigError, ErnieClusterError
from ernie_cluster.observe.log import ENV_FORMAT, ENV_LEVEL, setup_logging

_EXAMPLES = """\
examples:
  ernie-cluster demo                              the packaged model on this machine, no GPU needed
  ernie-cluster chat                              talk to a server, or else to the packaged model
  ernie-cluster eval                              judge what a server says, skill by skill
  ernie-cluster bench                             how fast a server is: TTFT, TPOT, tokens/s, goodput
  ernie-cluster index photos/ --out photos.index  let models search a folder of pictures
  ernie-cluster plan --model 28b --gpu h100-80g   does it fit, and how fast could it be
  ernie-cluster render --preset 28b --target kuberay --out .    what a cluster is made of
  ernie-cluster quantize IN OUT --method wint4    a checkpoint of a third of the size
  ernie-cluster config cluster.yaml               check a configuration and show all of it
  ernie-cluster serve cluster.yaml --set api.port=9000
  ernie-cluster status --watch                    what a running server does, live
  ernie-cluster top                               who is busy with what, interval by interval
  ernie-cluster doctor cluster.yaml               what of this machine, or cluster, would not work
  ernie-cluster COMMAND --help

environment:
  ERNIE__API__PORT=9000     sets api.port, over the file; any key works alike
  ERNIE_LOG_LEVEL=DEBUG     DEBUG, INFO (the default), WARNING or ERROR
  ERNIE_LOG_FORMAT=json     text (the default) or json, one object per line
"""

COMMANDS = {
    "serve": "serve the models of a configuration from a Ray cluster",
    "status": "show what the models and replicas of a running server do",
    "top": "show rates, latencies and the busiest replicas of a running server, interval by interval",
    "drain": "let a replica finish what it has and take no more",
    "undrain": "let a drained replica take work again",
    "upgrade": "replace the replicas of a pool one by one, without a lost request",
    "role": "give a replica another kind of work",
    "chaos": "kill, stop and disturb the processes of a staging server, and see that nobody notices",
    "demo": "see the packaged model look, think, point and zoom",
    "chat": "chat with a server, or with the packaged model",
    "eval": "ask a server held-out questions: accuracy per skill",
    "bench": "measure how fast a server is, and compare it with another one",
    "index": "index a folder of pictures, so that models can search it",
    "render": "write the files of a cluster: Serve application, `ray up`, Kubernetes",
    "plan": "say whether a model fits on GPUs, how much KV is left, and how fast it could be",
    "quantize": "write a checkpoint in 8 or 4 bits",
    "doctor": "check machines, packages, network, checkpoints and configuration before anything is served",
    "config": "check a configuration and print it with all defaults filled in",
    "key": "make an API key",
}
"""Subcommand -> what it does; `ernie_cluster.cli.<subcommand>` does it."""


class Command(Protocol):
    """What the module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare options, the description and examples."""
        ...

    def main(self, args: argparse.Namespace) -> int:
        """Do it; the exit code."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. 2: the user's input cannot work, said in one line; 130: interrupted."""
    command, options = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        _setup_logging()
        return command.main(options)
    except ErnieClusterError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse(args: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command that arguments name, and its options; exits as argparse does where they name none."""
    name = next((a for a in args if not a.startswith("-")), None)
    command = _load(name) if name in COMMANDS else None
    options = _parser(name, command).parse_args(args)
    assert command is not None, "argparse lets no unknown command through"
    return command, options


def _load(name: str | None) -> Command:
    return cast(Command, importlib.import_module(f"ernie_cluster.cli.{name}"))


def _parser(chosen: str | None, command: Command | None) -> argparse.ArgumentParser:
    """The whole parser, with the options of the chosen command only."""
    parser = argparse.ArgumentParser(
        prog="ernie-cluster",
        description="Serve ERNIE-4.5-VL models from one Ray cluster.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ernie-cluster {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen and command is not None:
            command.add_arguments(sub)
    return parser


def _setup_logging() -> None:
    try:
        setup_logging(os.environ.get(ENV_LEVEL, "INFO"), form=os.environ.get(ENV_FORMAT, "text"))
    except ValueError as e:
        name = ENV_FORMAT if str(e).startswith("log format") else ENV_LEVEL
        raise ConfigError(f"{name}: {e}") from None
