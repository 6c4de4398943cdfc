"""Every command of the documents could run as it stands; none of them runs here."""

from __future__ import annotations

import pytest

from ernie_cluster.errors import ConfigError
from tests.unit.docs.pages import Block
from tests.unit.docs.programs import check
from tests.unit.docs.shell import Command, all_commands, commands_of

COMMANDS = all_commands()


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command(command: Command) -> None:
    check(command)


def words(text: str, language: str = "sh") -> list[tuple[str, ...]]:
    return [command.words for command in commands_of(Block("page", 1, (language,), text))]


def test_shell_is_read_as_a_shell_reads_it() -> None:
    assert words("a b  # c\n\n# d\n") == [("a", "b")]
    assert words("a 'x\ny' \\\n  z\n") == [("a", "x\ny", "z")]
    assert words('a && b | c > out.txt 2> err; d "$(e f)"\n') == [
        ("e", "f"),
        ("a",),
        ("b",),
        ("c",),
        ("d", "substituted"),
    ]
    assert words("A=1 B=2 run\n") == [("run",)]
    assert words("$ one\nsays\n$ two\n", "console") == [("one",), ("two",)]


@pytest.mark.parametrize(
    "line",
    [
        "ernie-cluster serve --no-such",
        "ernie-cluster no-such",
        "scripts/no-such",
        "scripts/test --no-such",
        "scripts/demo --no-such",
        "unheard-of",
        "kubectl apply -k k8s/overlays/no-such",
        "kubectl apply -f no-such.yaml",
        "kubectl no-such",
        "ray up deploy/no-such.yaml",
        "ray start --no-such",
        "ray no-such",
        "serve deploy deploy/no-such.yaml",
        "pip install '.[no-such]'",
        "docker build . --build-arg NO_SUCH=1",
        "python no/such.py",
        "python scripts/bench/engine.py --no-such",
        "pytest tests/no-such",
        "locust -f loadtests/no-such.py",
        "locust -f loadtests/over_http.py --no-such 1",
        "curl localhost:8000/no-such",
        "curl -X POST localhost:8000/metrics",
        "curl 'localhost:8000/admin/decisions?no-such=1'",
        'curl localhost:8000/v1/chat/completions -d \'{"model": "m"}\'',
        'curl localhost:8000/tokenize -d \'{"model": "m", "prompt": "x", "no_such": 1}\'',
        "grpcurl -plaintext localhost:9000 ernie_cluster.v1.Inference/NoSuch",
    ],
)
def test_what_cannot_run_is_seen(line: str) -> None:
    (command,) = commands_of(Block("page", 1, ("sh",), line))
    with pytest.raises(AssertionError):
        check(command)


@pytest.mark.parametrize("line", ["ernie-cluster serve --set no.such=1", "ERNIE__API__NO_SUCH=1 ernie-cluster serve"])
def test_keys_that_are_not_there_are_seen(line: str) -> None:
    (command,) = commands_of(Block("page", 1, ("sh",), line))
    with pytest.raises(ConfigError):
        check(command)
