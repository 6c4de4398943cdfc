"""Whether a grammar can be enforced at all, said by a process that may die of it.

A schema of a hundred letters can keep the compiler busy for hours, or take all memory. So it is tried in a process of
its own, with a second of CPU time and a bound on memory, before any engine sees it. Verdicts are kept.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from ernie_cluster.errors import InvalidRequest, Overloaded

CPU_S = 1
"""Of the trying process, its start (0.2 s) included."""
MEMORY_BYTES = 1 << 30
WALL_S = 30.0
"""On a machine that has no time even for this."""
_NUM_STEPS = 16
"""Tokens of an answer that are tried: trouble may begin behind the first."""

_SPOKE = "verdict: "
"""Before the last words of a process that lived to say them."""

_ROOT = Path(__file__).parents[2]


def check(text: str) -> None:
    """Try a grammar; takes a fraction of a second, or nothing when it has been tried before.

    Raises:
        InvalidRequest: it is wrong, or too complex.
        Overloaded: it could not be tried in time.
    """
    reason = _verdict(text)
    if reason:
        raise InvalidRequest(reason, code="invalid_grammar")


@functools.lru_cache(maxsize=1024)
def _verdict(text: str) -> str:
    """What is wrong with a grammar; "" for nothing."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    try:
        trial = subprocess.run(
            [sys.executable, "-m", __name__],
            input=text.encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": path},
            timeout=WALL_S,
        )
    except subprocess.TimeoutExpired:
        raise Overloaded(f"the answer's format could not be checked within {WALL_S:g} s") from None
    words = trial.stdout.decode()
    if not words.startswith(_SPOKE):  # where child processes are not waited for, there is no exit status to go by
        return f"this is too complex: compiling it takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MiB; simplify it"
    return words.removeprefix(_SPOKE)


def _try(text: str) -> str:
    """Compile, and write an answer of a few letters; what is wrong, or ""."""
    from ernie_cluster.grammar.compile import Compiler, byte_vocabulary

    try:
        matcher = Compiler(byte_vocabulary()).compile(text)
        for _ in range(_NUM_STEPS):
            if matcher.is_finished:
                break
            letters = matcher.allowed()[:256].nonzero()[0]
            if not len(letters):
                break
            matcher.consume([int(letters[len(letters) // 2])])
    except InvalidRequest as e:
        return e.message
    return ""


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout.buffer.write((_SPOKE + _try(sys.stdin.buffer.read().decode())).encode())


if __name__ == "__main__":
    _main()
