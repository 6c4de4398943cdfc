"""The playground's files: how they are served, and what they must not hold. `tests/e2e` uses them in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ernie_cluster.api.playground import routes
from ernie_cluster.api.playground.routes import PATHS, add_playground
from tests.unit.api.client import Server
from tests.unit.api.test_guard import House

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

FOLDER = Path(routes.__file__).parent
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py")
SCRIPTS = [path for path in FILES if path.suffix == ".js"]


@pytest.fixture
def server() -> Server:
    server = Server()
    add_playground(server.app)
    return server


def test_every_file_has_its_route() -> None:
    assert sorted(PATHS.values()) == [path.name for path in FILES]
    assert PATHS["/"] == "index.html"
    assert {path.rpartition(".")[2] for path in PATHS if path != "/"} == {"js", "css", "svg"}


@pytest.mark.parametrize("path", PATHS)
async def test_files_are_served_as_they_are(path: str, server: Server) -> None:
    async with server.client() as client:
        response = await client.get(path)
        head = await client.head(path)
        known = await client.get(path, headers={"if-none-match": f'"other", W/{response.headers["etag"]}'})
    content = (FOLDER / PATHS[path]).read_bytes()
    assert (response.status_code, response.content) == (200, content)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(content))
    assert (known.status_code, known.content) == (304, b"")
    own = {"date", "server", "x-request-id", "traceparent", "content-type", "content-length"}
    shared = [{k: v for k, v in r.headers.items() if k not in own} for r in (response, head, known)]
    assert shared[0] == shared[1] == shared[2]
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert response.headers["content-type"].startswith(kinds[PATHS[path].rpartition(".")[2]])
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_different_files_have_different_versions(server: Server) -> None:
    assert len({(await server.get(path)).headers["etag"] for path in PATHS}) == len(PATHS)


async def test_the_policy_lets_the_page_ask_its_own_server_only(server: Server) -> None:
    policy = (await server.get("/")).headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy
    assert "*" not in policy


async def test_nothing_else_is_served(server: Server) -> None:
    for path in (
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/playground/routes.py",
        "/playground/../api.js",
    ):
        assert (await server.get(path)).status_code == 404, path
    response = await server.post("/", {})
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_it_is_open_where_keys_are_needed_and_opens_nothing_else(tmp_path: Path) -> None:
    server = House(tmp_path, pages=PATHS).server
    add_playground(server.app)
    for path in PATHS:
        assert (await server.get(path)).status_code == 200
    for path in ("/v1/models", "/playground", "/playground/", "/playground/index.html", "/playground/../v1/models"):
        assert (await server.get(path)).status_code == 401, path


async def test_it_is_served_only_where_it_was_added() -> None:
    assert [(await Server().get(path)).status_code for path in ("/", "/playground/app.js")] == [404, 404]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_loaded_from_elsewhere_and_no_text_becomes_markup(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.findall(r"https?:|wss?:|[\"'(]//", text) == []
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|@import", text) == []
    )


class Reader(HTMLParser):
    """What the policy forbids, and what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self._is_in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name.startswith("on") or name == "style":
                self.forbidden.append(f"{tag} {name}")
            if name in ("src", "href"):
                self.references.append(str(value))
            if name == "id":
                self.ids.append(str(value))
        self._is_in_script = tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._is_in_script and data.strip():
            self.forbidden.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._is_in_script = False


def test_the_page_and_its_scripts_fit_together() -> None:
    reader = Reader()
    reader.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    assert reader.forbidden == []
    assert {f"/{reference}" for reference in reader.references} <= PATHS.keys()
    assert len(set(reader.ids)) == len(reader.ids)
    source = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    assert set(re.findall(r'byId\("([\w-]+)"\)', source)) <= set(reader.ids)
    imported = set(re.findall(r'from "\./([\w.]+)"', source)) | {"app.js"}
    assert imported == {path.name for path in SCRIPTS}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js on the path")
def test_scripts_can_be_parsed_and_pure_functions_keep_their_laws(tmp_path: Path) -> None:
    laws = Path(__file__).with_name("playground_laws.mjs")
    for path in (*SCRIPTS, laws):
        shutil.copy(path, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')  # Node takes them for modules then, as a browser does
    command = ["node", "--experimental-vm-modules", str(tmp_path / laws.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [path.name for path in SCRIPTS]
