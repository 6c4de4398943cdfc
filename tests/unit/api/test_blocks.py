"""The row of an answer's blocks: laws over any answer and any cutting of it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.api.blocks import Block, Row, Step
from ernie_cluster.api.markup import AnswerParser, CallPiece, Markup, Pieces
from ernie_cluster.api.stops import StopStringFilter
from tests.unit.api.test_markup import CALL, MARKUPS, TEXTS, cut

STOPS = st.sampled_from([(), ("a<",), ("\n\n", "}a")])


def pieces_of(texts: list[str], markup: Markup, stops: tuple[str, ...]) -> list[Pieces]:
    parser = AnswerParser(markup, StopStringFilter(stops))
    return [*(parser.push(text) for text in texts), parser.flush()]


def merged(pieces: list[Pieces]) -> Pieces:
    whole = Pieces()
    for one in pieces:
        calls = [CallPiece(c.index, c.name, c.arguments, c.content_offset) for c in one.calls]
        whole.add(Pieces(one.content, one.reasoning, calls))
    return whole


def row_of(pieces: list[Pieces]) -> tuple[Row, list[Step]]:
    row = Row()
    steps = [step for one in pieces for step in row.push(one)]
    return row, steps + row.end()


@settings(max_examples=60)
@given(TEXTS, MARKUPS, STOPS, st.lists(st.integers(0, 200)), st.lists(st.integers(0, 30)))
def test_neither_cutting_nor_merging_matters(
    text: str, markup: Markup, stops: tuple[str, ...], cuts: list[int], merges: list[int]
) -> None:
    pieces = pieces_of(cut(text, cuts), markup, stops)
    ends = sorted({*(min(m, len(pieces)) for m in merges), len(pieces)})
    some = [merged(pieces[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    expected, _ = row_of([merged(pieces_of([text], markup, stops))])
    assert row_of(pieces)[0].blocks == expected.blocks
    assert row_of(some)[0].blocks == expected.blocks


@settings(max_examples=60)
@given(TEXTS, MARKUPS, STOPS, st.lists(st.integers(0, 200)))
def test_blocks_hold_the_whole_answer(text: str, markup: Markup, stops: tuple[str, ...], cuts: list[int]) -> None:
    pieces = pieces_of(cut(text, cuts), markup, stops)
    whole, (row, _) = merged(pieces), row_of(pieces)
    texts = {kind: "".join(b.text for b in row.blocks if b.kind == kind) for kind in ("text", "reasoning")}
    assert texts == {"text": whole.content, "reasoning": whole.reasoning}
    assert [(b.name, b.text) for b in row.blocks if b.kind == "call"] == [(c.name, c.arguments) for c in whole.calls]


@settings(max_examples=60)
@given(TEXTS, MARKUPS, STOPS, st.lists(st.integers(0, 200)))
def test_steps_tell_of_one_block_after_the_other(
    text: str, markup: Markup, stops: tuple[str, ...], cuts: list[int]
) -> None:
    row, steps = row_of(pieces_of(cut(text, cuts), markup, stops))
    told = {i: [s for s in steps if s.index == i] for i in range(len(row.blocks))}
    assert [step for i in sorted(told) for step in told[i]] == steps
    for i, block in enumerate(row.blocks):
        first, *middle, last = told[i]
        assert (first.kind, {s.kind for s in middle} - {"grow"}, last.kind) == ("begin", set(), "end")
        assert "".join(s.text for s in middle) == block.text
        assert all(s.text for s in middle)


def test_text_between_calls_stays_between_them() -> None:
    text = f"<think>so</think>one{CALL}two{CALL}"
    arguments = CALL.split('"arguments": ')[1].split("}\n<")[0]
    row, _ = row_of([merged(pieces_of([text], Markup("maybe", has_tools=True), ()))])
    call = Block("call", "f", arguments)
    assert row.blocks == [Block("reasoning", "", "so"), Block("text", "", "one"), call, Block("text", "", "two"), call]


def test_an_empty_answer_has_no_blocks() -> None:
    row, steps = row_of([Pieces(), Pieces()])
    assert (row.blocks, steps) == ([], [])
