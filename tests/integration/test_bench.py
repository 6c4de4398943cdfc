"""`ernie-cluster bench` and the Locust load tests against the API over a fake backend: what they count is what was served."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

from ernie_cluster.bench.grpc_asking import ask as ask_grpc
from ernie_cluster.bench.grpc_asking import chat_request
from ernie_cluster.bench.scenarios import SCENARIOS
from ernie_cluster.bench.sync_asking import Asker
from ernie_cluster.cli.main import main
from ernie_cluster.client import Client
from ernie_cluster.errors import ConfigError, Overloaded
from tests.fakes import say
from tests.site import Site

ROOT = Path(__file__).parents[2]
needs_locust = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason='Locust is not installed: pip install -e ".[loadtests]"'
)
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site().running() as running:
        yield running


def counted(site: Site) -> tuple[float, float, float]:
    """(requests, prompt tokens, output tokens) that the server has counted over HTTP."""
    text = httpx.get(site.url + "/metrics").text

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf'^{name}{{.*model="tiny".*}} (\S+)$', text, re.M)))

    return total("ernie_request_total"), total("ernie_prompt_tokens_total"), total("ernie_generation_tokens_total")


# the command


def bench(*argv: str, capsys: pytest.CaptureFixture[str], file: Path) -> tuple[int, str, list[dict[str, Any]]]:
    """(exit code, what it printed, its figures of each server)."""
    code = main(["bench", *argv, "--json", str(file)])
    servers: list[dict[str, Any]] = json.loads(file.read_text())["servers"] if file.exists() else []
    return code, capsys.readouterr().out, servers


def test_bench_counts_what_the_server_counts(site: Site, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = counted(site)
    svg = tmp_path / "course.svg"
    argv = ["--url", site.url + "/v1", "--scenario", "mixed", "--shrink", "30", "--requests", "20", "--warm-up", "0"]
    code, out, (told,) = bench(*argv, "--svg", str(svg), capsys=capsys, file=tmp_path / "out.json")
    assert code == 0, out
    assert (told["requests"], told["whole"], told["errors"]) == (20, 20, {})
    seen = (told["requests"], told["prompt_tokens"], told["output_tokens"])
    assert seen == tuple(b - a for a, b in zip(before, counted(site), strict=True))
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert "TTFT p99" in out


@pytest.mark.parametrize(
    "pace",
    [["--rate", "200"], ["--trace", "azure-chat", "--speed", "500"], ["--concurrency", "2"], ["--for", "300ms"]],
)
def test_every_pace_ends(site: Site, pace: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    length = [] if pace[0] == "--for" else ["--requests", "10"]
    argv = ["--url", site.url, *pace, *length, "--shrink", "50"]
    code, out, (told,) = bench(*argv, capsys=capsys, file=tmp_path / "out.json")
    assert code == 0, out
    assert told["whole"] == told["requests"] > 0
    assert told["requests"] == 10 or not length


def test_two_servers_are_compared(site: Site, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--url", site.url, "--vs", site.url, "--rounds", "2", "--requests", "6", "--shrink", "30"]
    code, out, (this, other) = bench(*argv, capsys=capsys, file=tmp_path / "out.json")
    assert code == 0, out
    assert (this["requests"], this["output_tokens"]) == (other["requests"], other["output_tokens"])
    assert re.search(r"^requests +6 +6 +1\.00x$", out, re.M), out


def test_a_load_that_the_model_cannot_take_is_refused_with_the_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Site(max_model_len=256).running() as small:
        assert main(["bench", "--url", small.url, "--scenario", "long"]) == 2
        assert "--shrink 34" in capsys.readouterr().err
        assert main(["bench", "--url", small.url, "--scenario", "long", "--shrink", "300", "--requests", "2"]) == 0


def test_errors_are_told_by_kind_and_are_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with Site().running() as full:
        full.backend.script = [Overloaded("no room", 3.0)]
        assert main(["bench", "--url", full.url, "--requests", "3"]) == 1
    assert re.search(r"^  3 x HTTP (429|503): no room", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--scenario", "chatt"], "none of chat, long"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--rounds", "2"], "--rounds is for --vs"),
        (["--rounds", "2", "--vs", "http://x", "--trace", "azure-chat"], "played once"),
        (["--json", "no/such/folder/x.json"], "no such folder"),
    ],
)
def test_what_cannot_work_is_said_at_once(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--rate", "0"], ["--requests", "none"], ["--for", "1 day"], ["--slo-ttft", "fast"]])
def test_values_out_of_range_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *argv])
    assert argv[0] in capsys.readouterr().err


def test_a_server_that_is_down_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["bench", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in [*SCENARIOS, "goodput", "--concurrency", "--vs", "examples:"])


# clients of the load tests, as plain threads have them


def test_both_clients_see_the_same_of_an_answer(site: Site) -> None:
    body = SCENARIOS["pictures"].choose(0, 0).body("tiny", 0, 0)
    asker = Asker(site.url + "/v1", {}, 30.0)
    assert [card["id"] for card in asker.models()] == ["tiny"]
    over_http = asker.ask("pictures", body)
    with Client(site.grpc_target, timeout_s=30.0) as client:
        over_grpc = ask_grpc(client, "pictures", chat_request(body))
    asker.close()
    for record in (over_http, over_grpc):
        assert record.error == "", record.detail
        assert record.num_tokens == body["max_tokens"]
        assert record.ttft_s is not None
        assert len(record.gaps_s) > 0, "the answer came in one piece"
        assert record.ttft_s + sum(record.gaps_s) <= record.latency_s
    assert over_http.num_prompt_tokens == over_grpc.num_prompt_tokens > 0


def test_both_clients_name_errors_and_go_on() -> None:
    body = SCENARIOS["chat"].choose(0, 0).body("nobody", 0, 0)
    with Site().running() as site, Client(site.grpc_target, timeout_s=30.0) as client:
        asker = Asker(site.url, {}, 30.0)
        assert asker.ask("chat", body).error == "HTTP 404"
        assert ask_grpc(client, "chat", chat_request(body)).error == "UnknownModel"
        site.backend.script = [*say("abc", finish_reason=None), RuntimeError("gone")]
        assert asker.ask("chat", body | {"model": "tiny"}).error == "error in stream"
        asker.close()
    assert asker.ask("chat", body).error == "connection"


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no address"):
        Asker("localhost:8000", {}, 1.0)


# Locust, in processes of its own: it patches the standard library


def locust(*argv: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "locust", "--shrink", "20", "--stop-timeout", "10", *argv]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What it has said, now that it has ended well."""
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, out[-3000:]
    assert "Traceback" not in out, out[-3000:]
    return out


