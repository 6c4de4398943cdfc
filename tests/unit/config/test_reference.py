"""Every key of a configuration has a meaning, and a place in the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ernie_cluster.cli.main import main
from ernie_cluster.config.keys import ApiKey
from ernie_cluster.config.reference import Key, keys_of, meanings, reference, sections

SECTIONS = list(sections())
KEYS = [(path, key) for path, _, keys in SECTIONS for key in keys] + [("keys file", key) for key in keys_of(ApiKey)]


@pytest.mark.parametrize(("path", "key"), KEYS, ids=[f"{path}.{key.name}" for path, key in KEYS])
def test_every_key_has_a_meaning(path: str, key: Key) -> None:
    assert key.meaning, f"{path}.{key.name}: write beneath the field what it means, with unit and bounds"


def test_every_section_says_what_it_is_of() -> None:
    assert all(cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "(") for _, cls, _ in SECTIONS)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--reference"]) == 0
    assert capsys.readouterr().out == reference()


def test_all_sections_are_in_the_page_once() -> None:
    page = reference()
    for path, _, keys in SECTIONS:
        title = f"\n## `{path}`\n" if path else "\n## The top\n"
        assert page.count(title) == 1
        body = page.partition(title)[2].partition("\n## ")[0]
        assert [line.split("`")[1] for line in body.splitlines() if line.startswith("| `")] == [k.name for k in keys]


def test_inherited_keys_keep_their_meanings() -> None:
    @dataclass(frozen=True)
    class Below(ApiKey):
        more: int = 0
        """More."""

    assert meanings(Below)["more"] == "More."
    assert meanings(Below)["name"] == meanings(ApiKey)["name"]


def test_a_field_without_text_has_no_meaning() -> None:
    @dataclass(frozen=True)
    class Silent:
        a: int = 0
        b: int = 0
        """Of b."""

    assert meanings(Silent) == {"a": "", "b": "Of b."}


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("api", "| `max_body_bytes` | size | `32MiB` | Largest request body, at least 1. |"),
        ("transport", "| `staging_bytes` | size | `64MiB` |"),
        ("api", "| `grpc_port` | whole number | none |"),
        ("models.N", "| `path` | text | required |"),
        ("router", "| `max_wait_s` | duration | `30s` |"),
        ("api", "| `cors_origins` | list of text | empty |"),
    ],
)
def test_rows(path: str, row: str) -> None:
    body = reference().partition(f"\n## `{path}`\n")[2].partition("\n## ")[0]
    assert row in body
