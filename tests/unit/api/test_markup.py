"""The answer parser: laws over any text and any cutting of it, then what a model can get wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.api.markup import AnswerParser, Markup, Pieces
from ernie_cluster.api.stops import StopStringFilter
from ernie_cluster.cli.tiny_tokenizer import MARKUP_TOKENS, train_tokenizer
from ernie_cluster.inputs.tokenizer import IncrementalDecoder, Tokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "}"]}}\n</tool_call>\n'
ARGUMENTS = '{"x": [1, "}"]}'
MARKS = ("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>")
FRAGMENTS = (
    *MARKS, CALL, "\n", " ", "a", "<", "</", "_call>", "{", "}", "[", "]", '"', "\\", '\\"', ":", ",", "null",
    '{"name": "f"', ', "arguments": {', '"name"', '"arguments"', '"f"', "🙂",
)  # fmt: skip
MARKUPS = st.builds(Markup, st.sampled_from(["none", "maybe", "open"]), st.booleans())
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)
WORDS = st.text('ab {}"\\<>/\n🙂', max_size=20).map(lambda text: text.strip("\n"))


def parse(
    texts: list[str], markup: Markup, stops: tuple[str, ...] = (), unsearched: str = ""
) -> tuple[Pieces, list[Pieces]]:
    """Everything together, and what each text gave; the last is the flush."""
    parser = AnswerParser(markup, StopStringFilter(stops))
    steps = [parser.push(unsearched, is_searched=False)]
    steps += [parser.push(text) for text in texts]
    steps.append(parser.flush())
    whole = Pieces()
    for step in steps:
        whole.add(Pieces(step.content, step.reasoning, [type(c)(c.index, c.name, c.arguments) for c in step.calls]))
    return whole, steps


def parsed(text: str, markup: Markup, stops: tuple[str, ...] = ()) -> tuple[str, str, list[tuple[str | None, str]]]:
    whole, _ = parse([text], markup, stops)
    return whole.reasoning, whole.content, [(c.name, c.arguments) for c in whole.calls]


def cut(text: str, cuts: list[int]) -> list[str]:
    ends = sorted(min(at, len(text)) for at in cuts)
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


# Laws


@given(
    TEXTS, MARKUPS, st.lists(st.integers(0, 200)), st.sampled_from([(), ("a",), ("\n\n", "}a"), ("<", "call")]), TEXTS
)
def test_cutting_never_matters(
    text: str, markup: Markup, cuts: list[int], stops: tuple[str, ...], unsearched: str
) -> None:
    expected, _ = parse([text], markup, stops, unsearched)
    assert parse(cut(text, cuts), markup, stops, unsearched)[0] == expected
    assert parse(list(text), markup, stops, unsearched)[0] == expected


@given(TEXTS, st.booleans(), st.sampled_from(["maybe", "open"]))
def test_without_calls_nothing_is_lost_but_line_breaks(text: str, has_tools: bool, reasoning: Any) -> None:
    def bare(text: str) -> str:
        for gone in ("\n", "<response>", "</response>"):
            text = text.replace(gone, "")
        return text

    whole, _ = parse([text], Markup(reasoning, has_tools))
    inside = "" if reasoning == "open" else "<think>"
    forms = [inside + whole.reasoning, f"{inside}{whole.reasoning}</think>{whole.content}"]
    if reasoning == "maybe":
        forms.append(whole.content)
    assert whole.calls or bare(text) in map(bare, forms)


@given(TEXTS)
def test_text_that_is_not_to_be_read_stays_as_it_is(text: str) -> None:
    assert parsed(text, Markup()) == ("", text, [])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("a\"\\}{\n") | st.sampled_from(MARKS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\""), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
calls_written = st.lists(
    st.tuples(st.text("fg_", min_size=1), st.dictionaries(st.text('xy"'), json_values)), max_size=3
)
indents = st.sampled_from([None, 2])


@given(WORDS, WORDS, calls_written, indents, st.sampled_from(["maybe", "open"]), st.booleans())
def test_what_a_model_writes_well_is_read_back(
    reasoning: str, content: str, calls: list[tuple[str, Any]], indent: int | None, begins: Any, is_wrapped: bool
) -> None:
    text = "" if begins == "open" else "<think>"
    text += f"\n{reasoning}\n</think>\n\n"
    text += f"<response>\n{content}\n</response>\n" if is_wrapped else content
    text += "\n\n" if calls else ""
    for name, arguments in calls:
        printed = json.dumps({"name": name, "arguments": arguments}, indent=indent, ensure_ascii=False)
        text += f"<tool_call>\n{printed}\n</tool_call>\n"
    whole, steps = parse(list(text), Markup(begins, has_tools=True))
    assert (whole.reasoning, whole.content) == (reasoning, content)
    assert [(c.name, json.loads(c.arguments)) for c in whole.calls] == calls
    pieces = [piece for step in steps for piece in step.calls]
    names = [(p.index, p.name) for p in pieces if p.name is not None]
    assert names == [(i, name) for i, (name, _) in enumerate(calls)]
    assert [p.index for p in pieces] == sorted(p.index for p in pieces)


@given(st.dictionaries(st.text("xy"), json_values))
def test_arguments_are_passed_on_as_they_come(arguments: dict[str, Any]) -> None:
    printed = json.dumps(arguments)
    _, steps = parse(list(f'<tool_call>{{"name": "f", "arguments": {printed}'), Markup(has_tools=True))
    shown = "".join(call.arguments for step in steps[:-1] for call in step.calls)
    assert printed.startswith(shown)
    assert len(printed) - len(shown) < len("\n</tool_call>")


@pytest.mark.parametrize("held", ["special", "added", "text"])
def test_marks_are_read_however_the_tokenizer_holds_them(held: str) -> None:
    """As tokens marked special, as other added tokens, and letter by letter."""
    raw = json.loads(train_tokenizer(800).to_str())
    for token in raw["added_tokens"]:
        token["special"] = token["special"] or held == "special"
    if held == "text":
        raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] not in MARKUP_TOKENS]
    tokenizer = Tokenizer(type(train_tokenizer(800)).from_str(json.dumps(raw)))
    ids = tokenizer.encode(f"why\n</think>\n\n\n{CALL}", allow_special=True)
    decoder = IncrementalDecoder(tokenizer)
    whole, _ = parse([*(decoder.push([i]) for i in ids), decoder.flush()], Markup("open", has_tools=True))
    assert (whole.reasoning, whole.content) == ("why", "")
    assert [(c.name, c.arguments) for c in whole.calls] == [("f", ARGUMENTS)]


# Examples

TOOLS = Markup("maybe", has_tools=True)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"Look.\n\n{CALL}", "Look.", [("f", ARGUMENTS)]),
        (f"\n{CALL}{CALL}", "", [("f", ARGUMENTS)] * 2),
        (f"a\n{CALL}\nb\n", "a\nb", [("f", ARGUMENTS)]),
        ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", '{"x": 1}')]),
        ('<tool_call>{"name": "\\u0066", "arguments": {}}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}, "id": 3}</tool_call>b', "b", [("f", '{"x": 1}')]),
        # a missing end
        ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f"}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}\nDone.', "Done.", [("f", "{}")]),
        (f'<tool_call>{{"name": "g", "arguments": {{}}}}\n{CALL}', "", [("g", "{}"), ("f", ARGUMENTS)]),
        # cut off, or broken, after the arguments began
        ('a<tool_call>{"name": "f", "arguments": {"x": "y', "a", [("f", '{"x": "y')]),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\', "", [("f", '{"x": "\\')]),
        (f'<tool_call>{{"name": "g", "arguments": {{"x": 1\n</tool_call>\n{CALL}', "", [("g", '{"x": 1\n'), ("f", ARGUMENTS)]),
        (f'<tool_call>{{"name": "g", "arguments": {{"x": "1}}}}\n</tool_call>{CALL}', "", [("g", '{"x": "1}}'), ("f", ARGUMENTS)]),
        ('<tool_call>{"name": "f", "arguments": {"x": oops}}</tool_call>', "", [("f", '{"x": oops}')]),
    ],
)  # fmt: skip
def test_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parsed(text, TOOLS) == ("", content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "Write <tool_call> to call a tool.",
        "<tool_call>",
        "<tool_call>[]</tool_call>",
        "<tool_call>{oops}</tool_call>\nand more\n",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": ""}</tool_call>',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": NaN}</tool_call>',
        '<tool_call>{"arguments": {"x": NaN}, "name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "argu',
        '<tool_call>{"x": ' + "[" * 9999 + "</tool_call>",
        "</tool_call></think></response>\n",
    ],
)
def test_what_is_no_call_is_text_and_nothing_of_it_is_lost(text: str) -> None:
    assert parsed(text, TOOLS) == ("", text, [])
    assert parsed(f"{text}{CALL}", TOOLS)[2][-1:] == [("f", ARGUMENTS)]


@pytest.mark.parametrize("markup", [Markup(), Markup("maybe")])
def test_without_tools_a_call_is_text(markup: Markup) -> None:
    assert parsed(CALL, markup) == ("", CALL, [])


@pytest.mark.parametrize(
    ("reasoning", "text", "expected"),
    [
        ("open", "\nwhy\n</think>\n\nyes\n", ("why", "yes\n", [])),
        ("open", "never ends\n", ("never ends", "", [])),
        ("open", f"{CALL}</think>a</think>", (CALL.rstrip("\n"), "a</think>", [])),
        ("open", "why</think><response>\nyes\n</response>\n", ("why", "yes", [])),
        ("open", "why</think><response>yes", ("why", "yes", [])),
        ("maybe", "\n<think>why</think>yes", ("why", "yes", [])),
        ("maybe", "\nyes", ("", "\nyes", [])),
        ("maybe", "yes <think>", ("", "yes <think>", [])),
        ("maybe", "<response>", ("", "<response>", [])),
    ],
)
def test_reasoning(reasoning: Any, text: str, expected: Any) -> None:
    assert parsed(text, Markup(reasoning, has_tools=True)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a STOP b</think>c STOP d", ("a STOP b", "c ", [])),
        (f"a</think>\n\n{CALL.replace('f', 'STOP')}", ("a", "", [("STOP", ARGUMENTS)])),
        (f"a</think>b STOP {CALL}", ("a", "b ", [])),
        ("a</think>ST</think>OP", ("a", "ST</think>OP", [])),
        ("a</think>\n\nb\n\nc", ("a", "b", [])),
        (f"a</think>\n\n{CALL}\n\n{CALL}", ("a", "", [("f", ARGUMENTS)] * 2)),
    ],
)
def test_stop_strings_are_searched_for_in_content_only(text: str, expected: Any) -> None:
    assert parsed(text, Markup("open", has_tools=True), ("STOP", "\n\n")) == expected


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    parser = AnswerParser(TOOLS, StopStringFilter(()))
    assert parser.push("a <").content == "a "
    assert parser.push("b").content == "<b"
    assert parser.push("\n").content == ""
    assert parser.push("<tool_call> it").content == "\n<tool_call> it"
