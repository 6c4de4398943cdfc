"""`ernie-cluster config`: the configuration in effect, after file, environment and overrides."""

from __future__ import annotations

import argparse
import os
import sys

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.load import dump_config, load_config
from ernie_cluster.config.reference import reference

_EXAMPLES = """\
examples:
  ernie-cluster config cluster.yaml
  ernie-cluster config cluster.yaml --set api.port=9000 --set models.0.engine.kv_cache_bytes=8GiB
  ernie-cluster config --set models.0.preset=28b --set models.0.path=/models/ernie-28b > cluster.yaml
  ernie-cluster config --reference                   every key there is, with type, default and meaning
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_config_arguments(parser)
    parser.add_argument("--reference", action="store_true", help="print every key with its meaning, as Markdown")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `CONFIG` and `--set`, for every command that reads a configuration; `read_config` takes them in."""
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="YAML file; without one, environment and --set say it all"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="replace one value, over file and environment: api.port=9000; may be given more than once",
    )


def read_config(args: argparse.Namespace) -> ClusterConfig:
    """The configuration that the arguments of `add_config_arguments` ask for; raises ConfigError."""
    return load_config(args.config, os.environ, args.overrides)


def main(args: argparse.Namespace) -> int:
    sys.stdout.write(reference() if args.reference else dump_config(read_config(args)))
    return 0
