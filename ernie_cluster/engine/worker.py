"""One engine replica without Ray: engine, leases, hand-over in and out, and the thread that steps.

The same object serves every role. What it is asked decides: `open_prefill` with a destination hands the prompt's KV
over, without one it goes on decoding here (mixed); `open_decode` waits for KV. All calls return at once.

Everything that is kept for somebody else has an owner and a bound, so it comes back when that one dies:

    blocks of a lease             LeaseTable    lease timeout without a sign of life, and the request's own deadline
      that followers write, too   LeaseTable    until these have forgotten it; one that does not answer ends the gang
    blocks of a hand-over         KVSender      its commit's timeout, or the channel's stall timeout before that
    blocks of a loan              Lender        its offer's timeout, or the channel's stall timeout after that
    a prompt on its way in        Openings      its lease
    a wait for a prefix           Fetches       its deadline, within half a lease
    a sender that waits           Claims        lease timeout
    rows of a picture             Sequence      the request's own deadline
    a follower's lease, its part  Follower      what the leader says: forget, complete; drop, settle
      of a hand-over
    staging memory, objects       Channel       acknowledged, refused, or the stall timeout, with which the channel ends

What is read outside the engine's lock (pieces, by channels' threads) relies on the pins of a hand-over and a loan. Where these
are given up early, for an abort or a piece that failed, a `Hold` tells the reader that the blocks may be others' by now; on
following ranks, which have no pool, the leader's `drop` does. Copies to and from the host's memory are made under the lock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ernie_cluster.config.experts import LayerExperts
from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.deltas import Delta
from ernie_cluster.engine.batch import BatchBuilder
from ernie_cluster.engine.block_pool import BlockPool
from ernie_cluster.engine.engine import Engine, Outcome, parted
from ernie_cluster.engine.followers import Followers, LedMemory
from ernie_cluster.engine.handover import NO_PEERS, Destination, KVSender, Peers
from ernie_cluster.engine.host_tier import HostTier
from ernie_cluster.engine.inbox import Inbox
from ernie_cluster.engine.leases import LeaseTable
from ernie_cluster.engine.lending import Lender
from ernie_cluster.engine.openings import Openings
from ernie_cluster.engine.poison import LedPoison
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.scheduler import Scheduler
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.engine.snapshot import WorkerSnapshot
from ernie_cluster.engine.thread import EngineThread
from ernie_cluster.engine.warm_up import warm_up
from ernie_cluster.errors import EngineFailed, Overloaded, TransferFailed
from ernie_cluster.grammar.compile import Compiler
from ernie_cluster.request import GenerationRequest, RequestFailed
from ernie_cluster.transport.base import Channel


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker must know beside its model."""

    block_size: int
    max_batch_tokens: int
    max_num_seqs: int
    enable_prefix_cache: bool
    reserve_output_tokens: int
    """Output tokens for which a decode lease holds blocks from the start."""
    lease_timeout_s: float
    piece_bytes: int
    can_encode: bool
    """Whether embeddings of pictures can come here; False where only text is decoded."""
    host_blocks: int = 0
    """Blocks that the host's memory behind the KV cache holds; 0 = there is none."""
    poison_freed_blocks: bool = False
    """See `EngineConfig`."""
    step_timeout_s: float = float("inf")
    """See `EngineConfig`."""


