"""The `eval` command against made-up servers."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ernie_cluster.cli import eval as command
from ernie_cluster.cli.eval_report import Result
from ernie_cluster.cli.eval_run import Examiner, plan
from ernie_cluster.errors import ConfigError
from ernie_cluster.skills.catalog import CHINESE_SKILLS, HELD_OUT, SKILLS, draw
from ernie_cluster.skills.sample import Sample
from tests.unit.cli.oracle import Message, Oracle, Reply, call, lie, tell_truth, truth


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*argv, "--url", "http://test/v1"])


def evaluate(*argv: str, reply: Reply = tell_truth) -> tuple[int, Oracle]:
    """Exit code, and the server that was asked."""
    args = options(*argv)
    oracle = Oracle([draw(k, s, n) for k, n, s in plan(args.skills.split(","), args.samples, args.seed)], reply)
    return command.run(args, httpx.ASGITransport(oracle.app)), oracle


def written(path: Path) -> list[Result]:
    return command.read_results(path)


def test_the_truth_is_all_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "all.json"
    code, oracle = evaluate("--samples", "3", "--json", str(file))
    assert code == 0
    results = written(file)
    assert len(results) == 3 * (len(SKILLS) + len(CHINESE_SKILLS))
    assert [r.key for r in results if not r.is_right] == []
    assert all(r.num_calls_formed == r.num_calls_due for r in results)
    assert sum(r.num_calls_due for r in results) == len(oracle.bodies) - len(results) > 0
    assert all(r.iou is not None and r.iou > 0.9 for r in results if r.skill == "ground")
    out, err = capsys.readouterr()
    assert out.count("100.0 %") > len(SKILLS)
    assert "asking oracle at http://test: 60/60 questions, 60 right, 0:00 to go" in err


def test_what_is_asked_is_greedy_and_whole() -> None:
    _, oracle = evaluate("--skills", "zoom", "--samples", "4", "--max-tokens", "50", "--api-key", "k", "--model", "m")
    first, second = oracle.bodies[0], next(b for b in oracle.bodies if len(b["messages"]) > 1)
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0, 50)
    assert first["chat_template_kwargs"] == {"enable_thinking": oracle.sample_of(first).enable_thinking}
    assert "image_zoom_in_tool" in [tool["function"]["name"] for tool in first["tools"]]
    assert first["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][2]["content"][0]["type"] == "image_url"
    assert {headers["authorization"] for headers in oracle.headers} == {"Bearer k"}


def test_low_accuracy_fails_only_when_it_is_to(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--skills", "count,tool", "--samples", "3")
    assert evaluate(*few, reply=lie)[0] == 0
    assert "0/9" in capsys.readouterr().out
    assert evaluate(*few, "--fail-under", "1", reply=lie)[0] == 1
    assert evaluate(*few, "--fail-under", "100")[0] == 0


@pytest.mark.parametrize("message", [call("no_such_tool", "{}"), call("image_zoom_in_tool", "{"), call("", "[]")])
def test_a_call_that_cannot_be_run_is_wrong_and_ends_the_question(message: Message, tmp_path: Path) -> None:
    async def blunder(sample: Sample, is_after_call: bool) -> Message:
        return message

    file = tmp_path / "r.json"
    code, oracle = evaluate("--skills", "zoom", "--samples", "2", "--json", str(file), reply=blunder)
    assert (code, len(oracle.bodies)) == (0, 2)
    assert [(r.is_right, r.num_calls_due, r.num_calls_formed, r.error) for r in written(file)] == [
        (False, 1, 0, "")
    ] * 2


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (JSONResponse({"error": {"message": "no room"}}, 429), "no room (HTTP 429)"),
        (PlainTextResponse("bad gateway", 502), "bad gateway (HTTP 502)"),
        (JSONResponse({"choices": []}), "not an answer in OpenAI's shape"),
        (JSONResponse([1]), "not an answer in OpenAI's shape"),
        (PlainTextResponse("hello\x1b[2J"), "not an answer in OpenAI's shape"),
    ],
)
def test_errors_are_counted_apart_and_the_first_is_told(
    response: Response, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuse_half(sample: Sample, is_after_call: bool) -> Message | Response:
        return response if sample.language == "zh" else truth(sample, is_after_call)

    few = ("--skills", "colour,motion", "--samples", "2")
    assert evaluate(*few, reply=refuse_half)[0] == 0
    out = capsys.readouterr().out
    assert f"first error: {words}" in out
    assert "\x1b" not in out
    assert "4/4" in out
    assert evaluate(*few, "--fail-under", "70", reply=refuse_half)[0] == 1, "no answer is no right answer"


def test_no_answer_at_all_fails() -> None:
    async def refuse(sample: Sample, is_after_call: bool) -> Response:
        return PlainTextResponse("", 503)

    assert evaluate("--skills", "talk", "--samples", "2", reply=refuse)[0] == 1


def test_an_answer_has_a_deadline(capsys: pytest.CaptureFixture[str]) -> None:
    async def hang(sample: Sample, is_after_call: bool) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    assert evaluate("--skills", "shape", "--samples", "1", "--timeout", "0.05", reply=hang)[0] == 1
    assert "first error: no answer within 0.05 s; see --timeout" in capsys.readouterr().out


def test_no_more_than_so_many_at_a_time() -> None:
    num_running = 0
    most: list[int] = []

    async def count(sample: Sample, is_after_call: bool) -> Message:
        nonlocal num_running
        num_running += 1
        most.append(num_running)
        for _ in range(20):  # turns of the loop, so that all who may come have come
            await asyncio.sleep(0)
        num_running -= 1
        return truth(sample, is_after_call)

    evaluate("--skills", "count", "--samples", "6", "--concurrency", "3", reply=count)
    assert max(most) == 3


def test_results_keep_the_order_of_the_questions(tmp_path: Path) -> None:
    questions = plan(["count", "tool", "talk"], 3, seed=0)

    async def backwards(sample: Sample, is_after_call: bool) -> Message:
        for _ in range({"count": 60, "tool": 20, "talk": 0}[sample.skill]):
            await asyncio.sleep(0)
        return truth(sample, is_after_call)

    file = tmp_path / "r.json"
    evaluate(
        "--skills", "count,tool,talk", "--samples", "3", "--concurrency", "15", "--json", str(file), reply=backwards
    )
    assert [r.key for r in written(file)] == questions


def test_each_question_counts_for_the_skill_that_was_asked_for(tmp_path: Path) -> None:
    """Some of `tool` need none, and are drawn as another skill's."""
    questions = plan(["tool"], 30, seed=0)
    assert any(draw(skill, seed, "en").skill != "tool" for skill, _, seed in questions)
    evaluate("--skills", "tool", "--samples", "30", "--json", str(tmp_path / "r.json"))
    assert [r.key for r in written(tmp_path / "r.json")] == questions


