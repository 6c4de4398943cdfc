"""`ernie-cluster doctor`: what would not work, before anything is served. Starts nothing, and fetches nothing."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from ernie_cluster.cli.config import add_config_arguments, read_config
from ernie_cluster.cli.doctor_view import listed, render
from ernie_cluster.cli.hub import cached_folder
from ernie_cluster.cli.progress import Progress
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.load import ENV_PREFIX
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.doctor.checks import CHECKS, facts_of, judge, judge_plan
from ernie_cluster.doctor.finding import Finding, exit_code
from ernie_cluster.doctor.gather import gather
from ernie_cluster.doctor.need import Need
from ernie_cluster.errors import ConfigError

_EXAMPLES = f"""\
Without CONFIG it checks what every configuration asks of a machine. With one, checkpoints, ports, GPUs and memory are held
against it, of checkpoints the headers only. --cluster asks every node of a Ray cluster, and tries the ways between them: TCP, and
NCCL where two nodes have a free GPU. It may run beside a server.

ok       as it should be
warning  it works, though slower or not for ever
problem  it will not work; the exit code is 1, else 0
skipped  nobody can tell, and why

checks:  {", ".join(check.name for check in CHECKS)}

examples:
  ernie-cluster doctor
  ernie-cluster doctor cluster.yaml
  ernie-cluster doctor cluster.yaml --cluster            on a machine of the Ray cluster, before `serve --address auto`
  ernie-cluster doctor cluster.yaml --only checkpoints,plan --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_config_arguments(parser)
    parser.add_argument("--only", metavar="NAME,...", type=_names, default=None, help="these checks alone, see --list")
    parser.add_argument("--list", action="store_true", help="say what the checks are, and end")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--cluster", action="store_true", help="check every node of a Ray cluster, and what lies between"
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of that cluster, and asks for --cluster (default: $RAY_ADDRESS, else auto)",
    )


def main(args: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    if args.list:
        console.print(listed())
        return 0
    names = frozenset(args.only or (check.name for check in CHECKS))
    is_cluster = args.cluster or args.address is not None
    need, config_findings = understand(args, is_whole=not is_cluster)
    findings = config_findings if "config" in names else []
    if is_cluster:
        findings += of_cluster(names, need, args.address or os.environ.get("RAY_ADDRESS") or "auto")
    else:
        findings += of_machine(names, need)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        console.print(render(findings))
    return exit_code(findings)


def understand(args: argparse.Namespace, *, is_whole: bool) -> tuple[Need, list[Finding]]:
    """What the configuration asks for, as far as it can be read, and what is wrong with it."""
    if not (args.config or args.overrides or any(name.startswith(ENV_PREFIX) for name in os.environ)):
        return Need(is_whole=is_whole), [Finding("config", "skipped", "no CONFIG was given")]
    try:
        config = read_config(args)
    except ConfigError as e:
        return Need(is_whole=is_whole), [_of_error(e)]
    models = tuple(replace(model, path=cached_folder(model.path)) for model in config.models)
    config = replace(config, models=models)
    shapes: dict[str, ModelConfig] = {}
    findings: list[Finding] = []
    for model in config.models:
        if not (is_whole or Path(model.path).exists()):
            continue  # a machine of the cluster may have it
        if Path(model.path).exists() or Path(model.path).is_absolute():
            try:
                shapes[model.name] = ModelConfig.from_folder(model.path)
            except ConfigError as e:
                findings.append(_of_error(e))
    if len(shapes) == len(config.models):
        findings += _beside_shapes(config)
    if any(finding.level == "problem" for finding in findings):
        return Need(config, {}, is_whole), findings
    num = len(config.models)
    seen = f"{num} model{'' if num == 1 else 's'}, {sum(len(model.pools) for model in config.models)} pools"
    return Need(config, shapes, is_whole), [*findings, Finding("config", "ok", seen)]


def _beside_shapes(config: ClusterConfig) -> Iterator[Finding]:
    """What `serve` checks before it starts anything."""
    try:
        from ernie_cluster.actors import launch

        launch.check(config)
    except ImportError as e:
        yield Finding("config", "skipped", f"not held against its checkpoints: Ray cannot be imported ({e})")
    except ConfigError as e:
        yield _of_error(e)


def of_machine(names: frozenset[str], need: Need) -> list[Finding]:
    """The checks of this machine, and of the configuration on it."""
    facts = gather(sorted(facts_of("machine", names) | facts_of("all", names)), need)
    findings = list(judge("machine", names, need, facts))
    return findings + (list(judge_plan(need, [facts])) if "plan" in names else [])


def of_cluster(names: frozenset[str], need: Need, address: str) -> list[Finding]:
    """The checks of every node, of the configuration on all of them, and of what lies between; raises ConfigError."""
    progress = Progress()
    progress(f"joining the Ray cluster at {address}")
    from ernie_cluster.actors import checkup  # Ray takes a second to import

    checkup.connect(address)
    try:
        progress("asking every node")
        nodes = checkup.facts_of_nodes(facts_of("machine", names) | facts_of("all", names), need)
        progress(f"trying what lies between {len(nodes)} nodes")
        between = checkup.facts_between(facts_of("cluster", names), need, list(nodes))
    finally:
        checkup.disconnect()
    sound = {node: facts for node, facts in nodes.items() if not node.error}
    findings = [f for node, facts in sound.items() for f in judge("machine", names, need, facts, node.name)]
    if "plan" in names:
        findings += judge_plan(need, list(sound.values()))
    return findings + list(judge("cluster", names, need, between))


def _of_error(error: ConfigError) -> Finding:
    """The first half of our messages says what is wrong, the second what to do."""
    what, _, remedy = str(error).partition("; ")
    return Finding("config", "problem", what, "a configuration that can work", remedy or "see `ernie-cluster config`")


def _names(text: str) -> tuple[str, ...]:
    """Value of --only; raises ArgumentTypeError."""
    known = [check.name for check in CHECKS]
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"no check is called {name!r}; {_remedy(name, known)}")
    if not names:
        raise argparse.ArgumentTypeError("it names no check; --list shows them")
    return names


def _remedy(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "--list shows them"