class Worker:
    """Owns an engine and its thread.

    Args:
        runner: weights and cache.
        config: the model.
        settings: see there.
        emit: takes outcomes, on the engine's thread or a transport's.
        compiler: makes the one for the model's vocabulary, when the first grammar comes; without it requests that have one fail.
    """

    def __init__(
        self,
        runner: Runner,
        config: ModelConfig,
        settings: WorkerSettings,
        emit: Callable[[list[Outcome]], None],
        compiler: Callable[[], Compiler] | None = None,
    ) -> None:
        self.settings, self._emit = settings, emit
        kv = runner.kv
        self._followers = Followers(runner.crew.note, settings.lease_timeout_s, self._fail)
        host_blocks, has_cache = settings.host_blocks, settings.enable_prefix_cache
        self.host_tier = HostTier(LedMemory(kv.data, host_blocks, self._followers)) if host_blocks else None
        self.pool = BlockPool(
            kv.data.shape[2],
            settings.block_size,
            enable_prefix_cache=has_cache,
            tier=self.host_tier,
            eraser=LedPoison(kv.data, self._followers) if settings.poison_freed_blocks else None,
        )
        self.layout = layout = KVLayout.of_cache(kv.data.shape, kv.data.element_size())
        self.sender = KVSender(
            kv,
            self.pool,
            layout,
            config.text.num_kv_heads,
            self._followers,
            piece_bytes=settings.piece_bytes,
            commit_timeout_s=settings.lease_timeout_s,
            done=self._handed_over,
        )
        vision_ids = config.token_ids.vision_pool if config.token_ids else frozenset[int]()
        self.engine = Engine(
            runner,
            self.pool,
            Scheduler(self.pool, max_batch_tokens=settings.max_batch_tokens, max_num_seqs=settings.max_num_seqs),
            BatchBuilder(settings.block_size, vision_ids, runner.device, runner.buckets),
            emit=emit,
            hooks=self.sender,
            can_encode=settings.can_encode,
            compiler=compiler,
        )
        self.leases = LeaseTable(self.pool, settings.lease_timeout_s)
        hidden_size, followers = config.text.hidden_size, self._followers
        self.inbox = Inbox(self.engine, self.leases, layout, hidden_size, followers, wall_clock=time.time)
        self.lender = Lender(self.engine, kv, layout, self._followers, piece_bytes=settings.piece_bytes)
        self._openings = Openings(self.engine, self.leases, self.inbox, self.sender, self._followers, emit)
        self.failure: EngineFailed | None = None
        self._is_hung = False
        self._thread = EngineThread(self.engine, self.inbox.fetches, settings.lease_timeout_s, self.sweep, self._fail)

    def warm_up(self) -> None:
        """See `warm_up`; before `start`."""
        warm_up(self.engine, self.settings.max_batch_tokens, self.settings.max_num_seqs)

    def lead(self, channels: Iterable[Channel]) -> None:
        """Other ranks hold KV heads too: channels to their `Follower`s, in order, to be closed by the caller."""
        self._followers.channels = tuple(channels)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the running step; waiting requests are left to whoever stops us."""
        self._thread.stop(is_hung=self._is_hung)

    @property
    def is_working(self) -> bool:
        """Whether steps are run: it has not been stopped, nor has it failed."""
        return not self._thread.is_stopping and self.failure is None

    def look_after(self) -> None:
        """To be called now and then, from any thread: nobody else notices a step that does not end, as where a collective
        waits for a rank that is stuck.

        Raises:
            EngineFailed: the engine has stopped, or hangs; all requests here have been told.
        """
        since_s = self._thread.step_since_s
        step_s = 0.0 if since_s is None else self.engine.clock() - since_s
        if self.failure is None and step_s > self.settings.step_timeout_s:
            self._fail(EngineFailed(f"a step has run for {step_s:.0f} s, longer than engine.step_timeout_s; it hangs"))
            self._is_hung = self._thread.is_stopping = True  # if it goes on after all, it does no more
        if self.failure is not None:
            raise self.failure

    # ---- control, from any thread

    def open_prefill(
        self,
        request: GenerationRequest,
        epoch: int,
        channel: Channel | None,
        peers: Peers = NO_PEERS,
        *,
        prefix_s: float = 0.0,
    ) -> None:
        """Compute a prompt here, and its answer too when there is no `channel` to a decode replica.

        Work starts once the decode side has confirmed its lease, and our other ranks have reached its.

        Args:
            channel: to the rank that leads over there.
            peers: its ranks, where KV heads are spread over ranks on either side.
            prefix_s: how long to wait for a prefix that another replica may `lend`; 0 = none will come.

        Raises:
            ContextTooLong, Overloaded: no blocks for the prompt, ever or now.
            TransferFailed: this attempt, or a newer one, is here already.
            ReplicaDraining: this replica parts with everything.
        """
        self._check_open(request)
        reserve = 0 if channel is not None else min(request.sampling.max_tokens, self.settings.reserve_output_tokens)
        self._openings.open(request, epoch, self._hashes(request), reserve, channel, peers, prefix_s)

    def lend(
        self,
        request: GenerationRequest,
        epoch: int,
        num_blocks: int,
        channel: Channel,
        peers: Peers = NO_PEERS,
        within_s: float = math.inf,
    ) -> None:
        """Send what is cached here of a prompt's first blocks to the replica that computes it, if it waits for them.

        Nothing here depends on how that ends.

        Args:
            num_blocks: how many at most.
            channel, peers: to that replica, as of `open_prefill`.
            within_s: so long it waits.
        """
        self._check_alive()
        num_tokens = request.num_prompt_tokens + len(request.output_token_ids)  # the last is always computed
        hashes = self._hashes(request)[: min(num_blocks, (num_tokens - 1) // self.settings.block_size)]
        self.lender.lend(request.request_id, epoch, hashes, self.sender.part, Destination(channel, peers), within_s)

    def open_decode(self, request: GenerationRequest, epoch: int) -> None:
        """Lease blocks for a request whose prompt is computed elsewhere; raises as `open_prefill` does."""
        self._check_open(request)
        reserve = min(request.sampling.max_tokens, self.settings.reserve_output_tokens)
        hashes = self._hashes(request)
        with self.engine.lock:
            self.inbox.expect(request, hashes, epoch, reserve)
            self._openings.forget(request.request_id)  # an older attempt, whose lease has just ended
            self.engine.lock.notify_all()  # followers may have to hear of copies before they know the lease
        if request.sampling.grammar:
            self.engine.grammars.prepare(request.sampling.grammar)

    def abort(self, request_id: str) -> bool:
        """End a request here, wherever it stands; its blocks are free within a step. False if it is unknown."""
        with self.engine.lock:
            self._openings.forget(request_id)
            had_lease = self.inbox.forget(request_id)
            return self.engine.abort(request_id) or had_lease

    def gone(self, request_ids: Iterable[str]) -> list[str]:
        """Those of which nothing is left here; the last of their outcomes may be on its way."""
        with self.engine.lock:
            return [r for r in request_ids if r not in self.engine.sequences and r not in self.leases]

    def part(self) -> None:
        """End all requests here with `ReplicaDraining`, after their last tokens, and take no more until `stay`.

        What is being handed over arrives first, and what is cached here may be lent on.
        """
        with self.engine.lock:
            if self.engine.sequences:
                self.lender.parted()
            self.engine.is_parting = True
            waiting = [*self._openings.request_ids(), *self.inbox.request_ids()]
            for request_id in waiting:
                self._openings.forget(request_id)
                self.inbox.forget(request_id)
            self.engine.lock.notify_all()
        self._emit([RequestFailed(r, parted(r)) for r in waiting])

    def stay(self) -> None:
        """Take requests again."""
        with self.engine.lock:
            self.engine.is_parting = False

    def renew(self, request_ids: Iterable[str]) -> None:
        """Whoever wants these answers is alive: their leases live on."""
        with self.engine.lock:
            now = self.engine.clock()
            for request_id in request_ids:
                self.leases.renew(request_id, now)

    def snapshot(self) -> WorkerSnapshot:
        engine, counters, balancer = self.engine, self.engine.counters, self.engine.runner.crew.balancer
        with engine.lock:
            queued = [*engine.scheduler.running, *engine.scheduler.waiting]
            num_prompts, num_answers = engine.count_stages()
            return WorkerSnapshot(
                num_running=len(engine.scheduler.running),
                num_waiting=len(engine.scheduler.waiting) + len(self._openings),
                waiting_tokens=sum(s.num_uncomputed for s in queued if not s.is_decoding),
                num_leases=len(self.leases),
                free_blocks=max(0, self.pool.num_free - engine.scheduler.num_blocks_owed),
                total_blocks=self.pool.num_blocks - 1,
                steps=counters.steps,
                run_s=counters.run_s,
                prompt_tokens=counters.prompt_tokens,
                generated_tokens=counters.generated_tokens,
                preemptions=counters.preemptions,
                kv_bytes_sent=self.sender.bytes_sent + self.lender.bytes_sent,
                kv_bytes_received=self.inbox.bytes_received,
                experts=None if balancer is None else balancer.use,
                reading=engine.reading.line,
                writing=engine.writing.line,
                num_prompts=num_prompts + len(self._openings),
                num_answers=num_answers + self.inbox.num_expected,
                is_lending=self.lender.is_wanted,
                has_read=counters.reading,
                has_written=counters.writing,
                written=counters.written,
                host_tier=None if self.host_tier is None else self.host_tier.use,
            )

    def cached(self, since: int | None) -> Delta:
        """How the prefix cache, the host's memory behind it included, has changed since a version; None = all of it."""
        with self.engine.lock:
            return self.pool.log.since(since)

    def experts(self) -> list[LayerExperts]:
        """Use and place of every expert; empty in a model without experts."""
        balancer = self.engine.runner.crew.balancer
        return [] if balancer is None else balancer.layers()

    def check(self) -> bool:
        """Invariants, and that every used block belongs to a sequence or a lease, or is lent."""
        with self.engine.lock:
            held = [*self.engine.blocks(), *self.leases.blocks(), *self.lender.blocks()]
            return self.engine.check() and self.pool.check(held)

    # ---- inside

    def _hashes(self, request: GenerationRequest) -> list[bytes]:
        if not self.settings.enable_prefix_cache:
            return []
        return request.block_hashes(self.settings.block_size)

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._thread.is_stopping:
            raise Overloaded("this replica is shutting down", 1.0)

    def _check_open(self, request: GenerationRequest) -> None:
        self._check_alive()
        if self.engine.is_parting:
            raise parted(request.request_id)

    def _handed_over(self, sequence: Sequence, error: Exception | None) -> None:
        is_wanted = not sequence.is_aborted
        self.engine.release(sequence)
        if error is not None and is_wanted:
            self._emit([RequestFailed(sequence.request_id, error)])

    def sweep(self) -> None:
        with self.engine.lock:
            late = self.inbox.sweep(self.engine.clock())
            for request_id in late:
                self._openings.forget(request_id)
        for request_id in late:
            self._emit([RequestFailed(request_id, TransferFailed(f"request {request_id}: its lease ran out"))])

    def _fail(self, failure: EngineFailed) -> None:
        """Tell everybody; the replica is replaced, so nothing is cleaned up."""
        with self.engine.lock:
            if self._thread.is_stopping:
                return  # so are the other ranks
            self.failure = failure
            self.engine.lock.notify_all()
            ids = {*self.engine.sequences, *self._openings.request_ids(), *self.inbox.request_ids()}
        self._emit([RequestFailed(r, failure) for r in ids])
