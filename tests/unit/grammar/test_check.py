"""Grammars that cannot be enforced are refused, and those that explode do it where nobody is hurt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ernie_cluster.errors import InvalidRequest, Overloaded
from ernie_cluster.grammar import check as module
from ernie_cluster.grammar import write
from ernie_cluster.grammar.check import check

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(
    "body",
    [
        write.json_body({"type": "object"}),
        write.json_body({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}}),
        write.regex_body("(a|b)*c{1000}"),
        write.regex_body("((a{1000}){1000}){1000}"),
        write.choice_body(["a", "b"]),
    ],
)
def test_good_ones_pass(body: str) -> None:
    check(write.grammar(body))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (write.json_body({"type": "integer", "not": {"const": 3}}), "Unimplemented keys"),
        (write.json_body({"$ref": "http://secret.example/"}), "not present"),
        (write.json_body({"type": "number", "minimum": 2, "maximum": 1}), "cannot be enforced"),
        (write.regex_body("(a"), "unclosed group"),
        (write.regex_body("(?=a)b"), "look-around"),
        (write.regex_body(r"[^\s\S]"), "no text fits it"),
    ],
)
def test_bad_ones_are_told_why(body: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as raised:
        check(write.grammar(body))
    assert len(str(raised.value)) < 300


EXPLOSIVE: dict[str, dict[str, Any]] = {
    "patterns at once": {"type": "string", "allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(30)]},
    "multiples": {"type": "integer", "multipleOf": 999_983},
    "alternatives squared": {
        "allOf": [{"anyOf": [{"properties": {f"{c}{i}": {}}} for c in "abc"]} for i in range(16)],
        "type": "object",
    },
}


@pytest.mark.parametrize("name", EXPLOSIVE)
def test_explosive_schemas_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"too complex|too large"):
        check(write.grammar(write.json_body(EXPLOSIVE[name])))


def test_explosive_regexes_are_refused() -> None:
    both = " & ".join(write.regex_body(f"(.*a.{{{n}}}b.*){{9}}") for n in range(12, 24))
    with pytest.raises(InvalidRequest, match="too complex"):
        check(f"start: ALL\nALL: {both}\n")


def test_a_verdict_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    text = write.grammar(write.choice_body([json.dumps(list(range(9)))]))
    check(text)
    monkeypatch.setattr(module.subprocess, "run", None)
    check(text)


def test_a_machine_without_time_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    text = write.grammar(write.choice_body(["some time"]))
    with monkeypatch.context() as patch:
        patch.setattr(module, "WALL_S", 1e-6)
        with pytest.raises(Overloaded):
            check(text)
    check(text)
