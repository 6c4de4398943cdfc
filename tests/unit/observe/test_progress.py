"""A bar for what takes long, and nothing for what does not."""

from __future__ import annotations

import io

from ernie_cluster.observe.progress import ByteProgress

GB = 10**9


class Clock:
    """Moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(out: io.StringIO, seconds: int, steps: int) -> str:
    clock = Clock()
    progress = ByteProgress("weights", out, clock)
    for step in range(1, steps + 1):
        clock.now += seconds / steps
        progress(step * GB, steps * GB)
    return out.getvalue()


def test_short_loads_say_nothing() -> None:
    for out in (io.StringIO(), Terminal()):
        assert watched(out, 1, 50) == ""


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    lines = watched(io.StringIO(), 25, 100).splitlines()
    assert len(lines) == 4  # after 2, 12 and 22 seconds, and at the end
    assert lines[-1] == "weights 100.00 of 100.00 GB, 4.00 GB/s"


def test_a_terminal_gets_one_line_that_grows() -> None:
    said = watched(Terminal(), 10, 100)
    assert said.count("\n") == 1
    assert said.endswith(f"[{'#' * 30}]\n")
    filled = [frame.count("#") for frame in said.split("\r")[1:]]
    assert filled == sorted(filled)
    assert len(set(filled)) > 10


def test_nothing_to_do_is_done() -> None:
    out = io.StringIO()
    ByteProgress("weights", out, Clock())(0, 0)
    assert out.getvalue() == ""
