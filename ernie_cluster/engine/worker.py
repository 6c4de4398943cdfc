"""One engine replica without Ray: engine, leases, hand-over in and out, and the thread that steps.

The same object serves every role. What it is asked decides: `open_prefill` with a destination hands the prompt's KV
over, without one it goes on decoding here (mixed); `open_decode` waits for KV. All calls return at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ernie_cluster.config.experts import ExpertUse, LayerExperts
from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.batch import BatchBuilder
from ernie_cluster.engine.block_pool import BlockPool
from ernie_cluster.engine.engine import Engine, Outcome
from ernie_cluster.engine.followers import Followers
from ernie_cluster.engine.handover import NO_PEERS, Destination, KVSender, Peers
from ernie_cluster.engine.inbox import Inbox
from ernie_cluster.engine.leases import LeaseTable
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.sampler import SamplerRow
from ernie_cluster.engine.scheduler import Schedule, Scheduler
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.errors import EngineFailed, ErnieClusterError, Overloaded, TransferFailed
from ernie_cluster.grammar.compile import Compiler
from ernie_cluster.request import GenerationRequest, RequestFailed, SamplingParams, block_hashes
from ernie_cluster.transport.base import Channel, Message

log = logging.getLogger(__name__)

_BLOCKED_WAIT_S = 0.01
"""Pause of an engine that could run nothing, because somebody else holds the blocks that it needs."""


_VOTE_WAIT_S = 0.02
"""Idle engines of a gang with several leaders ask each other this often: so long may a first token wait for them."""


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
    """Whether embeddings of pictures can come here; False for the decode role."""


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """Load of one engine, at one moment."""

    num_running: int
    num_waiting: int
    waiting_tokens: int
    """Prompt tokens not computed yet."""
    num_leases: int
    free_blocks: int
    total_blocks: int
    steps: int
    run_s: float
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    kv_bytes_sent: int
    kv_bytes_received: int
    experts: ExpertUse | None = None
    """None in a model without experts."""


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
        self.pool = BlockPool(kv.data.shape[2], settings.block_size, enable_prefix_cache=settings.enable_prefix_cache)
        self.layout = layout = KVLayout.of_cache(kv.data.shape, kv.data.element_size())
        self._followers = Followers(runner.crew.note, settings.lease_timeout_s, self._fail)
        self.sender = KVSender(
            kv,
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
        self._opening: dict[str, Sequence] = {}
        self._is_stopping = False
        self.failure: EngineFailed | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def warm_up(self) -> None:
        """Run a prompt and decode steps before anybody waits for them: compiles kernels, touches memory, records graphs."""
        prompt = np.zeros(min(32, self.settings.max_batch_tokens), dtype=np.int32)
        request = GenerationRequest(
            "warm-up",
            "",
            prompt,
            np.tile(np.arange(len(prompt), dtype=np.int32), (3, 1)),
            SamplingParams(temperature=0),
        )
        sequence = Sequence(request, [], blocks=self.pool.allocate(1))
        sequence.blocks *= self.pool.num_blocks_for(len(prompt) + 1)  # nobody reads what it writes
        buckets = self.engine.runner.buckets
        sizes = (1,) if buckets is None else buckets.sizes[::-1]  # the largest first: the others fit into its memory
        schedules = [Schedule(chunks=[(sequence, len(prompt))]), *(Schedule(decodes=[sequence] * n) for n in sizes)]
        row = SamplerRow(request.sampling, 0, (), (), ())
        for i, schedule in enumerate(schedules):
            rows = [row] * max(1, len(schedule.decodes))
            self.engine.runner.run(self.engine.builder.build(schedule), rows)
            sequence.tokens, sequence.num_computed = [0] * (len(prompt) + 1), len(prompt)
            if i and buckets is not None:
                log.info("recorded decode steps of %d: %d of %d CUDA graphs", len(schedule.decodes), i, len(sizes))
        self.pool.free(sequence.blocks[:1])

    def lead(self, channels: Iterable[Channel]) -> None:
        """Other ranks hold KV heads too: channels to their `Follower`s, in order, to be closed by the caller."""
        self._followers.channels = tuple(channels)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the running step; waiting requests are left to whoever stops us."""
        with self.engine.lock:
            self._is_stopping = True
            self.engine.lock.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # ---- control, from any thread

    def open_prefill(
        self, request: GenerationRequest, epoch: int, channel: Channel | None, peers: Peers = NO_PEERS
    ) -> None:
        """Compute a prompt here, and its answer too when there is no `channel` to a decode replica.

        Work starts once the decode side has confirmed its lease, and our other ranks have reached its.

        Args:
            channel: to the rank that leads over there.
            peers: its ranks, where KV heads are spread over ranks on either side.

        Raises:
            ContextTooLong, Overloaded: no blocks for the prompt, ever or now.
            TransferFailed: this attempt, or a newer one, is here already.
        """
        self._check_alive()
        hashes = self._hashes(request)
        num_tokens = request.num_prompt_tokens + len(request.output_token_ids)
        reserve = 0 if channel is not None else min(request.sampling.max_tokens, self.settings.reserve_output_tokens)
        with self.engine.lock:
            self.inbox.fence(request.request_id, epoch)
            owed = self.engine.scheduler.num_blocks_owed
            lease = self.leases.grant(request.request_id, epoch, num_tokens, hashes, reserve, self.engine.clock(), owed)
            sequence = Sequence(request, hashes, blocks=lease.blocks, epoch=epoch)
            sequence.num_computed = sequence.num_cached = lease.num_shared * self.settings.block_size
            sequence.num_published = lease.num_shared
            self._opening[request.request_id] = sequence
        if channel is None:
            self._begin(sequence, None, 0)
            return
        message: Message = {"type": "claim", "request_id": request.request_id, "epoch": epoch}
        claim = channel.call(message, self.settings.lease_timeout_s)
        reached = self._followers.reach(request.request_id, epoch, peers.endpoints)

        def answered() -> None:
            try:
                reply = claim.result()
                if "error" in reply:
                    raise TransferFailed(str(reply["error"]))
                reached.result()
                begun = self._begin(sequence, Destination(channel, peers), int(reply["cached_blocks"]))  # type: ignore[arg-type]
            except ErnieClusterError as e:
                begun = False
                if self._drop(sequence):
                    self._emit([RequestFailed(request.request_id, e)])
            if not begun:
                self._followers.drop(request.request_id, epoch)

        claim.add_done_callback(lambda _: reached.add_done_callback(lambda _: answered()))

    def open_decode(self, request: GenerationRequest, epoch: int) -> None:
        """Lease blocks for a request whose prompt is computed elsewhere; raises as `Inbox.expect` does."""
        self._check_alive()
        reserve = min(request.sampling.max_tokens, self.settings.reserve_output_tokens)
        hashes = self._hashes(request)
        with self.engine.lock:
            self.inbox.expect(request, hashes, epoch, reserve)
            self._opening.pop(request.request_id, None)  # an older attempt, whose lease has just ended
        if request.sampling.grammar:
            self.engine.grammars.prepare(request.sampling.grammar)

    def abort(self, request_id: str) -> bool:
        """End a request here, wherever it stands; its blocks are free within a step. False if it is unknown."""
        with self.engine.lock:
            self._opening.pop(request_id, None)
            had_lease = self.inbox.forget(request_id)
            return self.engine.abort(request_id) or had_lease

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
            return WorkerSnapshot(
                num_running=len(engine.scheduler.running),
                num_waiting=len(engine.scheduler.waiting) + len(self._opening),
                waiting_tokens=sum(s.num_uncomputed for s in queued if not s.is_decoding),
                num_leases=len(self.leases),
                free_blocks=max(0, self.pool.num_free - engine.scheduler.num_blocks_owed),
                total_blocks=self.pool.num_blocks - 1,
                steps=counters.steps,
                run_s=counters.run_s,
                prompt_tokens=counters.prompt_tokens,
                generated_tokens=counters.generated_tokens,
                preemptions=counters.preemptions,
                kv_bytes_sent=self.sender.bytes_sent,
                kv_bytes_received=self.inbox.bytes_received,
                experts=None if balancer is None else balancer.use,
            )

    def experts(self) -> list[LayerExperts]:
        """Use and place of every expert; empty in a model without experts."""
        balancer = self.engine.runner.crew.balancer
        return [] if balancer is None else balancer.layers()

    def check(self) -> bool:
        """Invariants, and that every used block belongs to a sequence or a lease."""
        with self.engine.lock:
            return self.engine.check() and self.pool.check([*self.engine.blocks(), *self.leases.blocks()])

    # ---- inside

    def _hashes(self, request: GenerationRequest) -> list[bytes]:
        if not self.settings.enable_prefix_cache:
            return []
        return block_hashes(request.prompt_token_ids, request.media, self.settings.block_size, request.cache_salt)

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._is_stopping:
            raise Overloaded("this replica is shutting down", 1.0)

    def _begin(self, sequence: Sequence, destination: Destination | None, first_block: int) -> bool:
        """The whole path is reserved: the sequence may be scheduled. False when it is not wanted any more."""
        with self.engine.lock:
            if self._opening.get(sequence.request_id) is not sequence:
                return False  # aborted, or fenced off by a newer attempt; its lease is gone
            del self._opening[sequence.request_id]
            self.leases.take(sequence.request_id, sequence.epoch)
            if destination is not None:
                self.sender.begin(sequence, destination, first_block)
            self.engine.add(sequence)
            self.inbox.open_media(sequence)
            return True

    def _drop(self, sequence: Sequence) -> bool:
        """The path could not be reserved; False when the request was ended by others already."""
        with self.engine.lock:
            if self._opening.get(sequence.request_id) is not sequence:
                return False
            del self._opening[sequence.request_id]
            self.inbox.forget(sequence.request_id, sequence.epoch)
            return True

    def _handed_over(self, sequence: Sequence, error: Exception | None) -> None:
        is_wanted = not sequence.is_aborted
        self.engine.release(sequence)
        if error is not None and is_wanted:
            self._emit([RequestFailed(sequence.request_id, error)])

    def _loop(self) -> None:
        engine, idle_s = self.engine, min(1.0, self.settings.lease_timeout_s / 4)
        try:
            next_sweep = engine.clock() + idle_s
            did_run, are_others_busy = True, False
            while True:
                with engine.lock:
                    if self._is_stopping:
                        break
                    if not engine.has_work():
                        if not are_others_busy:
                            engine.lock.wait(min(idle_s, _VOTE_WAIT_S) if engine.runner.crew.has_peers else idle_s)
                    elif not did_run:
                        engine.lock.wait(_BLOCKED_WAIT_S)
                if engine.clock() >= next_sweep:
                    self.sweep()
                    next_sweep = engine.clock() + idle_s
                did_run = engine.step()
                are_others_busy = not did_run and engine.runner.rest()
            engine.runner.crew.dismiss()
        except Exception as e:
            if self._is_stopping:
                return  # the gang is stopping too, and some of its ranks were faster
            log.exception("the engine stopped")
            self._fail(EngineFailed(f"the engine stopped: {type(e).__name__}: {e}"))

    def sweep(self) -> None:
        with self.engine.lock:
            late = self.inbox.sweep(self.engine.clock())
            for request_id in late:
                self._opening.pop(request_id, None)
        for request_id in late:
            self._emit([RequestFailed(request_id, TransferFailed(f"request {request_id}: its lease ran out"))])

    def _fail(self, failure: EngineFailed) -> None:
        """Tell everybody; the replica is replaced, so nothing is cleaned up."""
        with self.engine.lock:
            if self._is_stopping:
                return  # so are the other ranks
            self.failure = failure
            self.engine.lock.notify_all()
            ids = {*self.engine.sequences, *self._opening}
        self._emit([RequestFailed(r, failure) for r in ids])