def test_comparing_and_insisting_on_the_same_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "before.json"
    few = ("--skills", "count", "--samples", "2")
    same = (*few, "--compare", str(file), "--same-answers")
    assert evaluate(*few, "--json", str(file))[0] == 0
    assert evaluate(*same)[0] == 0
    assert evaluate(*same, reply=lie)[0] == 1
    out = capsys.readouterr().out
    assert f"compared with {file}:" in out
    assert ["count", "en", "2", "100.0", "%", "0.0", "%", "-100.0", "2"] in [line.split() for line in out.splitlines()]
    assert evaluate(*few, "--compare", str(file), reply=lie)[0] == 0
    assert evaluate(*same, "--seed", "1")[0] == 1, "no question in common"


def test_failures_are_kept_with_what_was_shown(tmp_path: Path) -> None:
    evaluate("--skills", "compare,motion,talk,zoom", "--samples", "1", "--save-failures", str(tmp_path / "a" / "b"), reply=lie)  # fmt: skip
    folder = tmp_path / "a" / "b"
    lines = [json.loads(line) for line in (folder / "failures.jsonl").read_text("utf-8").splitlines()]
    shown = {line["skill"]: line["shown"] for line in lines}
    assert {skill: len(names) for skill, names in shown.items()} == {"compare": 2, "motion": 1, "talk": 0, "zoom": 1}
    assert {line["got"] for line in lines} == {"no idea"}
    assert [line["wanted"] for line in lines if line["skill"] == "compare"] == [draw("compare", HELD_OUT).answer]
    with Image.open(folder / shown["motion"][0]) as film, Image.open(folder / shown["zoom"][0]) as picture:
        assert getattr(film, "n_frames", 1) > 1
        assert picture.size == draw("zoom", HELD_OUT).pictures[0].image.size


