"""The playground in a real browser, headless, over a real server; only what is behind the API is a twin.

Chromium is the machine's own (`chromium`, `google-chrome` on the path) or the one of `playwright install chromium`.
"""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from PIL import Image, ImageDraw

from ernie_cluster.api.guard import Guard
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.keys import KeyRing
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.playground.routes import PATHS, add_playground
from ernie_cluster.errors import InvalidRequest, Overloaded
from ernie_cluster.observe.metrics import InMemoryMetrics
from ernie_cluster.request import Span
from tests.fakes import FakeBackend, FakeProcessor, Script, say
from tests.unit.api.test_guard import sha256

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

pytestmark = pytest.mark.timeout(120)

PATIENCE_S = 20.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BOX = [250, 500, 750, 1000]
GROUNDED = json.dumps({"bbox_2d": BOX, "label": "red square"})


def spans() -> tuple[Span, ...]:
    """Of a journey so slow that what the API itself does is nothing beside it."""
    start = time.time()
    return (
        Span("route", start, 10.0, (("why", "decode-1: most room"),)),
        Span("prefill", start + 10, 40.0, (("bytes", 1234),)),
        Span("decode", start + 50, 50.0, (("tokens", 10_000),)),
    )


class Told(list[str]):
    """A list that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.is_told = threading.Event()

    def append(self, item: str) -> None:
        super().append(item)
        self.is_told.set()


class Site:
    """The app on a port of its own, in a thread."""

    def __init__(self, script: Script, spans: tuple[Span, ...] = (), guard: Guard | None = None) -> None:
        self.backend = FakeBackend(script, spans=spans, num_cached_tokens=3)
        self.backend.aborted = Told()
        self.processor = FakeProcessor(max_model_len=4096)
        app = create_app(self.backend, {"tiny": self.processor}, ApiLimits(), InMemoryMetrics(), guard)
        add_playground(app)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        self._socket.close()
        assert not self._thread.is_alive()

    @property
    def messages(self) -> list[list[dict[str, Any]]]:
        """Of every request so far."""
        return [call["messages"] for call in self.processor.calls]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[browser]'")
    with playwright.sync_playwright() as tool:
        own = tool.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), own if Path(own).exists() else None)
        if path is None:
            pytest.skip("needs Chromium: `apt-get install chromium` or `playwright install chromium`")
        # the pages are our own; as root, and in most containers, Chromium does not start with its sandbox
        with tool.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"]) as chromium:
            yield chromium


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh tab. Whatever it complains of, broken rules of the content policy too, fails the test."""
    with browser.new_context(viewport={"width": 1100, "height": 800}) as context:
        tab = context.new_page()
        tab.set_default_timeout(PATIENCE_S * 1000)
        complaints: list[str] = []
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        yield tab
        # a refusal is an event of the network as well, and Chromium tells of it
        assert [c for c in complaints if "Failed to load resource" not in c] == []


