"""The commands that deploy/ gives for this machine, on a machine of their own, one after the other: deploy, ask, add a replica,
change the configuration while answers run, make a mistake, take it all away."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.application import CHAT, chat_body, eventually
from tests.e2e.machine import ROOT, Machine, obstacle

pytestmark = pytest.mark.slow  # minutes

CLUSTER = ROOT / "deploy/ray-up.local-cpu.pocket.yaml"
SERVE = ROOT / "deploy/serve.pocket.yaml"
MODEL = "ernie-pocket"
STORY = chat_body(MODEL, "What can you do?", max_tokens=300)
START_TIMEOUT_S = 300.0

_ASK_BY_GRPC = """
from ernie_cluster.client import Client, user
with Client("localhost:9000") as client:
    print(client.chat("{model}", [user("{text}")], sampling={{"max_tokens": 8}}).choices[0].message.text)
"""


def documented() -> list[str]:
    """What the cluster file's header says to run, in its order; `ray up` needs ssh, so it stands for its own last command."""
    lines = CLUSTER.read_text(encoding="utf-8").splitlines()
    begin = lines.index("# Run, from the folder above this one:") + 1
    told = [line.removeprefix("#").partition("  #")[0].strip() for line in lines[begin : lines.index("#", begin)]]
    start = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))["head_start_ray_commands"][-1]
    return [start if command.startswith("ray up ") else command for command in told]


@dataclass
class Deployed:
    """The application on its machine, by what an operator has: commands, curl, files."""

    machine: Machine
    folder: Path
    told: list[str] = field(default_factory=documented)
    """What is still to be run."""

    def follow(self, until: str) -> str:
        """Run the documented commands up to the first that begins so; what that one said."""
        while self.told:
            command = self.told.pop(0)
            if command.startswith("export ") and ";" not in command:  # of this shell, for all that follow
                name, _, value = command.removeprefix("export ").partition("=")
                self.machine.environment[name] = value
                continue
            said = self.machine.run(command)
            if command.startswith(until):
                return said
        raise AssertionError(f"nowhere is said to run {until!r}")

    def deploy(self, document: dict[str, Any]) -> None:
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(document))
        self.machine.run(f"serve deploy {path}")

    def get(self, path: str) -> dict[str, Any]:
        """Its body, or {} when there is none of JSON."""
        said = self.machine.run(f"curl -s -m 20 127.0.0.1:8000{path} || true")
        try:
            found: dict[str, Any] = json.loads(said)
        except ValueError:
            return {}
        return found

    def post(self, name: str, body: dict[str, Any]) -> subprocess.Popen[str]:
        """Ask; the answer goes to the file of that name, its status behind it."""
        (self.folder / f"{name}.json").write_text(json.dumps(body))
        (self.folder / name).write_text("")
        return self.machine.start(
            f"curl -sN -m 300 -w ' %{{http_code}}' -H 'content-type: application/json' -d @{self.folder}/{name}.json"
            f" localhost:8000{CHAT} > {self.folder}/{name}"
        )

    def answer(self, name: str) -> str:
        return (self.folder / name).read_text()

    def replicas(self) -> dict[str, str]:
        """Those that are ready: id -> role."""
        view = self.get("/admin/status")
        return {r["replica"]: r["role"] for r in view.get("replicas", []) if r["phase"] == "ready"}

    def wait_until_ready(self) -> None:
        def objection() -> str:
            said = self.get("/ready")
            return "" if said.get("ready") is True else f"not ready: {said}"

        eventually(objection, START_TIMEOUT_S)


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployed]:
    if why := obstacle():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="ed", dir="/tmp"))  # not pytest's: a socket's path must be short
    machine = Machine(folder)
    try:
        site = Deployed(machine, folder)
        site.follow("serve deploy")
        site.wait_until_ready()
        yield site
    finally:
        machine.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(SERVE.read_text(encoding="utf-8"))
    return copy.deepcopy(found)


