from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from ernie_cluster.transport.arena import Arena


class ArenaMachine(RuleBasedStateMachine):
    """Ranges are granted whole, never overlap, and come back whole."""

    runs = Bundle("runs")

    @initialize(lines=st.integers(1, 40))
    def make(self, lines: int) -> None:
        self.arena = Arena(64 * lines)
        self.used: dict[int, int] = {}

    @rule(target=runs, nbytes=st.integers(1, 64 * 42))
    def allocate(self, nbytes: int):  # type: ignore[no-untyped-def]
        offset = self.arena.allocate(nbytes)
        longest = self._longest_gap()
        if offset is None:
            assert nbytes > longest
            return multiple()
        assert nbytes <= longest
        assert offset % 64 == 0
        assert offset + nbytes <= self.arena.size
        assert all(offset + nbytes <= start or start + size <= offset for start, size in self.used.items())
        self.used[offset] = nbytes
        return offset

    @rule(offset=consumes(runs))
    def free(self, offset: int) -> None:
        self.arena.free(offset)
        del self.used[offset]

    def _longest_gap(self) -> int:
        """By brute force over cache lines."""
        taken = {line for start, size in self.used.items() for line in range(start // 64, -(-(start + size) // 64))}
        longest = length = 0
        for line in range(self.arena.size // 64):
            length = 0 if line in taken else length + 1
            longest = max(longest, length)
        return 64 * longest

    @invariant()
    def tiles(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check()

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        for offset in self.used:
            self.arena.free(offset)
        assert self.arena.allocate(self.arena.size) == 0


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestArena = ArenaMachine.TestCase


def test_the_lowest_room_is_used_first() -> None:
    arena = Arena(64 * 10)
    assert [arena.allocate(n) for n in (64, 65, 64)] == [0, 64, 192]
    arena.free(0)
    arena.free(64)
    assert arena.allocate(192) == 0
    assert arena.allocate(1) == 256
