"""`demo` and `serve` as a user runs them: what they say, what they serve, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from ernie_cluster.actors.environment import free_port
from tests.e2e.application import CHAT, Streamed, chat_body, eventually
from tests.e2e.processes import Process, Program, shared_memory_of
from tests.tiny import tiny_folder

START_S = 300.0
STOP_S = 120.0

Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    programs: list[Program] = []

    def begin(*arguments: str, **env: str) -> Program:
        programs.append(Program(arguments, {"RAY_AUTH_MODE": "disabled", **env}))
        return programs[-1]

    yield begin
    for program in programs:
        program.kill()


def check_nothing_left(family: set[Process], shared_memory: set[str]) -> None:
    def objection() -> str:
        return ", ".join(f"{p.pid} {p.name}" for p in family if p.is_alive)

    assert family, "it had no processes to begin with"
    eventually(objection, 60)
    assert [name for name in shared_memory if Path(name).exists()] == []


def test_demo_says_what_it_does_and_nothing_else(start: Start, tmp_path: Path) -> None:
    program = start("demo", "--once", "--port", str(free_port()), "--keep", str(tmp_path))
    program.wait_for("ready; the pictures go to", START_S)
    family = program.family()
    shared_memory = shared_memory_of(family)
    code, _ = program.end(START_S)
    assert code == 0, program.text
    said = [line for line in program.lines if line.strip()]
    walk = next(i for i, line in enumerate(said) if "1. Look at a picture" in line)
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in said[:walk]), program.text
    assert re.fullmatch(r"\[ *\d+\.\d s\] stopping\n", said[-1])
    paces = re.findall(r"\d+ prompt tokens, first token after \d+ ms, then \d+ tokens/s", program.text)
    assert len(paces) == 4
    assert program.text.count("✓ right") >= 3, program.text  # bf16 rounds a little differently from CPU to CPU
    assert all((tmp_path / name).exists() for name in re.findall(r"\S+\.png", program.text))
    assert re.search(r"transfer .* [\d,]+ bytes", program.text)
    assert re.search(r"the first token came \d+\.\d s after the start", program.text)
    for noise in ("INFO", "WARNING", "raylet", "Traceback", "\x1b["):
        assert noise not in program.text
    check_nothing_left(family, shared_memory)


def yaml_file(folder: Path, port: int) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(f"models:\n  - preset: tiny-mixed\n    path: {tiny_folder()}\napi:\n  port: {port}\n")
    return path


def test_serve_stops_cleanly_on_sigterm(start: Start, tmp_path: Path) -> None:
    port = free_port()
    program = start("serve", str(yaml_file(tmp_path, port)), RAY_ADDRESS="")
    program.wait_for("ready: ", START_S)
    url = f"http://127.0.0.1:{port}{CHAT}"
    body = chat_body("tiny", "Hello", max_tokens=150, stream=True)
    answer = Streamed()
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        for line in response.iter_lines():
            answer.feed(line)
            if answer.num_chunks == 2:
                family = program.family()
                shared_memory = shared_memory_of(family)
                program.send(signal.SIGTERM)
    assert (answer.is_done, answer.finish_reason) == (True, "length"), "what runs may come to its end"
    code, _ = program.end(STOP_S)
    assert code == 0, program.text
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in program.lines), program.text
    check_nothing_left(family, shared_memory)


def test_port_that_is_taken_is_said_before_anything_starts(start: Start, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments in (("serve", str(yaml_file(tmp_path, port))), ("demo", "--once", "--port", str(port))):
            program = start(*arguments, RAY_ADDRESS="")
            assert program.end(START_S)[0] == 2
            assert f"port {port}" in program.text
            assert "starting Ray" not in program.text


@pytest.mark.slow  # Serve tries three times
def test_replica_that_cannot_start_says_why(start: Start, tmp_path: Path) -> None:
    path = yaml_file(tmp_path, free_port())
    program = start("serve", str(path), "--set", "models.0.engine.kv_cache_bytes=1KiB", RAY_ADDRESS="")
    code, _ = program.end(START_S)
    assert code == 2, program.text
    assert "kv_cache_bytes = 1024 holds 0 blocks" in program.lines[-1], program.text
    assert "Traceback" not in program.text


CLUSTER = """
import ray, sys
context = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
for line in sys.stdin:
    names = {a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == "ernie_cluster"}
    print(" ".join(sorted(names)), flush=True)
"""


@pytest.mark.slow
def test_serve_on_a_cluster_leaves_no_actor_there(start: Start, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    ) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None

        def named_actors() -> str:
            assert cluster.stdin is not None
            assert cluster.stdout is not None
            print(file=cluster.stdin, flush=True)
            return cluster.stdout.readline().strip()

        address = cluster.stdout.readline().strip()
        program = start("serve", str(yaml_file(tmp_path, free_port())), "--address", address)
        program.wait_for("ready: ", START_S)
        assert "ernie:router" in named_actors()
        program.send(signal.SIGINT)
        code, _ = program.end(STOP_S)
        assert code == 0, program.text
        eventually(named_actors, 10)
        cluster.stdin.close()
