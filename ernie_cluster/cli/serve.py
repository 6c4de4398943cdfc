"""`ernie-cluster serve`: serve the models of a configuration until interrupted."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading

from ernie_cluster.cli.config import add_config_arguments, read_config
from ernie_cluster.cli.hub import with_local_folders
from ernie_cluster.cli.progress import Progress
from ernie_cluster.config.api import ApiConfig
from ernie_cluster.errors import ConfigError

_EXAMPLES = """\
examples:
  ernie-cluster serve cluster.yaml
  ernie-cluster serve cluster.yaml --set api.port=9000 --set models.0.engine.max_num_seqs=32
  ernie-cluster serve cluster.yaml --grpc-port 9000
  ernie-cluster serve cluster.yaml --address auto      on the Ray cluster that this machine belongs to
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_config_arguments(parser)
    parser.add_argument(
        "--grpc-port",
        metavar="PORT",
        help="serve gRPC, too (ernie_cluster.v1.Inference, health, reflection); short for --set api.grpc_port=PORT",
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        default=os.environ.get("RAY_ADDRESS") or None,
        help="Ray cluster to join, `auto` for the local one; default: $RAY_ADDRESS, else a new one on this machine",
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=1800.0, help="give up when not ready by then (default 1800)"
    )


def main(args: argparse.Namespace) -> int:
    if args.grpc_port is not None:
        args.overrides.append(f"api.grpc_port={args.grpc_port}")
    config = read_config(args)
    if args.address is None:
        check_ports(config.api)
    progress = Progress()
    config = with_local_folders(config, progress)
    progress("loading")
    from ernie_cluster.actors import launch  # Ray takes a second to import

    launch.check(config)
    launch.start_ray(config, args.address, progress)
    try:
        launch.start(config, progress, timeout_s=args.timeout)
        url = base_url(config.api.host, config.api.port)
        grpc = "" if config.api.grpc_port is None else f", gRPC on port {config.api.grpc_port}"
        page = f"; {url} is a page to try them" if config.api.playground else ""
        progress(f"ready: {url}/v1 serves {', '.join(m.name for m in config.models)}{grpc}{page}; Ctrl-C stops")
        wait_for_signal()
    finally:
        launch.stop(progress)
    return 0


def check_ports(api: ApiConfig) -> None:
    """See `check_port`, for each port that the API listens on."""
    for port in (api.port, api.grpc_port):
        if port is not None:
            check_port(api.host, port)


def check_port(host: str, port: int) -> None:
    """Before anything is started on this machine; raises ConfigError when nobody can listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as e:
            raise ConfigError(f"port {port} of {host} cannot be used: {e}; choose another") from None


def base_url(host: str, port: int) -> str:
    """What a client on this machine connects to."""
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def wait_for_signal() -> None:
    """Until SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
