"""What the documents point to is there, and every document is pointed to."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ernie_cluster.config.reference import reference
from tests.unit.docs.pages import ROOT, Page, pages

LANGUAGES = {"sh", "console", "yaml", "python", "json", "promql", "text"}
"""`text` is what nobody runs: output, trees, formulas. The others are held to something by the tests beside this one."""

_RULE = re.compile(r"(\.?[a-z-]+) \{([^}]*)\}")

EVERY_PAGE = pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)


@EVERY_PAGE
def test_links_lead_somewhere(page: Page) -> None:
    lost = [f"{page.name}:{line}: {target}" for line, target in page.links if not leads_somewhere(page.path, target)]
    assert not lost


def leads_somewhere(page: Path, target: str) -> bool:
    if target.startswith(("https://", "http://")):
        return True  # of others; nothing here asks the network
    path, _, anchor = target.partition("#")
    there = Path(os.path.normpath(page.parent / path)) if path else page
    if not there.exists() or not there.is_relative_to(ROOT):
        return False
    return not anchor or (there.suffix == ".md" and anchor in Page(there).anchors)


@pytest.mark.parametrize("target", ["no-such.md", "#no-such", "docs/index.md#no-such", "../outside", "LICENSE#a"])
def test_a_lost_link_is_seen(target: str) -> None:
    assert not leads_somewhere(ROOT / "README.md", target)


@EVERY_PAGE
def test_blocks_say_what_they_are(page: Page) -> None:
    unknown = [f"{block}: {block.language!r}" for block in page.blocks if block.language not in LANGUAGES]
    assert not unknown, f"name one of {', '.join(sorted(LANGUAGES))}"


def test_every_page_is_in_the_table_of_contents() -> None:
    index = Page(ROOT / "docs/index.md")
    linked = {os.path.normpath(index.path.parent / target.partition("#")[0]) for _, target in index.links}
    missing = [
        page.name for page in pages() if page.name not in ("README.md", index.name) and str(page.path) not in linked
    ]
    assert not missing


def test_the_readme_leads_to_the_table_of_contents() -> None:
    assert "docs/index.md" in {target for _, target in Page(ROOT / "README.md").links}


def test_the_readme_stays_a_front_door() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 300, "longer texts belong into docs/"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.name)
def test_drawings_are_whole_and_load_nothing(path: Path) -> None:
    tree = ET.fromstring(path.read_text(encoding="utf-8"))
    assert tree.tag.endswith("svg")
    assert tree.get("viewBox") or (tree.get("width") and tree.get("height")), "it has no size"
    targets = [value for node in tree.iter() for name, value in node.attrib.items() if name.endswith("href")]
    assert all(value.startswith("#") for value in targets)


def test_the_architecture_is_drawn_for_light_and_dark_pages() -> None:
    """Every class that gives a colour to a light page gives another one to a dark page."""
    style = (ROOT / "docs/architecture.svg").read_text().partition("<style>")[2].partition("</style>")[0]
    light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
    coloured = {name for name, body in _RULE.findall(light) if "#" in body}
    assert coloured
    assert coloured <= {name for name, body in _RULE.findall(dark) if "#" in body}


def test_the_architecture_uses_classes_that_are_there() -> None:
    text = (ROOT / "docs/architecture.svg").read_text()
    used = {name for names in re.findall(r'class="([^"]*)"', text) for name in names.split()}
    assert used <= set(re.findall(r"\.([a-z-]+)", text.partition("<style>")[2].partition("</style>")[0]))


def test_the_configuration_reference_is_what_the_code_says() -> None:
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == reference(), "write it again: ernie-cluster config --reference > docs/configuration.md"
