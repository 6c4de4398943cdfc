"""Who runs in the next step, and how many tokens of each.

One budget of tokens for all: decoding sequences take one each, the rest goes to chunks of prompts. Of that the prompt that
came first gets at least half, or all it needs if that is less than all there is; the shortest of the others get what it
leaves. So a long prompt neither stops short ones nor starves behind them. When blocks run out, the least urgent sequence that
decodes, of these the youngest, gives its own back and is computed again later. Knows no tensor, no clock and no thread.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

from ernie_cluster.engine.block_pool import BlockPool, OutOfBlocks
from ernie_cluster.engine.sequence import Sequence, Status
from ernie_cluster.request import extend_hashes


@dataclass(slots=True)
class Schedule:
    """Decision for one step."""

    decodes: list[Sequence] = field(default_factory=list)
    """One token each."""
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    """(sequence, tokens of its prompt or replay)."""
    preempted: list[Sequence] = field(default_factory=list)
    is_short: bool = False
    """Somebody who waits found no blocks."""

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(n for _, n in self.chunks)


class Scheduler:
    """Owns the waiting and running sequences.

    Args:
        pool: where blocks come from.
        max_batch_tokens: tokens of one step.
        max_num_seqs: sequences that run; whoever comes beyond waits, also with his KV.
    """

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.pool = pool
        self.max_batch_tokens, self.max_num_seqs = max_batch_tokens, max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._arrivals = itertools.count()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, or go on at once when its blocks and KV are here already, and there is room."""
        sequence.turn = next(self._arrivals)
        if sequence.is_decoding and len(self.running) < self.max_num_seqs:
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
        # one whose KV was handed over may have a grammar that is not read yet
        for sequence in sorted((s for s in self.running if s.is_decoding and s.num_ready), key=_urgency):
            # one of them may have been preempted for another, or the step is full
            if sequence.status is Status.RUNNING and out.num_tokens < self.max_batch_tokens:
                self._decode(sequence, out)
        if not out.preempted:
            for sequence in sorted(
                (s for s in self.waiting if s.is_decoding and s.blocks and s.num_ready), key=_urgency
            ):
                if out.num_tokens < self.max_batch_tokens and self._start(sequence):
                    self._decode(sequence, out)
        readers = [s for s in self.running if not s.is_decoding]
        if not out.preempted:
            readers += [s for s in self.waiting if not (s.is_decoding and s.blocks)]
        for _, equals in itertools.groupby(sorted(readers, key=_urgency), key=lambda s: s.request.priority):
            self._read(list(equals), out)
        return out

    def _decode(self, sequence: Sequence, out: Schedule) -> None:
        if self._make_room(sequence, out):
            out.decodes.append(sequence)

    def _read(self, equals: list[Sequence], out: Schedule) -> None:
        """Give prompts of one class, by arrival, their chunks."""
        budget = self.max_batch_tokens - out.num_tokens
        if budget <= 0:
            return
        first = next((s for s in equals if self._goes(s, out)), None)
        if first is None:
            return
        kept = first.num_ready if first.num_ready <= budget else (budget + 1) // 2
        place = len(out.chunks)
        for sequence in sorted((s for s in equals if s is not first), key=_length):
            if budget > kept and self._goes(sequence, out):
                count = min(sequence.num_ready, budget - kept)
                out.chunks.append((sequence, count))
                budget -= count
        out.chunks.insert(place, (first, min(first.num_ready, budget)))

    def _goes(self, sequence: Sequence, out: Schedule) -> bool:
        """Whether a prompt can be read on, once it is started; one that waits for a picture does not hold up the next."""
        if sequence.status is Status.RUNNING:
            return sequence.num_ready > 0
        # who has no blocks waits for them in turn; who has them goes on, else nobody would ever free any
        if not sequence.blocks and (out.is_short or not self._find_prefix(sequence)):
            out.is_short = True
            return False
        return sequence.num_ready > 0 and self._start(sequence)

    def _start(self, sequence: Sequence) -> bool:
        """Let a sequence that waits run, if not too many do."""
        if len(self.running) >= self.max_num_seqs:
            return False
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return True

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
        try:
            sequence.blocks, num_cached = self.pool.acquire(usable, self.pool.num_blocks_for(len(sequence.tokens)))
        except OutOfBlocks:
            return False
        sequence.num_computed = num_cached * self.pool.block_size
        sequence.num_published = num_cached
        return True

    def _make_room(self, sequence: Sequence, out: Schedule) -> bool:
        """A block for the next token of a running sequence; preempts less urgent and younger ones, at last itself."""
        needed = self.pool.num_blocks_for(sequence.num_computed + 1) - len(sequence.blocks)
        while needed > self.pool.num_free:
            waiting = (s for s in reversed(self.waiting) if s.is_decoding and s.blocks)
            running = (s for s in reversed(self.running) if self._is_victim(s) and s not in out.decodes)
            victim = max((*waiting, *running), key=lambda s: s.request.priority, default=None)
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
        return not sequence.is_prefill_only

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks back; the sequence waits in front of its equals and is computed again from its tokens.

        Never one that is handed over: blocks that are on their way to another replica must not change hands.
        """
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_published = 0
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self.remove(sequence)
        self.waiting.appendleft(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Make the full blocks that are computed by now known to the prefix cache; a chat goes on from its answers, too."""
        done = sequence.num_computed // self.pool.block_size
        if not self.pool.is_caching:
            return
        if done > len(sequence.hashes):
            request, tokens = sequence.request, sequence.tokens[: sequence.num_computed]
            extend_hashes(sequence.hashes, tokens, request.media, self.pool.block_size, request.cache_salt)
        for i in range(sequence.num_published, done):
            self.pool.publish(sequence.blocks[i], sequence.hashes[i])
        sequence.num_published = max(sequence.num_published, done)


def _urgency(sequence: Sequence) -> tuple[int, int]:
    """Of two sequences the one with the smaller comes first."""
    return sequence.request.priority, sequence.turn


def _length(sequence: Sequence) -> int:
    """What a prompt still needs; one that has no blocks has given them back, and waited long enough."""
    return sequence.num_uncomputed if sequence.blocks else 0
