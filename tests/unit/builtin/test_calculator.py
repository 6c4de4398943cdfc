"""The calculator is held against Python's fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.builtin.calculator import calculate

Tree = tuple[str, Fraction]
"""An expression, and its value."""


def joined(left: Tree, sign: str, right: Tree, space: str) -> Tree | None:
    text = f"({left[0]}){space}{sign}{space}({right[0]})"
    if sign == "/":
        return None if right[1] == 0 else (text, left[1] / right[1])
    return text, {"+": left[1] + right[1], "-": left[1] - right[1], "*": left[1] * right[1]}[sign]


NUMBERS = st.builds(
    lambda whole, decimals: (f"{whole}{decimals}", Fraction(f"{whole}{decimals}")),
    st.integers(0, 10**6),
    st.sampled_from(["", ".5", ".25", ".1", ".004"]),
)
TREES = st.recursive(
    NUMBERS,
    lambda inner: st.builds(joined, inner, st.sampled_from("+-*/"), inner, st.sampled_from(["", " "])).filter(bool),  # type: ignore[arg-type]
    max_leaves=5,
).filter(lambda tree: len(tree[0]) <= 200)


@given(TREES)
def test_values_are_those_of_fractions(tree: Tree) -> None:
    text, value = tree
    shown = calculate(text)
    if value.denominator == 1:
        assert shown == str(value)
    else:
        assert abs(Fraction(shown) - value) <= abs(value) * Fraction(1, 10**15)


@given(st.integers(-(10**9), 10**9), st.integers(0, 12))
def test_what_has_an_end_is_exact(numerator: int, num_decimals: int) -> None:
    shown = calculate(f"{numerator}/1{'0' * num_decimals}")
    assert Fraction(shown) == Fraction(numerator, 10**num_decimals)


@given(st.lists(st.sampled_from("+-*/"), min_size=1, max_size=6), st.data())
def test_precedence_is_that_of_python(signs: list[str], data: st.DataObject) -> None:
    text = "7"
    for sign in signs:
        text += sign + str(data.draw(st.integers(1, 99)))
    value = eval(
        "".join(f"Fraction({part})" if part.isdigit() else part for part in _parts(text)), {"Fraction": Fraction}
    )
    assert abs(Fraction(calculate(text)) - value) <= abs(value) * Fraction(1, 10**15)


def _parts(text: str) -> list[str]:
    for sign in "+-*/":
        text = text.replace(sign, f" {sign} ")
    return text.split()


@given(st.text("0123456789.eE+-*/()× ", max_size=30))
def test_any_text_has_a_value_or_is_refused(text: str) -> None:
    try:
        value = calculate(text)
    except ValueError:
        return
    assert abs(Fraction(value)) < 10**300


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*34", "408"),
        ("7×6", "42"),
        ("9 ÷ 2", "4.5"),
        ("-3 + 10", "7"),
        ("5−7", "-2"),
        ("--3", "3"),
        ("2*-3", "-6"),
        ("(1+2)*3", "9"),
        ("1/4", "0.25"),
        ("2.5*2", "5"),
        ("0.1+0.2", "0.3"),
        (".5+1.", "1.5"),
        ("1e3", "1000"),
        ("10/3", "3.333333333333333"),
        ("0/7", "0"),
        ("007", "7"),
    ],
)
def test_examples(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", " ", "1/0", "2**9", "abs(1)", "__import__('os')", "'a'*9", "1+", "(1", "1)", "1 2", "1_0", "0x1", "1j", "9" * 201,
     "True+1", "1e999", "9e200*9e200", "1e-99999999", "(" * 200, "-" * 200, "１+1", None, 12, [1]],
)  # fmt: skip
def test_nothing_else_is_evaluated(expression: object) -> None:
    with pytest.raises(ValueError, match=r"evaluated|at most 200"):
        calculate(expression)
