"""Arithmetic without rounding: sums, differences, products and quotients of decimal numbers. Evaluates nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

from ernie_cluster.builtin.base import ToolResult, function
from ernie_cluster.builtin.pictures import Gallery, shortened

CALCULATOR = function(
    "calculator",
    "Evaluates an arithmetic expression.",
    {"expression": {"type": "string", "description": "For example 12*34."}},
    ["expression"],
)

MAX_CHARS = 200
MAX_EXPONENT = 300
"""Numbers reach up to 10 ** 300."""
MAX_DECIMALS = 30
"""A quotient with more is rounded."""
NUM_ROUNDED_DIGITS = 16

_SPELLINGS = str.maketrans("×÷−", "*/-")
_TOKEN = re.compile(r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|([-+*/()]))", re.ASCII)


class Calculator:
    """Evaluates an expression."""

    name = "calculator"
    definition = CALCULATOR

    def run(self, arguments: Mapping[str, Any], pictures: Gallery) -> ToolResult:
        return ToolResult(calculate(arguments.get("expression")))


def calculate(expression: object) -> str:
    """Value of a text of numbers, `+ - * /` and brackets: exact, but for quotients without an end.

    "12*34" gives "408", "0.1+0.2" gives "0.3", "1/3" gives "0.3333333333333333".

    Raises:
        ValueError: anything else, a division by zero, or a number beyond `MAX_EXPONENT`.
    """
    if not isinstance(expression, str) or len(expression) > MAX_CHARS:
        raise ValueError(f"an expression is a text of at most {MAX_CHARS} characters")
    try:
        return _spelled(_Reader(expression).value())
    except (ArithmeticError, RecursionError, ValueError) as e:
        raise ValueError(f"{shortened(expression)} cannot be evaluated: {e}") from None


class _Reader:
    """Evaluates while it reads, a method per precedence."""

    def __init__(self, expression: str) -> None:
        self._tokens = _split(expression.translate(_SPELLINGS))
        self._next = self._tokens.pop(0)

    def value(self) -> Fraction:
        """Of all of it."""
        value = self._sum()
        if self._next:
            raise ValueError(f"{self._next!r} was not expected")
        return value

    def _sum(self) -> Fraction:
        value = self._product()
        while self._next in ("+", "-"):
            value = _bounded(value + self._product() if self._take() == "+" else value - self._product())
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self._next in ("*", "/"):
            value = _bounded(value * self._factor() if self._take() == "*" else value / self._factor())
        return value

    def _factor(self) -> Fraction:
        token = self._take()
        if token in ("+", "-"):
            return -self._factor() if token == "-" else self._factor()
        if token == "(":
            value = self._sum()
            if self._take() != ")":
                raise ValueError("a bracket is not closed")
            return value
        if not token or token in "*/)":
            raise ValueError(f"a number was expected, not {token!r}" if token else "a number is missing at the end")
        exponent = token.lower().partition("e")[2]
        if exponent and (len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT):
            raise ValueError(f"the exponent {exponent} is beyond {MAX_EXPONENT}")
        return _bounded(Fraction(token))

    def _take(self) -> str:
        token, self._next = self._next, self._tokens.pop(0) if self._tokens else ""
        return token


def _split(expression: str) -> list[str]:
    """Numbers and signs; "" at the end."""
    tokens, done, end = [], 0, len(expression.rstrip())
    while done < end:
        match = _TOKEN.match(expression, done)
        if match is None:
            raise ValueError("only numbers, + - * / and brackets are evaluated")
        tokens.append(match[1] or match[2])
        done = match.end()
    return [*tokens, ""]


def _bounded(value: Fraction) -> Fraction:
    if abs(value) >= 10**MAX_EXPONENT:
        raise ValueError(f"a number reaches 10 to the power of {MAX_EXPONENT}")
    return value


def _spelled(value: Fraction) -> str:
    """Without a point where it is whole, with all decimals where they end."""
    rest, num_decimals = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        num_decimals = max(num_decimals, count)
    if num_decimals == 0 and rest == 1:
        return str(value.numerator)
    if rest == 1 and num_decimals <= MAX_DECIMALS:
        return str(Decimal(f"{value.numerator * 10**num_decimals // value.denominator}E-{num_decimals}"))
    return str(Context(prec=NUM_ROUNDED_DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator)))
