"""What grammars let through, token by token with a token for each byte."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.errors import InvalidRequest
from ernie_cluster.grammar import write
from ernie_cluster.grammar.compile import Compiler, byte_vocabulary

END = 256
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@functools.cache
def compiler() -> Compiler:
    return Compiler(byte_vocabulary())


def accepts(grammar: str, text: str) -> bool:
    """Whether this may be a whole answer; a mask and the tokens that are taken must agree on the way."""
    matcher = compiler().compile(grammar)
    for byte in text.encode():
        if not matcher.allowed()[byte]:
            with pytest.raises(InvalidRequest):
                matcher.consume([byte])
            return False
        matcher.consume([byte])
    return bool(matcher.allowed()[END])


texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('/\\"\n\r\t ab'), min_size=1, max_size=6)


@given(st.lists(texts, min_size=1, max_size=4), texts)
def test_choices_and_nothing_else(choices: list[str], other: str) -> None:
    grammar = write.grammar(write.choice_body(choices))
    assert all(accepts(grammar, choice) for choice in choices)
    assert accepts(grammar, other) == (other in choices)


@given(texts, texts)
def test_an_escaped_text_is_a_regex_for_itself(text: str, other: str) -> None:
    grammar = write.grammar(write.regex_body(re.escape(text)))
    assert accepts(grammar, text)
    assert accepts(grammar, other) == (other == text)


@given(
    st.sampled_from([r"a/b", r"a\/b", r"^a+$", r"[/\\]+", "a\nb", r"\\/", "a|b/", "x{2,3}", r"[^/]"]),
    st.text("a/b\\\nx", max_size=4),
)
def test_regexes_mean_what_they_mean_elsewhere(regex: str, text: str) -> None:
    assert accepts(write.grammar(write.regex_body(regex)), text) == (re.fullmatch(regex.strip("^$"), text) is not None)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ('{"age": 3}', True),
        ('{"age":3,"x":[1, {"y": null}]}', True),
        ('{\n    "age": 3\n}', True),
        ('{"age": "3"}', False),
        ("{}", False),
        ('{"age": 3', False),
        ('{"age": 3} ', False),
        (f'{{{" " * 65}"age": 3}}', False),
    ],
)
def test_json(text: str, is_right: bool) -> None:
    assert accepts(write.grammar(write.json_body(PERSON)), text) == is_right


def test_a_schema_s_own_options_do_not_count() -> None:
    schema = {**PERSON, "x-guidance": {"whitespace_flexible": False, "lenient": True}}
    assert accepts(write.grammar(write.json_body(schema)), '{ "age" : 3 }')


CALL = '<tool_call>\n{"name": "f", "arguments": {"age": 3}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "g\\"<", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "is_one", "are_several"),
    [
        (CALL, True, True),
        (OTHER, True, True),
        (f"{CALL}\n{OTHER}", False, True),
        (f"\n\n{CALL}\n", True, True),  # as the chat template writes them
        (f"\n\n{CALL}\n{OTHER}\n", False, True),
        (f"\n\n\n{CALL}", False, False),
        (f"{CALL}\n\n", False, False),
        (CALL.replace("3", '"3"'), False, False),
        (CALL.replace('"f"', '"h"'), False, False),
        ("", False, False),
        (f"Well. {CALL}", False, False),
    ],
)
def test_calls(text: str, is_one: bool, are_several: bool) -> None:
    tools: dict[str, Any] = {"f": PERSON, 'g"<': {"type": "object"}}
    assert accepts(write.grammar(write.calls_body(tools, at_most_one=True)), text) == is_one
    assert accepts(write.grammar(write.calls_body(tools, at_most_one=False)), text) == are_several


@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}])
@given(st.recursive(st.integers(0, 9), lambda inner: st.lists(inner, max_size=2), max_leaves=4))
def test_json_may_be_laid_out_as_people_do(layout: dict[str, Any], numbers: Any) -> None:
    value = {"a": numbers, "b": {"c": [1, 2]}}
    grammar = write.grammar(write.json_body({"type": "object"}))
    assert accepts(grammar, json.dumps(value, **layout))


def test_blanks_between_the_marks_come_to_an_end() -> None:
    """A model in doubt takes a blank rather than the next mark, as often as it may."""
    matcher, num_blanks = compiler().compile(write.grammar(write.json_body(PERSON))), 0
    for mark in ("{", '"age"', ":", "1", "}"):
        while blank := next((b for b in b"\n \t" if matcher.allowed()[b]), None):
            matcher.consume([blank])
            num_blanks += 1
            assert num_blanks <= 5 * 25
        matcher.consume(mark.encode())
    assert matcher.is_finished


@pytest.mark.parametrize("thought", ["", "hm", "a < b\n</think", "é</thin k>"])
@pytest.mark.parametrize("gap", ["", "\n\n"])
def test_after_thinking(thought: str, gap: str) -> None:
    grammar = write.grammar(write.choice_body(["yes"]), write.json_body({"type": "object"}), after_thinking=True)
    assert accepts(grammar, f"{thought}</think>{gap}yes")
    assert accepts(grammar, f"{thought}</think>{gap}{json.dumps({})}")
    assert not accepts(grammar, f"{thought}</think>{gap}no")
    assert not accepts(grammar, f"{thought}yes")


def test_a_matcher_s_copy_goes_its_own_way() -> None:
    first = compiler().compile(write.grammar(write.choice_body(["ab", "ac"])))
    first.consume(b"a")
    second = first.copy()
    first.consume(b"b")
    assert first.is_finished
    assert not second.is_finished
    assert second.allowed().nonzero()[0].tolist() == [ord("b"), ord("c")]
