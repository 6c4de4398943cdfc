"""The walk of the demo against a made-up server, and what it serves; the real thing is in tests/e2e."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from ernie_cluster.cli import demo, local
from ernie_cluster.cli.demo_pictures import framed, steps
from ernie_cluster.cli.demo_walk import Walk, timeline_lines
from ernie_cluster.cli.main import main
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.presets import POCKET
from ernie_cluster.errors import CheckpointError
from ernie_cluster.skills.judge import judge
from ernie_cluster.skills.sample import Sample
from ernie_cluster.skills.tools import next_turn
from tests.unit.cli.oracle import Message, Oracle, truth

TIMELINE = [
    {"name": "prefill", "start_s": 5.0, "duration_s": 0.03, "tokens": 1234},
    {"name": "decode", "start_s": 5.03, "duration_s": 0.01},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(message: Message) -> Iterator[dict[str, Any]]:
    """The message in pieces, as a server streams it; a character or two at a time."""

    def chunk(**delta: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta}]}

    yield chunk(role="assistant", content="")
    for key in ("reasoning_content", "content"):
        text = message.get(key) or ""
        yield from (chunk(**{key: text[i : i + 2]}) for i in range(0, len(text), 2))
    for i, call in enumerate(message.get("tool_calls", ())):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield chunk(tool_calls=[{"index": i, "function": {"name": name, "arguments": ""}}])
        yield from (chunk(tool_calls=[{"index": i, "function": {"arguments": c}}]) for c in arguments)
    usage = {"prompt_tokens": 75, "completion_tokens": 11, "total_tokens": 86}
    yield {"choices": [], "usage": usage, "timeline": TIMELINE}


def walk(tmp_path: Path, out: io.StringIO, say: Callable[[Sample, bool], Message] = truth) -> str:
    """Take all steps with a server that says that; what was shown."""
    oracle = Oracle([step.sample for step in steps()])

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        message = say(oracle.sample_of(body), len(body["messages"]) > 1)
        lines = [json.dumps({"id": "c", "object": "chat.completion.chunk", **event}) for event in events(message)]
        text = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})

    client = openai.OpenAI(
        base_url="http://test/v1", api_key="none", http_client=httpx.Client(transport=httpx.MockTransport(answer))
    )
    ticks = iter(range(100_000))
    taken = Walk(client, "pocket", tmp_path, out, clock=lambda: next(ticks) * 0.001)
    for number, step in enumerate(steps(), start=1):
        assert taken.take(number, step).timeline == TIMELINE
    return out.getvalue()


def test_right_answers_get_a_tick_and_every_picture_that_is_named_is_there(tmp_path: Path) -> None:
    shown = walk(tmp_path, io.StringIO())
    assert (shown.count("✓ right"), shown.count("✗")) == (4, 0)
    names = {word.rstrip(",;") for word in shown.split() if ".png" in word}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert len(names) == 6
    assert "75 prompt tokens, first token after 1 ms, then " in shown
    assert "\x1b" not in shown


def test_each_kind_of_text_has_its_line(tmp_path: Path) -> None:
    lines = walk(tmp_path, io.StringIO()).splitlines()
    zoom = [line.split()[0] for line in lines[lines.index("  4. Think with images: zoom in by a tool call") :] if line]
    assert zoom == ["4.", "shown", "asked", "calls", "gets", "says", "✓"]
    (call,) = (line for line in lines if line.startswith("    calls"))
    name, _, arguments = call.removeprefix("    calls   ").partition(" ")
    assert name == "image_zoom_in_tool"
    assert set(json.loads(arguments)) == {"bbox_2d", "label"}


def test_thoughts_are_dim_on_a_terminal(tmp_path: Path) -> None:
    def muse(sample: Sample, is_after_call: bool) -> Message:
        return truth(sample, is_after_call) | {"reasoning_content": "hm"}

    assert "    thinks  \x1b[2mhm\x1b[0m" in walk(tmp_path, Terminal(), muse)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "a cow\x1b[2J"},
        {"content": '{"bbox_2d":[0,0,1,1]}'},
        {"content": ""},
        {"tool_calls": [{"function": {"name": "image_zoom_in_tool", "arguments": '{"bbox_2d": [5, 5, 5, 5]}'}}]},
        {"tool_calls": [{"function": {"name": "calculator", "arguments": "{"}}]},
    ],
)
def test_whatever_a_model_says_the_walk_goes_on(message: Message, tmp_path: Path) -> None:
    shown = walk(tmp_path, io.StringIO(), lambda sample, is_after_call: message)
    assert shown.count("✗ expected") == 4
    assert "✗ expected 85" in shown
    assert "✗ expected a usable call of image_zoom_in_tool" in shown
    assert "\x1b" not in shown


def test_the_questions_are_answered_by_their_own_answers() -> None:
    for step in steps():
        sample = step.sample
        if sample.tool_call is not None:
            assert judge(sample, "", [sample.tool_call]), "the box holds the sign"
            sample = next_turn(sample, [sample.tool_call]) or sample
        assert judge(sample, sample.answer)


def test_pictures_are_always_the_same() -> None:
    assert [s.picture.image.tobytes() for s in steps()] == [s.picture.image.tobytes() for s in steps()]


@pytest.mark.parametrize("box", [(0.2, 0.2, 0.7, 0.5), (0.7, 0.5, 0.2, 0.2), (-3, 0, 9, 1), (1, 1, 1, 1)])
def test_a_frame_is_drawn_wherever_the_model_points(box: tuple[float, float, float, float]) -> None:
    picture = steps()[2].picture
    plain = picture.image.resize((picture.image.width * 3, picture.image.height * 3), Image.Resampling.LANCZOS)
    assert framed(picture, box).tobytes() != plain.tobytes()


def test_the_timeline_is_one_axis() -> None:
    heading, prefill, decode = timeline_lines(TIMELINE, 120)
    assert heading.split() == ["stage", "start", "took"]
    assert (prefill.count("#"), decode.count("#")) == (27, 9)
    assert decode.index("#") == prefill.rindex("#") + 1
    assert prefill.endswith("1,234 tokens")
    assert timeline_lines([], 120) == []


def test_a_long_reason_does_not_wrap() -> None:
    route = {"name": "route", "start_s": 0.0, "duration_s": 1.0, "why": "most room " * 20}
    assert [len(line) for line in timeline_lines([route], 100)] == [34, 100]
    assert timeline_lines([route], 100)[1].endswith("…")


@pytest.mark.parametrize(("is_mixed", "roles"), [(False, ["vision", "prefill", "decode"]), (True, ["vision", "mixed"])])
def test_what_is_served(is_mixed: bool, roles: list[str]) -> None:
    (own,) = demo.configure(None, is_mixed=is_mixed, port=9000).models
    assert (own.name, own.path, [pool.role for pool in own.pools]) == ("ernie-pocket", POCKET, roles)
    config = demo.configure("/m", is_mixed=is_mixed, port=9000)
    assert (config.models[0].name, config.models[0].path, config.api.port) == ("demo", "/m", 9000)


@pytest.mark.parametrize("flags", [["--once"], []])
def test_the_demo_walks_and_stays_up_only_without_once(
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    events: list[str] = []

    @contextmanager
    def serving(config: ClusterConfig, progress: object) -> Iterator[str]:
        events.append(f"start {config.models[0].name}")
        yield "http://test"
        events.append("stop")

    def walk_through(url: str, model: str, folder: Path, progress: object) -> None:
        events.append(f"{url} {model}")

    monkeypatch.setattr(demo, "serving", serving)
    monkeypatch.setattr(demo, "walk_through", walk_through)
    monkeypatch.setattr(demo, "wait_for_signal", lambda: events.append("wait"))
    folder = tmp_path / "a" / "b"
    assert main(["demo", "--keep", str(folder), *flags]) == 0
    assert folder.is_dir()
    stays = not flags
    assert events == ["start ernie-pocket", "http://test ernie-pocket", *(["wait"] if stays else []), "stop"]
    assert (f"ernie-cluster chat --url http://test --image {folder}" in capsys.readouterr().out) == stays


def test_nothing_is_served_from_a_checkpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = str(tmp_path / "pocket")
    monkeypatch.setattr(local, "POCKET", missing)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; make it with `python scripts/pocket/train.py`"):
        local.check_packaged(missing)
