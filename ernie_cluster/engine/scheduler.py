"""Who runs in the next step, and how many tokens of each.

One budget of tokens for all: decoding sequences take one each, the rest goes to chunks of prompts, so a long prompt
never stops the others. When blocks run out, the least urgent running sequence, of these the youngest, gives its own back
and is computed again later. Knows no tensor, no clock and no thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ernie_cluster.engine.block_pool import BlockPool, OutOfBlocks
from ernie_cluster.engine.sequence import Sequence, Status


@dataclass(slots=True)
class Schedule:
    """Decision for one step."""

    decodes: list[Sequence] = field(default_factory=list)
    """One token each."""
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    """(sequence, tokens of its prompt or replay)."""
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(n for _, n in self.chunks)


class Scheduler:
    """Owns the waiting and running sequences.

    Args:
        pool: where blocks come from.
        max_batch_tokens: tokens of one step.
        max_num_seqs: sequences of one step.
    """

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.pool = pool
        self.max_batch_tokens, self.max_num_seqs = max_batch_tokens, max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, or go on at once when its blocks and KV are here already."""
        if sequence.is_decoding:
            sequence.status = Status.RUNNING
            self.running.append(sequence)
        else:
            sequence.status = Status.WAITING
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; its blocks stay its own."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Schedule:
        """Fill the next step; blocks for its tokens are allocated, statuses changed."""
        out = Schedule()
        budget = self.max_batch_tokens
        taken: set[int] = set()
        # decoding first, most urgent and then oldest first: nobody who streams waits for a prompt
        for sequence in sorted(self.running, key=lambda s: (not s.is_decoding, s.request.priority)):
            if sequence.status is not Status.RUNNING or budget <= 0:
                continue  # preempted for another one, or the step is full
            if len(taken) >= self.max_num_seqs:
                break
            count = min(sequence.num_ready, budget)
            if count <= 0 or not self._make_room(sequence, count, out, taken):
                continue
            taken.add(id(sequence))
            self._take(sequence, count, out)
            budget -= count
        self._admit(out, budget, taken)
        return out

    def _admit(self, out: Schedule, budget: int, taken: set[int]) -> None:
        """Start waiting sequences by priority, then arrival; one that waits for a picture does not hold up the next."""
        if out.preempted:
            return
        is_short = False
        for sequence in sorted(self.waiting, key=lambda s: s.request.priority):
            if budget <= 0 or len(self.running) >= self.max_num_seqs:
                return
            # who has no blocks waits for them in turn; who has them goes on, else nobody would ever free any
            if not sequence.blocks and (is_short or not self._find_prefix(sequence)):
                is_short = True
                continue
            count = min(sequence.num_ready, budget)
            if count <= 0:
                continue
            self.waiting.remove(sequence)
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            taken.add(id(sequence))
            self._take(sequence, count, out)
            budget -= count

    @property
    def num_blocks_owed(self) -> int:
        """Blocks that preempted sequences wait for; whoever comes later must leave them."""
        return sum(self.pool.num_blocks_for(len(s.tokens)) for s in self.waiting if not s.blocks)

    def _find_prefix(self, sequence: Sequence) -> bool:
        """Give a sequence without blocks enough for all its tokens, cached ones first; False when they are not free.

        Whole prompts are admitted, never parts of them: else two half-admitted prompts could wait for each other's
        blocks. The last token is always computed, for its logits.
        """
        usable = sequence.hashes[: (len(sequence.tokens) - 1) // self.pool.block_size]
        shared = self.pool.share(usable)
        try:
            own = self.pool.allocate(self.pool.num_blocks_for(len(sequence.tokens)) - len(shared))
        except OutOfBlocks:
            self.pool.free(shared)
            return False
        sequence.blocks = shared + own
        sequence.num_computed = len(shared) * self.pool.block_size
        sequence.num_published = len(shared)
        return True

    def _make_room(self, sequence: Sequence, count: int, out: Schedule, taken: set[int]) -> bool:
        """Blocks for `count` more tokens of a running sequence; preempts less urgent and younger ones, at last itself."""
        needed = self.pool.num_blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        while needed > self.pool.num_free:
            victims = (s for s in reversed(self.running) if self._is_victim(s) and id(s) not in taken)
            victim = max(victims, key=lambda s: s.request.priority, default=None)
            if victim is None:
                return False
            self.preempt(victim)
            out.preempted.append(victim)
            if victim is sequence:
                return False
        if needed > 0:
            sequence.blocks += self.pool.allocate(needed)
        return True

    @staticmethod
    def _is_victim(sequence: Sequence) -> bool:
        """Blocks that are on their way to another replica must not change hands."""
        return sequence.status is Status.RUNNING and not sequence.is_prefill_only

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks back; the sequence waits in front of its equals and is computed again from its tokens."""
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_published = 0
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    @staticmethod
    def _take(sequence: Sequence, count: int, out: Schedule) -> None:
        if sequence.is_decoding:
            out.decodes.append(sequence)
        else:
            out.chunks.append((sequence, count))

    def publish(self, sequence: Sequence) -> None:
        """Make the full prompt blocks that are computed by now known to the prefix cache."""
        done = min(sequence.num_computed // self.pool.block_size, len(sequence.hashes))
        for i in range(sequence.num_published, done):
            self.pool.publish(sequence.blocks[i], sequence.hashes[i])
        sequence.num_published = max(sequence.num_published, done)