def test_it_answers_over_http_and_grpc_and_says_that_it_runs(deployed: Deployed) -> None:
    assert f"{MODEL}-decode:" in deployed.follow("serve status")
    eventually(lambda: "" if "status: RUNNING" in (said := deployed.machine.run("serve status")) else said, 60)
    assert '"ready":true' in deployed.follow("curl")
    assert deployed.post("hello", chat_body(MODEL, "Hello", max_tokens=8)).wait(60) == 0
    body, _, status = deployed.answer("hello").rpartition(" ")
    assert status == "200", body
    text = json.loads(body)["choices"][0]["message"]["content"]
    script = deployed.folder / "ask.py"
    script.write_text(_ASK_BY_GRPC.format(model=MODEL, text="Hello"))
    assert text
    assert deployed.machine.run(f"python {script}").strip()


def test_another_number_of_replicas_touches_no_other(deployed: Deployed, document: dict[str, Any]) -> None:
    before = deployed.replicas()
    assert sorted(before.values()) == ["decode", "prefill", "vision"]
    (decode,) = [d for d in document["applications"][0]["deployments"] if d["name"] == f"{MODEL}-decode"]
    decode["num_replicas"] = 2
    deployed.deploy(document)
    eventually(lambda: "" if len(deployed.replicas()) == 4 else f"{deployed.replicas()}", START_TIMEOUT_S)
    after = deployed.replicas()
    assert before.items() <= after.items()
    assert sorted(after.values()) == ["decode", "decode", "prefill", "vision"]


def test_a_changed_configuration_takes_over_while_answers_run(deployed: Deployed, document: dict[str, Any]) -> None:
    assert deployed.post("alone", STORY).wait(120) == 0
    wanted = json.loads(deployed.answer("alone").rpartition(" ")[0])["choices"][0]["message"]["content"]
    before = deployed.replicas()
    document["applications"][0]["args"]["router"] = {"retry_after_s": 0.5}
    streams = [deployed.post("stream0", STORY | {"stream": True})]
    eventually(lambda: "" if deployed.answer("stream0").count("data:") > 3 else "no answer yet", 60)
    deployed.deploy(document)
    deadline = time.monotonic() + START_TIMEOUT_S
    while (there := deployed.replicas()).keys() & before.keys() or len(there) != 3:
        assert time.monotonic() < deadline, f"{there} after {before}"
        if streams[-1].poll() is not None:  # at any time one runs
            streams.append(deployed.post(f"stream{len(streams)}", STORY | {"stream": True}))
        assert deployed.post("short", chat_body(MODEL, "Hello", max_tokens=4)).wait(120) == 0
        assert deployed.answer("short").endswith(" 200"), deployed.answer("short")
    for number, stream in enumerate(streams):
        assert stream.wait(300) == 0
        said, _, status = deployed.answer(f"stream{number}").rpartition(" ")
        chunks = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: ")]
        assert (status, chunks.pop()) == ("200", "[DONE]"), said[-500:]
        choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
        assert "".join(c["delta"].get("content") or "" for c in choices) == wanted
        assert choices[-1]["finish_reason"] == "length"


def test_a_mistake_is_said_and_what_runs_goes_on(deployed: Deployed, document: dict[str, Any]) -> None:
    before = deployed.replicas()
    document["applications"][0]["args"]["rooter"] = {}
    deployed.deploy(document)

    def objection() -> str:
        said = deployed.machine.run("serve status")
        return "" if "status: DEPLOY_FAILED" in said and "unknown key 'rooter'" in said else said

    eventually(objection, 60)
    assert deployed.replicas() == before
    assert deployed.post("still", chat_body(MODEL, "Hello", max_tokens=4)).wait(60) == 0
    assert deployed.answer("still").endswith(" 200")


def test_it_goes_without_a_rest(deployed: Deployed) -> None:
    deployed.follow("serve deploy")  # mended
    deployed.follow("serve shutdown")
    ours = "ray::ServeReplica", "ray::EngineRank", "ray::VisionRank", "haproxy"
    eventually(lambda: str([p for word in ours for p in deployed.machine.processes(word)] or ""), 120)
    deployed.follow("ray stop")
    assert deployed.told == []
    eventually(
        lambda: str([p for w in ("ray::", "raylet", "gcs_server") for p in deployed.machine.processes(w)] or ""), 30
    )