def test_json_on_standard_output_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("--skills", "talk", "--samples", "1", "--json")
    out, err = capsys.readouterr()
    whole = json.loads(out)
    assert (whole["model"], whole["url"], len(whole["results"])) == ("oracle", "http://test", 2)
    assert "accuracy" in err


def test_interrupted_it_tells_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    async def interrupt(sample: Sample, is_after_call: bool) -> Message:
        if sample.skill == "talk":
            raise KeyboardInterrupt
        return truth(sample, is_after_call)

    code, _ = evaluate("--skills", "tool,talk", "--samples", "2", "--concurrency", "1", reply=interrupt)
    assert code == 130
    assert "2/2" in capsys.readouterr().out


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(argparse.Namespace(**{**vars(options("--model", "m")), "url": "http://127.0.0.1:9"})) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--skills", "count,juggle"], "unknown 'juggle'; known: colour"),
        (["--skills", ","], "known: colour"),
        (["--same-answers"], "--same-answers needs --compare FILE"),
        (["--compare", "/nowhere.json"], "/nowhere.json: not what --json writes"),
        (["--json", "/nowhere/x.json"], "/nowhere/x.json: cannot be written"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_asked(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        command.run(options(*argv))


@pytest.mark.parametrize("content", ["{", "[]", '{"results": [{"skill": "count"}]}', '{"results": 3}'])
def test_a_file_that_is_no_evaluation_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match="not what --json writes"):
        command.read_results(tmp_path / "x.json")


@pytest.mark.parametrize("argv", [["--samples", "0"], ["--concurrency", "x"], ["--timeout", "-1"], ["--seed", "-1"]])
def test_numbers_out_of_bounds_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*argv)
    assert argv[0] in capsys.readouterr().err


def test_a_seed_has_questions_of_its_own_and_more_samples_only_add() -> None:
    first = plan(["count", "zoom"], 3, 0)
    assert {seed for _, _, seed in first} == {HELD_OUT, HELD_OUT + 1, HELD_OUT + 2}
    assert set(first) < set(plan(["count", "zoom"], 4, 0))
    assert set(first).isdisjoint(plan(["count", "zoom"], 1000, 1))


@pytest.mark.parametrize(
    ("num_done", "elapsed_s", "words"), [(1, 2.0, "1/10 questions, 1 right, 0:18 to go"), (4, 100.0, "2:30 to go")]
)
def test_the_time_to_go_follows_the_pace(num_done: int, elapsed_s: float, words: str) -> None:
    results = [Result("count", "en", i, "", "", is_right=True) for i in range(num_done)]
    assert words in command.progress_text(results, 10, elapsed_s)


def test_latency_is_of_the_whole_question() -> None:
    ticks = iter([10.0, 13.5])
    sample = draw("zoom", HELD_OUT)

    async def examine() -> Result:
        transport: Any = httpx.ASGITransport(Oracle([sample]).app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await Examiner(client, "oracle", clock=lambda: next(ticks)).examine(
                sample, (sample.skill, "en", HELD_OUT)
            )

    assert asyncio.run(examine()).latency_s == 3.5
