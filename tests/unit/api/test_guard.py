"""The door: which routes need which key, what a key may use, and that nobody learns what is not his."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ernie_cluster.api.guard import ADMIN, OPEN, Guard, is_admin
from ernie_cluster.api.image_search import ImageSearcher
from ernie_cluster.api.keys import KeyRing
from ernie_cluster.errors import Overloaded, ReplicaLost
from ernie_cluster.observe.log import setup_logging
from ernie_cluster.observe.metrics import InMemoryMetrics
from ernie_cluster.request import GenerationRequest, MediaInput
from tests.fakes import FakeBackend, FakeProcessor, say
from tests.unit.api.client import CHAT_URL, Connection, Server, chat_body
from tests.unit.api.clusters import PREFILL, operated

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

LOOKS = {"/admin/status", "/admin/decisions"}
DRAIN = f"/admin/replicas/{PREFILL.replica}/drain"
PROMPT_TOKENS = len("<user>hi")
ANSWER_TOKENS = len("Hello") + 1


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class SeeingProcessor(FakeProcessor):
    """Makes a picture of 4 x 6 patches of each image part, all alike."""

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> GenerationRequest:
        request = super().chat(messages, **options)
        parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
        picture = MediaInput("image", b"m" * 32, (1, 4, 6), offset=0, num_tokens=6, patches=None)
        return replace(request, media=(picture,) * len(parts))


class House:
    """A server with a door. Keys are called like their owners; their limits may change."""

    def __init__(
        self,
        folder: Path,
        backend: FakeBackend | None = None,
        processor: FakeProcessor | None = None,
        searcher: ImageSearcher | None = None,
        **options: Any,
    ) -> None:
        self.path = folder / "keys.yaml"
        self.now_s = 0.0
        self.admit(alice={}, bob={})
        metrics = InMemoryMetrics()
        options = {"admin_sha256": None, "isolate_prefix_cache": False, **options}
        guard = Guard(KeyRing(self.path, lambda: self.now_s), metrics=metrics, clock=lambda: self.now_s, **options)
        self.server = Server(
            backend or FakeBackend(say("Hello")),
            processor or FakeProcessor(),
            metrics=metrics,
            guard=guard,
            searcher=searcher,
        )

    def admit(self, **limits: dict[str, int]) -> None:
        """Who has a key from now on."""
        entries = [
            {"name": name, "sha256": sha256(name), **{f"{k}_per_minute": v for k, v in own.items()}}
            for name, own in limits.items()
        ]
        self.path.write_text(json.dumps(entries), encoding="utf-8")
        self.now_s += 1

    async def chat(self, key: str = "alice", **fields: Any) -> httpx.Response:
        return await self.server.post(CHAT_URL, chat_body(**fields), {"authorization": f"Bearer {key}"})


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    logger = logging.getLogger("ernie_cluster")
    before = (logger.handlers[:], logger.level, logger.propagate)
    stream = io.StringIO()
    setup_logging("DEBUG", stream)
    yield stream
    logger.handlers[:], logger.level, logger.propagate = before


# Who may come in


async def test_every_route_but_the_open_ones_needs_a_key(house: House) -> None:
    """Also one that does not exist: nobody learns which do."""
    paths = {route.path for route in house.server.app.routes}  # type: ignore[attr-defined]
    assert paths >= OPEN | ADMIN | {CHAT_URL}
    async with house.server.client() as client:
        for path in {path for path in paths - OPEN if not is_admin(path)} | {"/nothing", "/admin", "/administer"}:
            for method in ("GET", "POST", "DELETE", "HEAD"):
                assert (await client.request(method, path)).status_code == 401, (method, path)
        for path in OPEN | ADMIN | LOOKS:
            assert (await client.get(path)).status_code == 200
    assert house.server.backend.requests == []


@pytest.mark.parametrize(
    "path",
    ["/health/", "//health", "/health/../v1/models", "/v1/../health", "/HEALTH", "/health\0", "/v1/models/health", ""],
)
async def test_what_only_resembles_an_open_route_is_closed(path: str, house: House) -> None:
    connection = Connection(house.server.app, b"", url=path)  # no client between that would tidy the path
    assert (await connection.message())["status"] == 401
    await connection.task


async def test_the_host_does_not_matter(house: House) -> None:
    for name, value in (("host", "test/health?"), ("x-forwarded-host", "/health"), ("x-original-url", "/health")):
        assert (await house.server.get("/v1/models", {name: value})).status_code == 401


@pytest.mark.parametrize("headers", [{"authorization": "Bearer alice"}, {"x-api-key": "bob"}])
async def test_a_key_opens(headers: dict[str, str], house: House) -> None:
    assert (await house.server.get("/v1/models", headers)).status_code == 200
    assert (await house.server.post(CHAT_URL, chat_body(), headers)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, None),
        ({"authorization": "Bearer "}, None),
        ({"authorization": "Basic alice"}, None),
        ({"authorization": "Bearer carol"}, "invalid_api_key"),
        ({"authorization": f"Bearer {sha256('alice')}"}, "invalid_api_key"),
    ],
)
async def test_without_one_the_answer_is_openais(headers: dict[str, str], code: str | None, house: House) -> None:
    response = await house.server.post(CHAT_URL, chat_body(), headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert len(response.headers.get_list("x-request-id")) == 1
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, code)
    metrics = house.server.metrics
    assert metrics.value("ernie_request_refused_total", model="unknown", reason="unauthorized") == 1


async def test_anthropics_routes_refuse_in_its_words(house: House) -> None:
    response = await house.server.post("/v1/messages", {})
    assert response.status_code == 401
    assert (response.json()["type"], response.json()["error"]["type"]) == ("error", "authentication_error")


async def test_a_key_may_be_any_bytes(house: House) -> None:
    for key in (b"\xff\x00", "ключ".encode(), b"k" * 60_000):
        connection = Connection(house.server.app, b"{}", headers=[(b"x-api-key", key)])
        assert (await connection.message())["status"] == 401
        await connection.task


async def test_a_body_without_a_key_is_not_read(house: House) -> None:
    connection = Connection(house.server.app, b"{", is_complete=False)
    assert (await connection.message())["status"] == 401
    await connection.task


@pytest.mark.parametrize("path", ["/metrics", "/debug/experts", *sorted(LOOKS)])
async def test_operators_routes_take_the_admin_key_where_there_is_one(tmp_path: Path, path: str) -> None:
    server = House(tmp_path, admin_sha256=sha256("root")).server
    statuses = [
        (await server.get(path, {"authorization": f"Bearer {key}"})).status_code for key in ("root", "alice", "")
    ]
    assert statuses == [200, 401, 401]
    assert (await server.get("/v1/models", {"authorization": "Bearer root"})).status_code == 401


async def test_orders_take_the_admin_key_where_there_is_one(tmp_path: Path) -> None:
    server = House(tmp_path, operated(), admin_sha256=sha256("root"), takes_keyless_orders=True).server
    page = {"origin": "https://ops.example"}  # no foreign page has the key
    asked = [{"x-api-key": "root"}, {"x-api-key": "root", **page}, {"x-api-key": "alice"}, {}]
    assert [(await server.post(DRAIN, b"", headers)).status_code for headers in asked] == [200, 200, 401, 401]
    assert (await server.post("/admin/replicas/none/drain", b"", {"x-api-key": "alice"})).status_code == 401


@pytest.mark.parametrize(
    ("takes_keyless_orders", "headers", "status", "words"),
    [
        (True, {}, 200, ""),
        (True, {"origin": "http://evil.example"}, 403, "web pages"),
        (True, {"origin": "null", "x-api-key": "alice"}, 403, "web pages"),
        (False, {}, 403, "api.admin_key_sha256"),
        (False, {"x-api-key": "alice"}, 403, "ernie-cluster key"),
        (False, {"x-forwarded-for": "127.0.0.1", "host": "localhost"}, 403, "loopback"),
    ],
)
async def test_without_an_admin_key_orders_come_from_this_machine_only(
    takes_keyless_orders: bool, headers: dict[str, str], status: int, words: str, tmp_path: Path
) -> None:
    backend = operated()
    server = House(tmp_path, backend, takes_keyless_orders=takes_keyless_orders).server
    response = await server.post(DRAIN, b"", headers)
    assert response.status_code == status
    assert words in response.text
    assert len(backend.orders) == (status == 200)


async def test_without_a_file_everybody_comes_in() -> None:
    guard = Guard(None, admin_sha256=None, isolate_prefix_cache=False, metrics=InMemoryMetrics(), clock=lambda: 0.0)
    assert (await Server(guard=guard).chat()).status_code == 200


async def test_a_withdrawn_key_opens_no_more(house: House) -> None:
    assert (await house.chat()).status_code == 200
    house.admit(bob={})
    assert [(await house.chat(key)).status_code for key in ("alice", "bob")] == [401, 200]


async def test_logs_name_the_owner_and_never_the_key(tmp_path: Path, log: io.StringIO) -> None:
    backend = FakeBackend([ReplicaLost("gone"), RuntimeError("bug")])
    house = House(tmp_path, backend)
    key = "sk-s3cret-of-dora"
    entries = [{"name": "dora", "sha256": sha256(key), "requests_per_minute": 2}]
    house.path.write_text(json.dumps(entries), encoding="utf-8")
    house.now_s += 1
    statuses = [(await house.chat(key)).status_code]
    backend.script = [RuntimeError("bug")]
    statuses += [(await house.chat(key)).status_code for _ in range(2)]
    statuses += [(await house.chat(key + "x")).status_code]
    assert statuses == [503, 500, 429, 401]
    lines = log.getvalue().splitlines()
    assert sum(" dora] re" in line for line in lines) == 2  # the traceback is logged before the door
    assert "s3cret" not in log.getvalue()
    assert sha256(key) not in log.getvalue()


# What a key may use


async def test_requests_a_minute(house: House) -> None:
    house.admit(alice={"requests": 2}, bob={})
    first = await house.chat()
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] == "30s"
    await house.chat()
    refused = await house.chat()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert house.server.metrics.value("ernie_request_refused_total", model="unknown", reason="rate_limited") == 1
    assert (await house.chat("bob")).status_code == 200
    assert (await house.server.get("/v1/models", {"x-api-key": "alice"})).status_code == 200  # looking is free
    house.now_s += 30
    assert (await house.chat()).status_code == 200


async def test_a_key_without_limits_has_no_such_headers(house: House) -> None:
    assert not any(name.startswith("x-ratelimit") for name in (await house.chat()).headers)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_tokens_of_prompt_and_answer(is_stream: bool, house: House) -> None:
    limit = PROMPT_TOKENS + ANSWER_TOKENS
    house.admit(alice={"tokens": limit})
    first = await house.chat(stream=is_stream, max_tokens=300)  # what is not generated is not reserved
    assert first.status_code == 200
    refused = await house.chat()
    assert (refused.status_code, refused.headers["x-ratelimit-remaining-tokens"]) == (429, "0")
    house.now_s += 60 * PROMPT_TOKENS / limit + 0.001
    assert (await house.chat()).status_code == 200


async def test_an_answer_may_lead_into_debt(house: House) -> None:
    house.admit(alice={"tokens": PROMPT_TOKENS})
    assert (await house.chat()).status_code == 200
    refused = await house.chat()
    seconds = 60 * (ANSWER_TOKENS + 1) / PROMPT_TOKENS  # until the debt is paid and one token is there
    assert int(refused.headers["retry-after"]) == pytest.approx(seconds, abs=1)


async def test_each_answer_is_charged_and_the_prompt_once(house: House) -> None:
    house.admit(alice={"tokens": 100})
    await house.chat(n=3)
    after = await house.chat()
    assert int(after.headers["x-ratelimit-remaining-tokens"]) == 100 - 2 * PROMPT_TOKENS - 4 * ANSWER_TOKENS


async def test_a_prompt_beyond_the_limit_is_told_so(house: House) -> None:
    house.admit(alice={"tokens": PROMPT_TOKENS - 1})
    response = await house.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (400, "request_too_large")
    assert "retry-after" not in response.headers
    assert house.server.backend.requests == []


@pytest.mark.parametrize(("error", "is_refunded"), [(Overloaded("full"), True), (ReplicaLost("gone"), True), (RuntimeError(), False)])  # fmt: skip
@pytest.mark.parametrize("num_answers", [1, 3])
async def test_what_got_no_answer_costs_nothing(
    error: Exception, is_refunded: bool, num_answers: int, tmp_path: Path
) -> None:
    house = House(tmp_path)
    house.admit(alice={"tokens": 100})
    await house.chat()  # what it costs must not come back
    house.server.backend.script = [error]
    response = await house.chat(n=num_answers)
    assert response.status_code >= 429
    rest = int((await house.chat(max_tokens=1000)).headers["x-ratelimit-remaining-tokens"])  # 400, and costs nothing
    assert rest == 100 - PROMPT_TOKENS - ANSWER_TOKENS - (0 if is_refunded else PROMPT_TOKENS)


async def test_half_an_answer_costs_its_tokens_and_the_prompt(tmp_path: Path) -> None:
    house = House(tmp_path, FakeBackend([*say("abc", finish_reason=None), ReplicaLost("gone")]))
    house.admit(alice={"tokens": 100})
    await house.chat()
    rest = int((await house.chat(max_tokens=1000)).headers["x-ratelimit-remaining-tokens"])
    assert rest == 100 - PROMPT_TOKENS - 3


async def test_a_client_who_leaves_aborts_behind_the_door(tmp_path: Path) -> None:
    backend = FakeBackend([*say("abc", finish_reason=None), asyncio.Event()])
    house = House(tmp_path, backend)
    house.admit(alice={"tokens": 100})
    key = (b"authorization", b"Bearer alice")
    connection = Connection(house.server.app, json.dumps(chat_body(stream=True)).encode(), headers=[key])
    assert (await connection.message())["status"] == 200
    connection.disconnect()
    await connection.task
    assert len(backend.aborted) == 1


async def test_changed_limits_keep_what_was_used(house: House) -> None:
    house.admit(alice={"requests": 3})
    await house.chat()
    house.admit(alice={"requests": 2})
    response = await house.chat()
    assert response.headers["x-ratelimit-limit-requests"] == "2"
    assert response.headers["x-ratelimit-remaining-requests"] == "0"


# Whose cache


async def test_caches_are_shared_unless_asked(house: House) -> None:
    for key in ("alice", "bob"):
        await house.chat(key)
    assert {r.cache_salt for r in house.server.backend.requests} == {b""}


async def test_isolated_keys_have_salts_of_their_own(tmp_path: Path) -> None:
    house = House(tmp_path, isolate_prefix_cache=True)
    for key in ("alice", "bob", "alice"):
        await house.chat(key)
    first, second, third = (r.cache_salt for r in house.server.backend.requests)
    assert first == third != second
    assert b"" not in (first, second)


@pytest.mark.parametrize("is_isolated", [True, False])
async def test_a_client_may_salt_on_top(is_isolated: bool, tmp_path: Path) -> None:
    house = House(tmp_path, isolate_prefix_cache=is_isolated)
    for key, salt in (("alice", None), ("alice", "x"), ("alice", "x"), ("alice", "y"), ("bob", "x")):
        await house.chat(key, cache_salt=salt)
    none, x, again, y, bobs = (r.cache_salt for r in house.server.backend.requests)
    assert x == again
    assert len({none, x, y}) == 3
    assert (bobs == x) is not is_isolated


async def test_pictures_are_counted_and_salted(tmp_path: Path) -> None:
    house = House(tmp_path, processor=SeeingProcessor(), isolate_prefix_cache=True)
    pixels = 4 * 6 * 14 * 14
    house.admit(alice={"pixels": 2 * pixels}, bob={})
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}] * 2
    messages = [{"role": "user", "content": content}]
    answers = [await house.chat(key, messages=messages, n=2) for key in ("alice", "bob", "alice")]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-remaining-pixels"] == "0"
    assert answers[2].headers["retry-after"] == "60"
    alices, *_, bobs = house.server.backend.requests
    assert alices.media[0].media_hash == alices.media[1].media_hash != bobs.media[0].media_hash
    assert (await house.chat("alice")).status_code == 200  # no picture, no pixels
    house.admit(alice={"pixels": 2 * pixels - 1})
    assert (await house.chat("alice", messages=messages)).json()["error"]["code"] == "request_too_large"