def until(is_so: Callable[[], object], processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait while all of these run."""
    deadline_s = time.monotonic() + 60
    while not is_so():
        for process in processes:
            assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline_s, "nothing came of it"
        time.sleep(0.05)


@dataclass(frozen=True)
class Files:
    """What a run leaves behind."""

    folder: Path

    @property
    def options(self) -> list[str]:
        return [f"--csv={self.folder}/run", f"--json-file={self.folder}/stats", f"--svg={self.folder}/run.svg"]

    def total(self) -> dict[str, str]:
        """The row of all scenarios; every figure is there, and Locust itself has counted the same requests."""
        with (self.folder / "run_tokens.csv").open(encoding="utf-8", newline="") as file:
            total = {row["Scenario"]: row for row in csv.DictReader(file)}["Aggregated"]
        own = json.loads((self.folder / "stats.json").read_text())
        assert sum(entry["num_requests"] for entry in own) == int(total["# Requests"])
        assert float(total["TTFT p50 (ms)"]) <= float(total["E2E p99 (ms)"])
        assert ElementTree.parse(self.folder / "run.svg").getroot().tag.endswith("svg")
        return total


@needs_locust
@pytest.mark.parametrize("way", ["http", "grpc"])
def test_locust_counts_what_was_served(site: Site, way: str, tmp_path: Path) -> None:
    before, files = len(site.backend.finished), Files(tmp_path)
    host = site.url if way == "http" else site.grpc_target
    argv = ["--headless", "-f", f"loadtests/over_{way}.py", "--host", host, "-u", "3", "-r", "9", "--scenario", "mixed"]
    process = locust(*argv, *files.options)
    until(lambda: len(site.backend.finished) - before >= 10, [process])
    process.terminate()
    out = ended(process)
    total = files.total()
    assert total["# Errors"] == "0", out[-3000:]
    # a user that is stopped may have been answered in full just before
    assert 10 - 3 <= int(total["# Requests"]) <= len(site.backend.finished) - before
    assert "TTFT p99" in out


@needs_locust
def test_a_shape_leads_a_run_to_its_end(site: Site) -> None:
    argv = ["--headless", "-f", "loadtests/over_http.py,loadtests/shapes/steps.py", "--host", site.url, "-u", "4"]
    out = ended(locust(*argv, "--step-time", "400ms", "--only-summary"))
    assert "Shape test updating to 1 users" in out
    assert "Shape test completed" in out


@needs_locust
def test_the_web_ui_shows_tokens_while_it_runs(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    web = f"http://127.0.0.1:{port}"
    argv = ["-f", "loadtests/over_http.py", "--host", site.url, "-u", "1", "--autostart"]
    process = locust(*argv, "--web-host", "127.0.0.1", "--web-port", str(port))
    told: dict[str, Any] = {}

    def has_answers() -> bool:
        with contextlib.suppress(httpx.TransportError, ValueError):
            told.update(httpx.get(web + "/stats/requests").json())
        return bool(told) and told["extended_stats"][0]["data"][-1]["requests"] > 0

    try:
        until(has_answers, [process])
        assert told["extended_stats"][0]["data"][-1]["name"] == "Aggregated"
        assert '"title": "Tokens"' in httpx.get(web).text
        scenarios = [row["Scenario"] for row in csv.DictReader(httpx.get(web + "/tokens/csv").text.splitlines())]
        assert scenarios == ["chat", "Aggregated"]
        assert ElementTree.fromstring(httpx.get(web + "/tokens/svg").text).tag.endswith("svg")
    finally:
        process.terminate()
    ended(process)


def heard(path: Path) -> bool:
    """Whether Locust's own statistics have any request."""
    if not path.exists():
        return False
    with path.open(encoding="utf-8", newline="") as file:
        return any(row["Name"] == "Aggregated" and int(row["Request Count"]) for row in csv.DictReader(file))


@needs_locust
def test_the_master_has_what_all_workers_saw(site: Site, tmp_path: Path) -> None:
    before, files = len(site.backend.finished), Files(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    common = ["--headless", "-f", "loadtests/over_http.py"]
    leading = [
        "--master",
        "--master-bind-port",
        port,
        "--expect-workers",
        "2",
        "--host",
        site.url,
        "-u",
        "4",
        "-r",
        "9",
    ]
    processes = [locust(*common, *leading, *files.options)]
    processes += [locust(*common, "--worker", "--master-port", port) for _ in range(2)]
    until(lambda: heard(tmp_path / "run_stats.csv"), processes)
    processes[0].terminate()
    for process in processes:
        ended(process)
    assert 0 < int(files.total()["# Requests"]) <= len(site.backend.finished) - before
