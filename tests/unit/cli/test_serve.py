"""What `ernie-cluster serve` finds out before it starts anything."""

from __future__ import annotations

import socket

import pytest

from ernie_cluster.actors.environment import free_port
from ernie_cluster.cli.main import main

MODEL = ("--set", "models.0.preset=tiny", "--set", "models.0.path=/nowhere")


@pytest.mark.parametrize("option", [("--grpc-port", "{}"), ("--set", "api.grpc_port={}"), ("--set", "api.port={}")])
def test_a_port_that_is_taken_is_said(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        name, value = option
        code = main(["serve", *MODEL, "--set", f"api.port={free_port()}", name, value.format(port)])
    assert code == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "many"])
def test_what_is_no_port_is_said(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *MODEL, "--grpc-port", port]) == 2
    assert "grpc_port" in capsys.readouterr().err
