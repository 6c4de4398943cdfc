"""Reading API keys: what is a key's entry, and that no message shows what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie_cluster.config.keys import ApiKey
from ernie_cluster.config.keys_file import load_keys
from ernie_cluster.errors import ConfigError

A, B = "a" * 64, "b" * 64


def load(folder: Path, text: str) -> tuple[ApiKey, ...]:
    path = folder / "keys.yaml"
    path.write_text(text, encoding="utf-8")
    return load_keys(path)


def test_entries(tmp_path: Path) -> None:
    text = (
        f"- {{name: alice, sha256: {A}}}\n- {{name: bob, sha256: {B}, requests_per_minute: 5, pixels_per_minute: 7}}\n"
    )
    alice, bob = load(tmp_path, text)
    assert (alice.name, alice.limits) == ("alice", {})
    assert bob.limits == {"requests": 5, "pixels": 7}


def test_an_empty_list_is_one(tmp_path: Path) -> None:
    assert load(tmp_path, "[]") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a list"),
        ("name: s3cret", "expected a list"),
        ("- s3cret", "keys.0 must have a name and sha256"),
        (f"- {{name: a, sha256: {A}}}\n- {{name: b, sha256: s3cret}}", "keys.1 must have"),
        ("- {name: a, sha256: 123456}", "keys.0 must have"),
        (f"- {{name: a, sha256: {A.upper()}}}", "keys.0 must have"),
        ("- {name: a, key: s3cret}", "keys.0 must have"),
        ("- {name: a\n  s3cret: [", "line 2: not valid YAML"),
        ("\x00s3cret", "not valid YAML"),
        (f"- {{sha256: {A}}}", "keys.0.name: missing"),
        (f"- {{name: a b, sha256: {A}}}", "keys.0: name must be"),
        (f"- {{name: a, sha256: {A}, rpm: 1}}", "unknown key 'rpm'"),
        (f"- {{name: a, sha256: {A}, tokens_per_minute: 0}}", "tokens_per_minute = 0 must be at least 1"),
        (f"- {{name: a, sha256: {A}}}\n- {{name: a, sha256: {B}}}", "two keys have one name"),
        (f"- {{name: a, sha256: {A}}}\n- {{name: b, sha256: {A}}}", "two keys have one sha256"),
    ],
)
def test_what_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value).removeprefix(str(tmp_path / "keys.yaml"))
    assert message != str(caught.value)
    assert words in message
    assert "s3cret" not in message
    assert "123456" not in message


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_keys(tmp_path / "none.yaml")
