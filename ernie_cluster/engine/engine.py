"""The loop of three verbs: schedule, run, apply. Nothing else runs the model.

The lock guards pool, leases, scheduler and sequences. It is held while a step is scheduled and applied, never while
the model runs, so leases, aborts and arriving KV need not wait for a step. A sequence that is in the running step
keeps its blocks until the step is applied. Knows no text, no Ray and no transport.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from ernie_cluster.engine.batch import BatchBuilder
from ernie_cluster.engine.block_pool import BlockPool
from ernie_cluster.engine.counters import Counters
from ernie_cluster.engine.grammar import Grammars
from ernie_cluster.engine.pace import Pace
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.sampler import Sampled, SamplerRow
from ernie_cluster.engine.scheduler import Schedule, Scheduler
from ernie_cluster.engine.sequence import Sequence, Status
from ernie_cluster.errors import ContextTooLong, DeadlineExceeded, Evicted, ReplicaDraining, TransferFailed
from ernie_cluster.grammar.compile import Compiler
from ernie_cluster.model.decoder import no_hook
from ernie_cluster.request import RequestFailed, Span, TokenEvent, TokenLogprobs

Outcome = TokenEvent | RequestFailed


class PrefillHooks:
    """What a hand-over wants to know of prompts being computed; this one wants nothing."""

    def layer_hook(self, chunks: Seq[tuple[Sequence, int]]) -> Callable[[int], None]:
        """Called before a step runs, on the engine's thread. The result is called after each layer's K, V writes."""
        return no_hook

    def prompt_done(self, sequence: Sequence) -> None:
        """The first token is chosen; the sequence is HANDING_OVER and its blocks are pinned until `Engine.release`."""
        raise AssertionError("no hand-over was configured")

    def ended(self, sequence: Sequence) -> None:
        """The sequence is no more; called once for each, with the lock held."""


class Engine:
    """Continuous batching over one replica.

    Args:
        runner: weights and KV cache.
        pool, scheduler: made for the runner's cache.
        builder: tensors of a step.
        emit: takes the outcomes of each step, on the engine's thread.
        hooks: the hand-over of prompts.
        clock: monotonic seconds.
        can_encode: whether embeddings of pictures can come here (again); False on decode replicas.
        compiler: makes the one of grammars, when the first comes; None where none will.
    """

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        scheduler: Scheduler,
        builder: BatchBuilder,
        *,
        emit: Callable[[list[Outcome]], None],
        hooks: PrefillHooks | None = None,
        clock: Callable[[], float] = time.monotonic,
        can_encode: bool = True,
        compiler: Callable[[], Compiler] | None = None,
    ) -> None:
        self.runner, self.pool, self.scheduler, self.builder = runner, pool, scheduler, builder
        self.emit, self.hooks, self.clock, self.can_encode = emit, hooks or PrefillHooks(), clock, can_encode
        self.lock = threading.Condition()
        self.before_run: Callable[[bool], None] | None = None
        """Faults on purpose: told before each step whether it has tokens of prompts."""
        self.grammars = Grammars(compiler, self._wake)
        self.counters = Counters()
        self.reading, self.writing = Pace(), Pace()
        """Steps with tokens of prompts, by tokens; steps without, by sequences."""
        self.sequences: dict[str, Sequence] = {}
        """By request id; the newest attempt of each."""
        self.is_parting = False
        """All sequences end with `ReplicaDraining`, but for those that are being handed over; set with the lock held."""
        self._fenced: set[Sequence] = set()
        """Older attempts, whose blocks a step or a transfer may still be using."""

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; its outcomes go to `emit`."""
        with self.lock:
            assert sequence.request_id not in self.sequences, f"request {sequence.request_id} is here already"
            sequence.arrived_s = self.clock()
            sequence.deadline_s = sequence.arrived_s + sequence.request.timeout_s
            if sequence.request.sampling.grammar:
                output = sequence.tokens[sequence.num_prompt :]
                sequence.constraint = self.grammars.open(sequence.request.sampling.grammar, output)
            self.sequences[sequence.request_id] = sequence
            self.scheduler.add(sequence)
            self.lock.notify_all()

    def fence(self, request_id: str, epoch: int) -> None:
        """Make way for an attempt: an older one ends without an outcome.

        Raises:
            TransferFailed: the attempt that is here is not older.
        """
        with self.lock:
            old = self.sequences.get(request_id)
            if old is None:
                return
            if old.epoch >= epoch:
                raise TransferFailed(f"request {request_id}: attempt {epoch} came after attempt {old.epoch}")
            old.is_aborted = True
            self._fenced.add(self.sequences.pop(request_id))
            self.lock.notify_all()

    def abort(self, request_id: str) -> bool:
        """End a sequence without an outcome; its blocks are free within one step. False if it is not here."""
        with self.lock:
            sequence = self.sequences.get(request_id)
            if sequence is None:
                return False
            sequence.is_aborted = True
            self.lock.notify_all()
            return True

    def release(self, sequence: Sequence) -> None:
        """A hand-over ended, well or badly: forget the sequence and free its blocks."""
        with self.lock:
            if sequence.status is not Status.FINISHED:
                self._end(sequence)

    def step(self) -> bool:
        """Schedule, run, apply once; False when nothing could be run, and nobody gave blocks back for it either."""
        with self.lock:
            outcomes = self._reap()
            schedule = self.scheduler.schedule()
            outcomes += self._evict(schedule)
            if schedule.num_tokens:
                now = self.clock()
                for sequence in (*schedule.decodes, *(s for s, _ in schedule.chunks)):
                    if sequence.first_scheduled_s is None:
                        sequence.first_scheduled_s = now
                step_input, rows = self.builder.build(schedule), self._rows(schedule)
                hook = self.hooks.layer_hook(schedule.chunks)
        if schedule.num_tokens:
            if self.before_run is not None:
                self.before_run(bool(schedule.chunks))
            start = time.perf_counter()
            sampled = self.runner.run(step_input, rows, hook)
            run_s = time.perf_counter() - start
            (self.reading if schedule.chunks else self.writing).note(schedule.num_tokens, run_s)
            context_tokens = sum(step_input.context_lens[: len(schedule.decodes)])
            with self.lock:
                self.counters.note_step(schedule, context_tokens, len(sampled.tokens), run_s)
                outcomes += self._apply(schedule, sampled)
        if outcomes:
            self.emit(outcomes)
        with self.lock:
            for sequence, _ in schedule.chunks:
                if sequence.status is Status.HANDING_OVER:
                    self.hooks.prompt_done(sequence)  # may fail at once; its first token is out by now
        return schedule.num_tokens > 0 or bool(schedule.preempted)

    def has_work(self) -> bool:
        """Whether a step could do anything now; call with the lock held."""
        ends = (s for s in self._all() if s.is_aborted or self.is_parting)
        return any(s.status is not Status.HANDING_OVER for s in ends) or any(
            s.num_ready > 0 for s in (*self.scheduler.running, *self.scheduler.waiting)
        )

    def count_stages(self) -> tuple[int, int]:
        """Requests whose prompt is computed here or handed over, and requests that are answered; call with the lock held."""
        num_answers = sum(s.is_answering for s in self._all())
        return len(self.sequences) + len(self._fenced) - num_answers, num_answers

    def blocks(self) -> list[int]:
        """All blocks of sequences, shared ones as often as they are used."""
        return [block for sequence in self._all() for block in sequence.blocks]

    def check(self) -> bool:
        """Invariants of pool and books."""
        with self.lock:
            queued = [*self.scheduler.running, *self.scheduler.waiting]
            assert len({id(s) for s in queued}) == len(queued), "a sequence is queued twice"
            assert set(queued) <= set(self._all()), "a queued sequence is unknown"
            return self.pool.check()

    def _wake(self) -> None:
        with self.lock:
            self.lock.notify_all()

    def _all(self) -> list[Sequence]:
        return [*self.sequences.values(), *self._fenced]

    # ---- inside a step

    def _rows(self, schedule: Schedule) -> list[SamplerRow]:
        done = [s for s, n in schedule.chunks if n == s.num_uncomputed]
        return [
            SamplerRow(
                params=s.request.sampling,
                position=s.num_output,
                prompt=s.tokens[: s.num_prompt] if s.request.sampling.has_penalties else (),
                output=s.tokens[s.num_prompt :] if s.request.sampling.has_penalties else (),
                end_tokens=(*s.request.sampling.stop_token_ids, *s.request.eos_token_ids),
                allowed=None if s.constraint is None else s.constraint.allowed,
                forced=s.forced_token,
            )
            for s in (*schedule.decodes, *done)
        ]

    def _apply(self, schedule: Schedule, sampled: Sampled) -> list[Outcome]:
        news = ((token, sampled.logprobs.get(row)) for row, token in enumerate(sampled.tokens))
        outcomes: list[Outcome] = []
        for sequence in schedule.decodes:
            sequence.num_computed += 1
            if sequence.num_computed % self.pool.block_size == 0:
                self.scheduler.publish(sequence)
            outcomes += self._advance(sequence, *next(news))
        for sequence, count in schedule.chunks:
            is_last = count == sequence.num_uncomputed
            sequence.num_computed += count
            self.scheduler.publish(sequence)
            if is_last:
                sequence.prefill_done_s = sequence.prefill_done_s or self.clock()
                outcomes += self._advance(sequence, *next(news))
        return outcomes

    def _advance(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> list[Outcome]:
        """A sequence got its next token."""
        if sequence.is_aborted:
            self._end(sequence)
            return []
        index = sequence.num_output
        reason = sequence.append(token)
        if sequence.constraint is not None and sequence.constraint.error is not None:
            self._end(sequence)
            return [RequestFailed(sequence.request_id, sequence.constraint.error)]
        event = TokenEvent(
            sequence.request_id,
            index,
            (token,),
            reason,
            num_cached_tokens=sequence.num_cached,
            spans=self._spans(sequence) if reason or sequence.is_prefill_only else (),
            logprobs=() if logprobs is None else (logprobs,),
        )
        if reason is not None:
            self._end(sequence)
        elif sequence.is_prefill_only:
            self.scheduler.remove(sequence)
            sequence.status = Status.HANDING_OVER
        else:
            sequence.is_answering = True
        return [event]

    def _spans(self, sequence: Sequence) -> tuple[Span, ...]:
        """The stages on this replica, on the wall clock."""
        offset, now = time.time() - self.clock(), self.clock()
        started = sequence.first_scheduled_s or now
        done = sequence.prefill_done_s
        spans = list(sequence.spans)
        if done is not None:
            spans.append(Span("queue", sequence.arrived_s + offset, started - sequence.arrived_s))
            tokens = sequence.num_prompt
            detail = (("tokens", tokens), ("cached_tokens", sequence.num_cached))
            spans.append(Span("prefill", started + offset, done - started, detail))
            started = done
        if sequence.num_output > 1 and not sequence.is_prefill_only:
            spans.append(Span("decode", started + offset, now - started, (("tokens", sequence.num_output - 1),)))
        return tuple(spans)

    def _reap(self) -> list[Outcome]:
        """End what was aborted, what is too late, what others shall go on with, and what has a grammar nobody can follow."""
        now = self.clock()
        outcomes: list[Outcome] = []
        for sequence in self._all():
            error: Exception | None = sequence.constraint.error if sequence.constraint is not None else None
            if sequence.deadline_s <= now:
                error = error or DeadlineExceeded(
                    f"request {sequence.request_id} was not finished within its {sequence.request.timeout_s:g} s"
                )
            if self.is_parting:
                error = error or parted(sequence.request_id)
            if sequence.status is Status.HANDING_OVER or not (error or sequence.is_aborted):
                continue  # blocks of a hand-over are being read; `release` follows, and it has its own deadline
            if error is not None and not sequence.is_aborted:
                outcomes.append(RequestFailed(sequence.request_id, error))
            self._end(sequence)
        return outcomes

    def _evict(self, schedule: Schedule) -> list[Outcome]:
        """End preempted sequences that cannot be computed again here: others take them, or nobody can."""
        self.counters.preemptions += len(schedule.preempted)
        outcomes: list[Outcome] = []
        for sequence in schedule.preempted:
            num_tokens, capacity = len(sequence.tokens), self.pool.num_blocks - 1
            needed = self.pool.num_blocks_for(num_tokens)
            error: Exception
            if needed > capacity:
                error = ContextTooLong(
                    f"request {sequence.request_id}: {num_tokens} tokens need {needed} KV blocks, this replica has "
                    f"{capacity}; lower max_tokens",
                    param="max_tokens",
                )
            elif not sequence.can_replay or (sequence.request.media and not self.can_encode):
                error = Evicted(f"request {sequence.request_id}: out of KV blocks after {sequence.num_output} tokens")
            else:
                continue
            if not sequence.is_aborted:
                outcomes.append(RequestFailed(sequence.request_id, error))
            self._end(sequence)
        return outcomes

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        sequence.status = Status.FINISHED
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.embeds.clear()
        sequence.arriving.clear()
        if self.sequences.get(sequence.request_id) is sequence:
            del self.sequences[sequence.request_id]
        self._fenced.discard(sequence)
        self.hooks.ended(sequence)


def parted(request_id: str) -> ReplicaDraining:
    """What a replica that leaves says of a request."""
    return ReplicaDraining(f"request {request_id}: this replica is leaving; another one goes on")