def picture_file(name: str = "shapes.png") -> dict[str, Any]:
    """A red square on white, in the lower half of the middle."""
    image = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(image).rectangle((100, 100, 299, 199), "red")
    out = io.BytesIO()
    image.save(out, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": out.getvalue()}


def open_page(page: Page, site: Site) -> None:
    page.goto(site.url)
    page.locator("#model:enabled").wait_for()


def ask(page: Page, text: str) -> Locator:
    """Send a message; its answer, as soon as it is complete."""
    number = page.locator(".answer").count()
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.locator(".answer[aria-busy=false]").nth(number).wait_for()
    return page.locator(".answer").nth(number)


def inside(node: Locator, frame: Locator) -> list[float]:
    """Left, top, right and bottom of an element, in thousandths of the one that it lies in."""
    inner, outer = node.bounding_box(), frame.bounding_box()
    assert inner is not None
    assert outer is not None
    left, top = (inner["x"] - outer["x"]) / outer["width"], (inner["y"] - outer["y"]) / outer["height"]
    right, bottom = left + inner["width"] / outer["width"], top + inner["height"] / outer["height"]
    return [1000 * side for side in (left, top, right, bottom)]


def is_near(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return all(abs(f - w) < 5 for f, w in zip(found, wanted, strict=True))


def test_a_picture_a_thought_a_box_and_a_timeline(page: Page) -> None:
    with closing(Site(say(f"I look.\n</think>\n\n{GROUNDED}"), spans())) as site:
        open_page(page, site)
        page.locator("#files").set_input_files(picture_file())  # type: ignore[arg-type]
        page.locator("#attached img").wait_for()
        page.get_by_role("switch", name="Thinking").check()
        answer = ask(page, "Where is the square?")

        thought = answer.locator("details.thought")
        assert thought.locator("summary").inner_text().startswith("Thought")
        assert thought.get_attribute("open") is None
        thought.locator("summary").click()
        assert thought.locator(".text").inner_text() == "I look."

        assert answer.locator(".blocks > .text").inner_text() == GROUNDED
        frame, image = answer.locator(".grounded .frame"), answer.locator(".grounded img")
        image.evaluate("image => image.decode()")
        assert frame.inner_text() == "red square"
        for width in (1100, 360):
            page.set_viewport_size({"width": width, "height": 800})
            assert is_near(inside(frame, image), BOX)

        summary = answer.locator("details.numbers summary")
        assert "in (3 cached)" in summary.inner_text()
        assert "200 tokens/s" in summary.inner_text()
        summary.click()
        rows = {row.locator(".stage-name").inner_text(): row for row in answer.locator(".stages li").all()}
        assert rows.keys() == {"preprocess", "route", "prefill", "decode"}
        assert rows["decode"].locator(".took").inner_text() == "50.0 s"
        assert rows["route"].locator(".detail").inner_text() == "decode-1: most room"
        assert rows["prefill"].locator(".detail").inner_text() == "1,234 bytes"
        route, prefill, decode = (
            inside(rows[name].locator(".stage"), rows[name].locator(".track"))
            for name in ("route", "prefill", "decode")
        )
        assert is_near(route[2:3] + prefill[2:3], prefill[:1] + decode[:1]), "each begins where the one before ends"

    (message,) = site.messages[0]
    assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert message["content"][1] == {"type": "text", "text": "Where is the square?"}
    assert site.processor.calls[0]["enable_thinking"] is True


def test_stop_ends_the_request_and_what_came_stays_in_the_conversation(page: Page) -> None:
    never = asyncio.Event()
    with closing(Site([*say("Once upon", finish_reason=None), never])) as site:
        open_page(page, site)
        page.get_by_role("textbox", name="Message", exact=True).fill("A story")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("Once upon").wait_for()
        page.get_by_role("button", name="Stop the answer").click()
        page.get_by_text("Stopped.", exact=True).first.wait_for()
        assert isinstance(site.backend.aborted, Told)
        assert site.backend.aborted.is_told.wait(PATIENCE_S)

        site.backend.script = say("a time.")
        assert "a time." in ask(page, "Go on").inner_text()
        page.get_by_role("button", name="New chat").click()
        assert page.locator(".turn").count() == 0
        ask(page, "Hello")
    first, story, go_on = (
        {"role": "user", "content": "A story"},
        {"role": "assistant", "content": "Once upon"},
        {"role": "user", "content": "Go on"},
    )
    assert site.messages == [[first], [first, story, go_on], [{"role": "user", "content": "Hello"}]]


def test_errors_in_words_and_another_try(page: Page) -> None:
    with closing(Site([Overloaded("all seats are taken", retry_after_s=1.0)])) as site:
        open_page(page, site)
        answer = ask(page, "Hello")
        assert "Too much at once" in answer.inner_text()
        assert "All seats are taken." in answer.inner_text()
        assert "in 1 s" in answer.inner_text()
        site.backend.script = [*say("Half an", finish_reason=None), InvalidRequest("no such field", "messages[0]")]
        answer.get_by_role("button", name="Try again", exact=True).click()
        page.get_by_text("No such field.").wait_for()
        answer = page.locator(".answer")
        assert "Half an" in answer.inner_text()
        assert "field messages[0]" in answer.inner_text()

        site.backend.script = say("Fine")
        ask(page, "And now?")
    hello, half = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Half an"}
    assert site.messages == [[hello], [hello], [hello, half, {"role": "user", "content": "And now?"}]]


def test_a_refused_picture_does_not_spoil_the_conversation(page: Page) -> None:
    with closing(Site([InvalidRequest("the picture is broken", "messages[0].content[0].image_url.url")])) as site:
        open_page(page, site)
        page.locator("#files").set_input_files(picture_file())  # type: ignore[arg-type]
        page.locator("#attached img").wait_for()
        assert "The picture is broken." in ask(page, "").inner_text()
        site.backend.script = say("Fine")
        ask(page, "Without, then")
    assert site.messages[1] == [{"role": "user", "content": "Without, then"}]


def test_a_key_is_asked_for_and_stays_in_its_tab(page: Page, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(json.dumps([{"name": "alice", "sha256": sha256("alice")}]))
    metrics = InMemoryMetrics()
    guard = Guard(
        KeyRing(str(keys), time.monotonic),
        admin_sha256=None,
        isolate_prefix_cache=False,
        metrics=metrics,
        clock=time.monotonic,
        pages=PATHS,
    )
    with closing(Site(say("Hello, Alice"), guard=guard)) as site:
        page.goto(site.url)
        page.get_by_text("This server asks for an API key.").wait_for()
        page.get_by_role("button", name="Enter a key").click()
        page.keyboard.type("alice")
        page.keyboard.press("Enter")
        page.locator("#model:enabled").wait_for()
        assert not page.locator("#notice").is_visible()
        assert "Hello, Alice" in ask(page, "Who am I?").inner_text()
        assert "alice" in page.evaluate("JSON.stringify(sessionStorage)")
        assert "alice" not in page.evaluate("JSON.stringify(localStorage) + location.href + document.cookie")


def test_the_zoom_tool(page: Page) -> None:
    """What a server streams of a tool that it runs itself: the second time it looks at a part of the first part."""
    first = {"id": "1", "type": "image_zoom_in_tool", "arguments": json.dumps({"bbox_2d": BOX, "label": "sign"})}
    second = {"id": "2", "type": "image_zoom_in_tool", "arguments": '{"bbox_2d": [0, 0, 500, 500], "picture": 2}'}
    broken = {"id": "3", "type": "image_zoom_in_tool", "arguments": '{"bbox_2d": "there"}'}
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "reasoning_content": "I look closer."},
        {"builtin_tool_calls": [{**first, "result": {"picture": 1, "bbox_2d": BOX}}]},
        {"reasoning_content": "\n\nAnd closer."},
        {"builtin_tool_calls": [{**second, "result": {"picture": 2, "bbox_2d": [0, 0, 500, 500]}}]},
        {"builtin_tool_calls": [{**broken, "result": {"error": "it must be four numbers"}}]},
        {"content": "It is red."},
    ]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    bodies: list[Any] = []

    def answer_it(route: Route) -> None:
        bodies.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream", body=stream)

    with closing(Site(())) as site:
        open_page(page, site)
        page.route("**/v1/chat/completions", answer_it)
        page.locator("#files").set_input_files(picture_file())  # type: ignore[arg-type]
        page.locator("#attached img").wait_for()
        page.get_by_role("switch", name="Zoom tool").check()
        answer = ask(page, "What colour is the sign?")
        kinds = answer.locator(".blocks > *").evaluate_all("nodes => nodes.map(node => node.className)")
        assert kinds == ["thought", "card", "thought", "card", "card", "text"]
        cards = answer.locator(".card")
        assert "Looked closer at sign" in cards.nth(0).inner_text()
        assert "it must be four numbers" in cards.nth(2).inner_text()
        cards.nth(0).get_by_text("The call", exact=True).click()
        assert '"label": "sign"' in cards.nth(0).locator("pre").inner_text()
        for card, part, pixels in ((0, BOX, "100 100 200 100"), (1, [250, 500, 500, 750], "100 100 100 50")):
            canvas = cards.nth(card).locator("canvas[data-source]")
            canvas.wait_for()
            assert canvas.get_attribute("data-source") == pixels
            assert canvas.evaluate("canvas => canvas.width / canvas.height") == 2
            centre = (
                "canvas => [...canvas.getContext('2d').getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data]"
            )
            assert canvas.evaluate(centre) == [255, 0, 0, 255]
            assert is_near(inside(cards.nth(card).locator(".frame"), cards.nth(card).locator("img")), part)
    assert [body["tools"] for body in bodies] == [[{"type": "image_zoom_in_tool"}]]


def test_calls_of_functions_are_shown_as_json_and_markup_as_text(page: Page) -> None:
    evil = "<img src=x onerror=alert(1)> **bold** `code`\n```html\n<script>alert(2)</script>\n```"
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm <b>"}}\n</tool_call>'
    with closing(Site(say(f"{evil}\n{call}", 5))) as site:
        open_page(page, site)

        def offer_a_function(route: Route) -> None:
            function = {"type": "function", "function": {"name": "weather"}}
            route.continue_(post_data=json.dumps({**route.request.post_data_json, "tools": [function]}))

        page.route("**/v1/chat/completions", offer_a_function)
        answer = ask(page, "Hello")
        text = answer.locator(".blocks > .text")
        assert text.inner_text().split() == evil.replace("**", "").replace("```html", "").replace("`", "").split()
        assert text.locator("strong").inner_text() == "bold"
        assert text.locator("p code").inner_text() == "code"
        assert text.locator("pre").inner_text() == "<script>alert(2)</script>"
        assert text.locator("img, script").count() == 0
        shown = json.loads(answer.locator(".card pre").inner_text())
        assert shown == {"name": "weather", "arguments": {"city": "Ulm <b>"}}


def test_files_by_paste_and_drop_and_those_that_cannot_be_sent(page: Page) -> None:
    fire = """([kind, field, name, type]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File(["some bytes"], name, {type}));
        const event = new Event(kind, {bubbles: true, cancelable: true});
        Object.defineProperty(event, field, {value: transfer});
        document.body.dispatchEvent(event);
        return event.defaultPrevented;
    }"""
    with closing(Site(say("Two things"))) as site:
        open_page(page, site)
        assert page.evaluate(fire, ["paste", "clipboardData", "photo.jpg", "image/jpeg"])
        page.locator("#attached img").wait_for()
        page.evaluate(fire, ["dragover", "dataTransfer", "clip.mp4", "video/mp4"])
        assert page.locator("#drop").is_visible()
        assert page.evaluate(fire, ["drop", "dataTransfer", "clip.mp4", "video/mp4"])
        page.locator("#attached video").wait_for()
        assert not page.locator("#drop").is_visible()
        page.evaluate(fire, ["drop", "dataTransfer", "notes.txt", "text/plain"])
        page.get_by_text("notes.txt is not a").wait_for()
        assert page.locator("#attached li").count() == 2
        page.get_by_role("button", name="Remove photo.jpg").click()
        page.get_by_role("button", name="Send").click()
        page.locator(".answer[aria-busy=false]").wait_for()
    (part,) = site.messages[0][0]["content"]
    assert part["video_url"]["url"] == "data:video/mp4;base64,c29tZSBieXRlcw=="


def test_an_example_on_a_phone_by_keyboard_alone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    with closing(Site(say(GROUNDED))) as site:
        open_page(page, site)
        page.get_by_role("button", name="Find the purple star.").focus()
        page.keyboard.press("Enter")
        page.locator("#attached img").wait_for()
        page.locator("#prompt:focus").wait_for()
        page.keyboard.press("Enter")
        page.locator(".answer[aria-busy=false] .grounded").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert site.messages[0][0]["content"][1]["text"] == "Find the purple star."
