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
from ernie_cluster.observe.log import ENV_LEVEL, setup_logging

_EXAMPLES = """\
examples:
  ernie-cluster demo                              the packaged model on this machine, no GPU needed
  ernie-cluster chat                              talk to a server, or else to the packaged model
  ernie-cluster eval                              judge what a server says, skill by skill
  ernie-cluster index photos/ --out photos.index  let models search a folder of pictures
  ernie-cluster plan --model 28b --gpu h100-80g   does it fit, and how fast could it be
  ernie-cluster quantize IN OUT --method wint4    a checkpoint of a third of the size
  ernie-cluster config cluster.yaml               check a configuration and show all of it
  ernie-cluster serve cluster.yaml --set api.port=9000
  ernie-cluster COMMAND --help

environment:
  ERNIE__API__PORT=9000     sets api.port, over the file; any key works alike
  ERNIE_LOG_LEVEL=DEBUG     DEBUG, INFO (the default), WARNING or ERROR
"""

COMMANDS = {
    "serve": "serve the models of a configuration from a Ray cluster",
    "demo": "see the packaged model look, think, point and zoom",
    "chat": "chat with a server, or with the packaged model",
    "eval": "ask a server held-out questions: accuracy per skill",
    "index": "index a folder of pictures, so that models can search it",
    "plan": "say whether a model fits on GPUs, how much KV is left, and how fast it could be",
    "quantize": "write a checkpoint in 8 or 4 bits",
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
    args = list(sys.argv[1:] if argv is None else argv)
    name = next((a for a in args if not a.startswith("-")), None)
    command = _load(name) if name in COMMANDS else None
    options = _parser(name, command).parse_args(args)
    assert command is not None, "argparse lets no unknown command through"
    try:
        _setup_logging()
        return command.main(options)
    except ErnieClusterError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


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
        setup_logging(os.environ.get(ENV_LEVEL, "INFO"))
    except ValueError as e:
        raise ConfigError(f"{ENV_LEVEL}: {e}") from None
