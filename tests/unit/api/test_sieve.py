"""What a client sees of several rounds does not depend on how their text was cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.api.blocks import Row
from ernie_cluster.api.markup import AnswerParser, Markup, Pieces
from ernie_cluster.api.sieve import BREAK, Sieve
from ernie_cluster.api.stops import StopStringFilter
from tests.unit.api.rounds import ADD, LOOK, call

THEIRS = call("weather", {"city": "Ulm"})
THOUGHTS = st.sampled_from(["", "why", "a\nb"])


def texts(*pieces: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(["", "Hm.\n", ADD, LOOK, "So.\n", *pieces]), min_size=1, max_size=4).map("".join)


ROUNDS = st.builds(
    lambda first, last: [*first, last],
    st.lists(st.tuples(THOUGHTS, texts()), max_size=2),
    st.tuples(THOUGHTS, texts(THEIRS)),  # a client's call ends the answer
)


def sieved(rounds: list[tuple[str, str]], size: int) -> tuple[Pieces, list[int], Row]:
    """All that is shown of rounds of (thought, text), how many calls were kept back in each, and the shown blocks."""
    sieve, shown, kept, row = Sieve({"calculator", "image_zoom_in_tool"}), Pieces(), [], Row()
    for thought, text in rounds:
        parser = AnswerParser(Markup("open", has_tools=True), StopStringFilter(()))
        whole = f"{thought}</think>\n\n{text}"
        pieces = [parser.push(whole[i : i + size]) for i in range(0, len(whole), size)]
        for piece in [*pieces, parser.flush()]:
            news = sieve.push(piece)
            row.push(news)
            shown.add(news)
        said, own = sieve.end_round()
        assert (said.reasoning, [c.index for c in said.calls]) == (thought, list(range(len(said.calls))))
        kept.append(len(own))
    return shown, kept, row


@settings(max_examples=50)
@given(ROUNDS, st.integers(1, 40))
def test_cuts_do_not_matter(rounds: list[tuple[str, str]], size: int) -> None:
    shown, kept, row = sieved(rounds, size)
    once, kept_once, row_once = sieved(rounds, 10_000)
    assert (shown, kept, row.blocks) == (once, kept_once, row_once.blocks)
    assert kept == [text.count('"calculator"') + text.count('"image_zoom_in_tool"') for _, text in rounds]
    assert [c.index for c in shown.calls] == list(range(sum(text.count("weather") for _, text in rounds)))
    assert {c.name for c in shown.calls} <= {"weather"}
    assert shown.reasoning == BREAK.join(thought for thought, _ in rounds if thought)
    assert "".join(block.text for block in row.blocks if block.kind == "text") == shown.content
