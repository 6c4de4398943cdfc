"""What the documents may tell a user to run, and how each is held to the truth without being run.

`PROGRAMS` is the table: a check raises AssertionError where a command cannot work here. A program that is not in it is one
that nobody has looked at: teach it here, with the strictest check that needs no network.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import os
import re
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ernie_cluster.cli import main as cli
from ernie_cluster.config.load import from_tree
from tests.unit.docs.pages import ROOT
from tests.unit.docs.requests import check_curl, check_grpcurl
from tests.unit.docs.shell import Command

Check = Callable[[list[str]], None]

SERVED: dict[str, Any] = {"models": [{"preset": "pocket"}]}


def check(command: Command) -> None:
    """Fail unless a command could run as it is written."""
    overrides = {name: value for name, _, value in (each.partition("=") for each in command.environment)}
    if any(name.startswith("ERNIE__") for name in overrides):
        from_tree(SERVED, overrides)
    if command.program.startswith(("scripts/", "./")):
        _script(command.words)
        return
    assert command.program in PROGRAMS, (
        f"{command}: nobody has looked at {command.program}; teach tests/unit/docs/programs.py"
    )
    PROGRAMS[command.program](command.arguments)


def _ernie_cluster(arguments: list[str]) -> None:
    said, options, code = io.StringIO(), None, None
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            _, options = cli.parse(arguments)
    except SystemExit as e:  # --help, or what the parser has to object
        code = e.code
    assert not code, said.getvalue()
    if overrides := getattr(options, "overrides", None):
        from_tree(SERVED, {}, overrides)


def _files(*names: str) -> None:
    for name in names:
        assert (ROOT / name).exists(), f"{name} is not in the repository"


def _option(arguments: Sequence[str], *names: str) -> list[str]:
    """Values of an option, given as `--name value` or `--name=value`."""
    found = [value for name, value in itertools.pairwise(arguments) if name in names]
    return found + [a.partition("=")[2] for a in arguments if a.partition("=")[0] in names and "=" in a]


def _first(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The first word that is no option, and all that follows it."""
    at = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    assert at is not None, f"{list(arguments)} names nothing to do"
    return arguments[at], list(arguments[at + 1 :])


def _kubectl(arguments: list[str]) -> None:
    rest = list(arguments)
    while rest and rest[0] in ("-n", "--namespace", "--context"):
        rest = rest[2:]
    verb, more = _first(rest)
    assert verb in KUBECTL, f"kubectl has no {verb!r} that the documents need; known: {', '.join(sorted(KUBECTL))}"
    folders = _option(more, "-k", "--kustomize") + ([more[0]] if verb == "kustomize" else [])
    for folder in folders:
        _files(f"{folder}/kustomization.yaml")
    for path in _option(more, "-f", "--filename"):
        if not path.startswith(("https://", "-")):
            _files(path)


KUBECTL = {
    "annotate", "apply", "create", "delete", "describe", "diff", "drain", "edit", "exec", "get", "kustomize", "label",
    "logs", "patch", "port-forward", "rollout", "scale", "top", "uncordon", "cordon", "wait",
}  # fmt: skip


