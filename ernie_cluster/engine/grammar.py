"""Grammars of the sequences on one engine: compiled once, followed token by token, never on the engine's thread.

The state of a `Constraint` is a pure function of grammar and output tokens. A sequence that was preempted keeps it; one
that is continued or handed over gets it again from its output. Until that is done the sequence is not scheduled, as if
a picture of its prompt were missing. From then on the mask for a token is computed while the model runs.

A grammar that fails ends its own sequence with an error, and nobody else's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.errors import ErnieClusterError, InvalidRequest
from ernie_cluster.grammar.compile import Compiler, Matcher

_MAX_COMPILED = 64
"""Grammars that are kept for the next request, the latest ones."""

Mask = NDArray[np.bool_]


class Constraint:
    """What one sequence may say next. Made by `Grammars.open`; used on the engine's thread.

    Args:
        masks: where masks are computed.
    """

    def __init__(self, masks: ThreadPoolExecutor) -> None:
        self._masks = masks
        self._matcher: Matcher | None = None
        self._mask: Future[Mask] | None = None
        self.is_ready = False
        """The output so far is taken in, or has failed."""
        self.error: ErnieClusterError | None = None
        """Why this sequence cannot go on."""

    def begin(self, matcher: Matcher) -> None:
        """Go on from here. On the compiling thread, before anybody else knows of it."""
        self._matcher = matcher
        self._expect()

    def allowed(self) -> Mask | None:
        """Tokens that may come next, bool [vocabulary]; None when that has failed, and `error` says why."""
        if self.error is not None:  # it failed after the step began
            return None
        assert self._mask is not None, "a sequence was scheduled before its grammar was there"
        try:
            return self._mask.result()
        except Exception as e:
            self.error = _translated(e)
            return None

    def advance(self, token: int) -> bool:
        """Take the token that was chosen; whether the answer is complete with it."""
        if self.error is not None:
            return False
        assert self._matcher is not None
        try:
            self._matcher.consume([token])
        except Exception as e:
            self.error = _translated(e)
            return False
        if self._matcher.is_finished:
            return True
        self._expect()
        return False

    def _expect(self) -> None:
        assert self._matcher is not None
        self._mask = self._masks.submit(self._matcher.allowed)


class Grammars:
    """Owns the compiled grammars, and threads that end with it: one to compile, which may take a second, two for masks.

    Args:
        compiler: makes the one for the model's vocabulary, when the first grammar comes; None where none will.
        wake: called when a constraint has become ready, on the compiling thread.
    """

    def __init__(self, compiler: Callable[[], Compiler] | None, wake: Callable[[], None]) -> None:
        self._make_compiler, self._wake = compiler, wake
        self._compiler: Compiler | None = None
        self._compiling = ThreadPoolExecutor(1, "grammar-compile")
        self._masks = ThreadPoolExecutor(2, "grammar-mask")
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()
        """By text, used on the compiling thread only, as the compiler is."""

    def open(self, text: str, output: Seq[int]) -> Constraint:
        """The constraint of a sequence that has this output so far; ready a little later."""
        constraint, tokens = Constraint(self._masks), tuple(output)
        self._compiling.submit(self._begin, constraint, text, tokens)
        return constraint

    def prepare(self, text: str) -> None:
        """A sequence with this grammar will come soon."""
        self._compiling.submit(self._compile, text)

    def _begin(self, constraint: Constraint, text: str, output: tuple[int, ...]) -> None:
        try:
            matcher = self._compile(text).copy()
            matcher.consume(output)
            constraint.begin(matcher)
        except Exception as e:
            constraint.error = _translated(e)
        constraint.is_ready = True
        self._wake()

    def _compile(self, text: str) -> Matcher:
        if text not in self._compiled:
            self._compiled[text] = self._known_compiler().compile(text)
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(text)
        return self._compiled[text]

    def _known_compiler(self) -> Compiler:
        if self._compiler is None:
            if self._make_compiler is None:
                raise InvalidRequest("this replica has no vocabulary to follow a grammar with")
            self._compiler = self._make_compiler()
        return self._compiler


def _translated(error: Exception) -> ErnieClusterError:
    if isinstance(error, ErnieClusterError):
        return error
    return InvalidRequest(f"the answer's grammar failed: {type(error).__name__}: {error}", code="invalid_grammar")
