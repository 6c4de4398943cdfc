"""Web pages of other origins: which may ask, and what they may read."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie_cluster.api.cors import allow_origins
from tests.unit.api.client import CHAT_URL, Server, chat_body
from tests.unit.api.test_guard import House

pytestmark = pytest.mark.anyio

PAGE = "https://chat.example"


async def test_without_origins_no_page_may_ask() -> None:
    async with Server().client() as client:
        response = await client.options(CHAT_URL, headers={"origin": PAGE, "access-control-request-method": "POST"})
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("origins", "origin", "is_allowed"),
    [
        ([PAGE], PAGE, True),
        ([PAGE], "https://evil.example", False),
        ([PAGE], PAGE + ".evil", False),
        (["*"], PAGE, True),
    ],
)
async def test_only_these_pages_may_ask_and_the_question_needs_no_key(
    origins: list[str], origin: str, is_allowed: bool, tmp_path: Path
) -> None:
    server = House(tmp_path).server
    allow_origins(server.app, origins)
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    async with server.client() as client:
        response = await client.options(CHAT_URL, headers={"origin": origin, **wanted})
    assert (response.status_code == 200) is is_allowed
    assert ("access-control-allow-origin" in response.headers) is is_allowed
    assert "access-control-allow-credentials" not in response.headers


async def test_a_page_reads_answers_and_refusals_alike(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.admit(alice={"requests": 1})
    allow_origins(house.server.app, [PAGE])
    statuses = []
    for key in ("alice", "alice", "nobody"):
        response = await house.server.post(CHAT_URL, chat_body(), {"origin": PAGE, "x-api-key": key})
        assert response.headers["access-control-allow-origin"] == PAGE
        exposed = response.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "retry-after", "x-ratelimit-reset-tokens"} <= set(exposed)
        statuses.append(response.status_code)
    assert statuses == [200, 429, 401]