def _ray(arguments: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own code
        from ray.scripts.scripts import cli as ray

    _click(ray, "ray", arguments)
    if arguments[0] in ("up", "down", "exec", "attach", "submit", "rsync-up", "rsync-down", "monitor", "get-head-ip"):
        _files(next(a for a in arguments[1:] if not a.startswith("-")))


def _serve(arguments: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own code
        from ray.serve.scripts import cli as serve

    _click(serve, "serve", arguments)
    if arguments[0] == "deploy":
        _files(next(a for a in arguments[1:] if not a.startswith("-")))


def _click(program: Any, name: str, arguments: list[str]) -> None:
    """Options and arguments as the command itself declares them; nothing of it runs."""
    import click

    context = click.Context(program, info_name=name)
    command = program.get_command(context, arguments[0])
    assert command is not None, f"{name} has no {arguments[0]!r}"
    if isinstance(command, click.Group):
        _click(command, f"{name} {arguments[0]}", arguments[1:])
        return
    try:
        command.make_parser(click.Context(command, info_name=arguments[0])).parse_args(list(arguments[1:]))
    except click.ClickException as e:
        raise AssertionError(f"{name} {arguments[0]}: {e.format_message()}") from None


def _pip(arguments: list[str]) -> None:
    assert arguments[0] in ("install", "wheel"), f"pip {arguments[0]}: teach it here"
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments[1:]:
        if found := re.search(r"\[(.*)\]", word):
            missing = set(found[1].split(",")) - set(known)
            assert not missing, f"{word}: there is no extra {missing}"


def _docker(arguments: list[str]) -> None:
    assert arguments[0] in ("build", "push", "run"), f"docker {arguments[0]}: teach it here"
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    given = {value.partition("=")[0] for value in _option(arguments, "--build-arg")}
    assert given <= declared, f"the Dockerfile declares no {given - declared}"


def _python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        ast.parse(arguments[1])
        return
    if arguments[0] != "-m":
        _options_in(arguments[0], arguments[1:])
        return
    module = arguments[1]
    if module in ("venv", "pip", "pytest"):
        {"venv": lambda _: None, "pip": _pip, "pytest": _pytest}[module](arguments[2:])
    elif module == "ernie_cluster":
        _ernie_cluster(arguments[2:])
    else:
        _options_in(module.replace(".", "/") + ".py", arguments[2:])


def _options_in(path: str, arguments: Sequence[str]) -> None:
    """A program of ours is there, and its source has each of these options."""
    _files(path)
    _words_in((ROOT / path).read_text(), path, arguments)


def _words_in(source: str, name: str, arguments: Sequence[str]) -> None:
    for word in arguments:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert re.search(rf"[\"' (]{re.escape(option)}\b", source), f"{name} has no {option}"


def _pytest(arguments: list[str]) -> None:
    takes_value = {"-k", "-m", "--timeout"}
    values = {i + 1 for i, word in enumerate(arguments) if word in takes_value}
    known = takes_value | {"--slow", "-q", "-x", "-s", "-v", "--tb"}
    for i, word in enumerate(arguments):
        if word.startswith("-"):
            assert word.partition("=")[0] in known, f"pytest {word}: teach it here"
        elif i not in values:
            _files(word.partition("::")[0])


def _script(words: Sequence[str]) -> None:
    path = words[0].removeprefix("./")
    _files(path)
    assert os.access(ROOT / path, os.X_OK), f"{path} cannot be executed"
    text = (ROOT / path).read_text()
    if "-m pytest" in text:
        _pytest(list(words[1:]))
    elif (passed := re.search(r'ernie-cluster" (\w+) "\$@"', text)) is not None:
        _ernie_cluster([passed[1], *words[1:]])
    else:
        _words_in(text, path, words[1:])


def _locust(arguments: list[str]) -> None:
    for paths in _option(arguments, "-f"):
        _files(*paths.split(","))
    sources = [*sorted((ROOT / "loadtests").rglob("*.py")), *sorted((ROOT / "ernie_cluster/bench").glob("*.py"))]
    source = "".join(path.read_text() for path in sources)
    _words_in(source, "loadtests", [a for a in arguments if a not in LOCUST])


LOCUST = {
    "--host", "--headless", "--stop-timeout", "--csv", "--master", "--worker", "--expect-workers", "--master-host",
    "--processes", "--users", "--spawn-rate", "--run-time",
}  # fmt: skip
"""Options of Locust itself; ours are read from the sources."""


def _nothing(arguments: list[str]) -> None:
    """A program of the system that changes nothing of ours, and whose arguments are the user's affair."""
    del arguments


PROGRAMS: Mapping[str, Check] = {
    "ernie-cluster": _ernie_cluster,
    "curl": check_curl,
    "grpcurl": check_grpcurl,
    "kubectl": _kubectl,
    "ray": _ray,
    "serve": _serve,
    "pip": _pip,
    "docker": _docker,
    "python": _python,
    "python3": _python,
    "pytest": _pytest,
    "locust": _locust,
    **dict.fromkeys(
        ("cat", "cd", "cp", "export", "git", "grep", "jq", "kill", "ls", "mkdir", "openssl", "."), _nothing
    ),
    **dict.fromkeys(("nvidia-smi", "sudo", "ruff", "mypy", "base64", "test"), _nothing),
}
