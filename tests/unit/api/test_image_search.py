"""The tool `image_search`: what the model and the client get of it, and what neither ever gets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from pathlib import Path
from typing import Any, cast

import pytest

from ernie_cluster.api.image_search import ImageSearcher
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.errors import DeadlineExceeded, EngineFailed, Overloaded, ReplicaLost
from ernie_cluster.inputs.image_folder import ImageFolder
from ernie_cluster.inputs.image_index import Entry, ImageIndex, Maker
from tests.fakes import FakeBackend, FakeProcessor, vector_of
from tests.unit.api.client import Connection, Server, chat_body
from tests.unit.api.rounds import BOX, CALCULATOR, LOOK, ZOOM, Rounds, Seeing, call, hash_of
from tests.unit.api.test_guard import House
from tests.unit.api.test_rounds import results_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

SEARCH = {"type": "image_search"}
FILES = {f"{name}.png": f"picture {name}".encode() for name in ("cat", "dog", "pets/fox", "pets/owl", "zebra")}
MAKER = Maker("e" * 64, "")
OUTSIDE = "secret"


def seen(content: bytes, *regions: tuple[int, ...]) -> bytes:
    """The hash that the fake processor gives to a picture."""
    return hashlib.sha256(repr((content, regions)).encode()).digest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    (tmp_path / "outside.png").write_bytes(OUTSIDE.encode())
    return tmp_path / "photos"


def searcher_of(folder: Path, **more: Any) -> ImageSearcher:
    rows = [(Entry(n, hashlib.sha256(c).hexdigest()), vector_of(seen(c))) for n, c in FILES.items()]
    return ImageSearcher(ImageIndex(MAKER, rows), ImageFolder(str(folder), 1000), FakeProcessor(), **more)


def serve(folder: Path, *rounds: Any, limits: ApiLimits | None = None, **more: Any) -> Server:
    return Server(Rounds(*rounds), Seeing(), limits or ApiLimits(), searcher=searcher_of(folder, **more))


def showing(content: bytes) -> list[dict[str, Any]]:
    """A question about a picture."""
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


async def ask(server: Server, **fields: Any) -> dict[str, Any]:
    """The only choice of a whole answer about the picture of the owl."""
    body = {"tools": [SEARCH, ZOOM], "messages": showing(FILES["pets/owl.png"]), "max_tokens": 2000, **fields}
    response = await server.chat(**body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def test_the_model_finds_the_picture_and_its_neighbours(folder: Path) -> None:
    server = serve(folder, call("image_search", {"top_k": 3}), "An owl.")
    choice = await ask(server)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("An owl.", "stop")
    (result,) = results_of(choice)
    query = vector_of(seen(FILES["pets/owl.png"]))
    scores = {name: float(vector_of(seen(content)) @ query) for name, content in FILES.items()}
    wanted = sorted(scores, key=lambda name: -scores[name])[:3]
    assert [found["name"] for found in result["found"]] == wanted
    assert wanted[0] == "pets/owl.png"
    assert [found["score"] for found in result["found"]] == pytest.approx([scores[n] for n in wanted], abs=1e-3)
    assert (result["picture"], len(result["images"])) == (1, 3)
    told, *pictures = server.processor.calls[1]["messages"][-1]["content"]
    assert told["text"].startswith("1. pets/owl.png (score 1.000)\n2. ")
    assert [p["image_url"]["content"] for p in pictures] == [FILES[name] for name in wanted]
    assert {p["image_url"]["max_pixels"] for p in pictures} == {200_704}
    assert server.backend.embedded[0][0] == "tiny"


async def test_a_region_is_looked_for_by_itself_and_found_pictures_can_be_zoomed_into(folder: Path) -> None:
    zoom = call("image_zoom_in_tool", {"bbox_2d": BOX, "picture": 2})
    server = serve(folder, call("image_search", {"bbox_2d": BOX, "top_k": 1}), zoom, "Yes.")
    searched, zoomed = results_of(await ask(server))
    assert server.backend.embedded[0][1].media_hash == seen(FILES["pets/owl.png"], tuple(BOX))
    assert (searched["bbox_2d"], zoomed["picture"]) == (BOX, 2)
    name = searched["found"][0]["name"]
    found, crop = server.backend.requests[2].media[1:]
    url = f"image-search:{name}"
    assert found.media_hash == hash_of(url, (), FILES[name], 200_704)
    assert crop.media_hash == hash_of(url, (tuple(BOX),), FILES[name], 200_704)


async def test_a_found_picture_can_be_looked_for_again(folder: Path) -> None:
    first, second = call("image_search", {"top_k": 1}), call("image_search", {"picture": 2, "top_k": 1})
    found, again = results_of(await ask(serve(folder, first, second, "Yes.")))
    assert again["found"] == found["found"] == [{"name": "pets/owl.png", "score": pytest.approx(1.0, abs=1e-3)}]


async def test_results_are_bounded_in_number_and_pixels(folder: Path) -> None:
    (result,) = results_of(await ask(serve(folder, call("image_search", {"top_k": 99}), "7", max_results=2)))
    assert len(result["found"]) == len(result["images"]) == 2
    one = 4 * 6 * 14 * 14
    server = serve(folder, call("image_search", {"top_k": 2}), "7", limits=ApiLimits(max_tool_pixels=one))
    (refused,) = results_of(await ask(server))
    assert f"{2 * one} pixels" in refused["error"]


async def test_files_are_bounded_together(folder: Path) -> None:
    (folder / "cat.png").write_bytes(b"x" * 999)
    rows = [(Entry("cat.png", hashlib.sha256(b"x" * 999).hexdigest()), vector_of(b"x" * 32))]
    searcher = ImageSearcher(ImageIndex(MAKER, rows), ImageFolder(str(folder), 1000), FakeProcessor())
    for most, key in ((999, "found"), (998, "error")):
        limits = ApiLimits(max_body_bytes=most)
        server = Server(Rounds(call("image_search", {}), "7"), Seeing(), limits, searcher=searcher)
        (result,) = results_of(await ask(server))
        assert key in result
    assert "more than 998 bytes" in result["error"]


async def test_what_is_gone_or_has_changed_or_leads_outside_is_not_shown(folder: Path) -> None:
    (folder / "cat.png").write_bytes(b"another cat")
    (folder / "dog.png").unlink()
    (folder / "zebra.png").unlink()
    (folder / "zebra.png").symlink_to(folder.parent / "outside.png")
    server = serve(folder, call("image_search", {"top_k": 4}), "7")
    (result,) = results_of(await ask(server))
    assert {found["name"] for found in result["found"]} == {"pets/fox.png", "pets/owl.png"}
    for name in ("pets/fox.png", "pets/owl.png"):
        (folder / name).unlink()
    (nothing,) = results_of(await ask(serve(folder, call("image_search", {}), "7")))
    assert nothing == {"text": "Nothing was found.", "picture": 1, "found": []}


async def test_clients_see_names_relative_to_the_folder_only(folder: Path) -> None:
    server = serve(folder, call("image_search", {"top_k": 4}), "7")
    for is_stream in (False, True):
        response = await server.chat(
            tools=[SEARCH],
            messages=showing(FILES["pets/owl.png"]),
            stream=is_stream,
            include_tool_results=True,
            include_timeline=True,
        )
        assert "pets/owl.png" in response.text
        assert str(folder.parent) not in response.text
        assert "image-search:" not in response.text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Overloaded("10.0.0.7 is full"), "the search is not available now"),
        (ReplicaLost("10.0.0.7 is gone"), "the search is not available now"),
        (EngineFailed("10.0.0.7 broke"), "the search is not available now"),
    ],
)
async def test_a_search_that_fails_is_told_to_the_model(error: Exception, words: str, folder: Path) -> None:
    server = serve(folder, call("image_search", {}), "I cannot.")
    server.backend.embed_script = [error]
    choice = await ask(server)
    assert choice["message"]["content"] == "I cannot."
    assert results_of(choice) == [{"error": words}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"picture": 9}, "no picture 9"), ({"top_k": 0}, "top_k is 0"), ({"bbox_2d": [1]}, "four numbers")],
)
async def test_a_call_that_asks_for_nothing_is_told_to_the_model(
    arguments: dict[str, Any], words: str, folder: Path
) -> None:
    server = serve(folder, call("image_search", arguments), "I cannot.")
    (result,) = results_of(await ask(server))
    assert words in result["error"]
    assert server.backend.embedded == []


async def test_a_picture_that_cannot_be_prepared_is_told_to_the_model(folder: Path) -> None:
    server = serve(folder, call("image_search", {}), "I cannot.")
    (result,) = results_of(await ask(server, messages=showing(b"broken")))
    assert result["error"] == "the image cannot be decoded"


async def test_the_deadline_holds_over_searches(folder: Path) -> None:
    server = serve(folder, call("image_search", {}), "7", limits=ApiLimits(request_timeout_s=1.0))
    server.backend.embed_script = [asyncio.Event()]
    assert (await server.chat(tools=[SEARCH], messages=showing(b"x"))).status_code == 504
    server.backend.embed_script = [DeadlineExceeded("too late")]
    assert (await server.chat(tools=[SEARCH], messages=showing(b"x"))).status_code == 504


async def test_a_client_that_leaves_ends_the_search(folder: Path) -> None:
    server = serve(folder, call("image_search", {}), "7")
    is_asked, never = asyncio.Event(), asyncio.Event()

    class Waiting(asyncio.Event):
        async def wait(self) -> Any:
            is_asked.set()
            await never.wait()

    server.backend.embed_script = [Waiting()]
    body = json.dumps(chat_body(tools=[SEARCH], messages=showing(b"x"))).encode()
    connection = Connection(server.app, body)
    await is_asked.wait()
    connection.disconnect()
    await asyncio.gather(connection.task, return_exceptions=True)
    assert len(server.backend.requests) == 1


@pytest.mark.parametrize("tools", [[SEARCH], [CALCULATOR, SEARCH]])
async def test_without_an_index_it_is_not_on_offer(tools: list[Any]) -> None:
    server = Server(Rounds("7"), Seeing())
    response = await server.chat(tools=tools)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, f"tools[{len(tools) - 1}].type")
    assert "api.image_search.index" in error["message"]
    for url, body in (
        ("/v1/responses", {"model": "tiny", "input": "x", "tools": tools}),
        ("/v1/messages", {**chat_body(), "max_tokens": 9, "tools": tools}),
    ):
        other = await server.post(url, body)
        assert other.status_code == 400
        assert "api.image_search.index" in other.text
    assert server.backend.requests == []


async def test_it_can_be_offered_by_default(folder: Path) -> None:
    server = Server(
        Rounds(call("image_search", {}), "7"),
        Seeing(),
        default_tools=("image_search",),
        searcher=searcher_of(folder),
    )
    assert "found" in results_of((await server.chat(messages=showing(b"x"))).json()["choices"][0])[0]


async def test_a_key_pays_for_what_is_looked_for_and_what_is_found(folder: Path, tmp_path: Path) -> None:
    backend = cast("FakeBackend", Rounds(call("image_search", {"top_k": 2}), LOOK, "7"))
    house = House(tmp_path, backend, Seeing(), searcher=searcher_of(folder))
    house.admit(alice={"pixels": 1_000_000})
    await house.chat(messages=showing(b"x"), tools=[SEARCH, ZOOM])
    headers = (await house.chat(messages=[{"role": "user", "content": "x"}], max_tokens=1)).headers
    num_pictures = 1 + 1 + 3 + 4  # first prompt, query, second and third prompt
    assert int(headers["x-ratelimit-remaining-pixels"]) == 1_000_000 - num_pictures * 4 * 6 * 14 * 14
