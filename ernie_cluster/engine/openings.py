"""Prompts on their way into an engine: leased here, while the rest of their path is being reserved.

A prompt is scheduled once the decode side has confirmed its lease, our other ranks have reached its, and the prefix that
another replica may lend has come or is given up. Answers come on threads of channels; by then the prompt may have been
aborted, or fenced off by a newer attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from ernie_cluster.engine.engine import Engine, Outcome
from ernie_cluster.engine.followers import Followers
from ernie_cluster.engine.handover import Destination, KVSender, Peers
from ernie_cluster.engine.inbox import Inbox
from ernie_cluster.engine.leases import LeaseTable
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.errors import ErnieClusterError, TransferFailed
from ernie_cluster.request import GenerationRequest, RequestFailed
from ernie_cluster.transport.base import Channel, Message


class Openings:
    """Owns the prompts that wait for their path.

    Args:
        engine: takes them; its lock guards them.
        leases: of the same block pool.
        inbox: for prefixes and pictures that come from elsewhere.
        sender: hands over those that are decoded elsewhere.
        followers: the other ranks here that hold KV heads.
        emit: takes the failures of paths, on a channel's thread.
    """

    def __init__(
        self,
        engine: Engine,
        leases: LeaseTable,
        inbox: Inbox,
        sender: KVSender,
        followers: Followers,
        emit: Callable[[list[Outcome]], None],
    ) -> None:
        self._engine, self._leases, self._inbox = engine, leases, inbox
        self._sender, self._followers, self._emit = sender, followers, emit
        self._waiting: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def request_ids(self) -> list[str]:
        """Of all prompts here; with the engine's lock held."""
        return list(self._waiting)

    def forget(self, request_id: str) -> None:
        """Its lease ends, or has ended, by other hands; with the engine's lock held."""
        self._waiting.pop(request_id, None)

    def open(
        self,
        request: GenerationRequest,
        epoch: int,
        hashes: list[bytes],
        reserve_tokens: int,
        channel: Channel | None,
        peers: Peers,
        prefix_s: float,
    ) -> None:
        """Lease blocks for a prompt and ask for the rest of its path; returns at once. The rest as of `Worker.open_prefill`.

        Args:
            hashes: of the prompt's full blocks; empty without a prefix cache.
            reserve_tokens: of its answer, that blocks are leased for.
        """
        engine = self._engine
        num_tokens = request.num_prompt_tokens + len(request.output_token_ids)
        with engine.lock:
            self._inbox.fence(request.request_id, epoch)
            owed, now = engine.scheduler.num_blocks_owed, engine.clock()
            lease = self._leases.grant(
                request.request_id, epoch, num_tokens, hashes, reserve_tokens, now, owed, now + request.timeout_s
            )
            sequence = Sequence(request, hashes, blocks=lease.blocks, epoch=epoch)
            sequence.num_computed = sequence.num_cached = lease.num_shared * engine.pool.block_size
            sequence.num_published = lease.num_shared
            self._waiting[request.request_id] = sequence
            prefix = Future[None]()
            if prefix_s:
                deadline_s = engine.clock() + min(prefix_s, self._leases.timeout_s / 2)
                prefix = self._inbox.fetches.expect(sequence, lease, deadline_s)
                engine.lock.notify_all()  # whose deadline may be the next one now
            else:
                prefix.set_result(None)
        if channel is None:
            if prefix_s:
                prefix.add_done_callback(lambda _: prefix.cancelled() or self._begin(sequence, None, 0))
            else:
                self._begin(sequence, None, 0)
        else:
            self._claim(sequence, Destination(channel, peers), prefix)

    def _claim(self, sequence: Sequence, destination: Destination, prefix: Future[None]) -> None:
        """Begin once the decode side, our other ranks and the prefix have answered."""
        request_id, epoch = sequence.request_id, sequence.epoch
        message: Message = {"type": "claim", "request_id": request_id, "epoch": epoch}
        claim = destination.channel.call(message, self._leases.timeout_s)
        reached = self._followers.reach(request_id, epoch, destination.peers.endpoints)

        def answered() -> None:
            try:
                reply = claim.result()
                if "error" in reply:
                    raise TransferFailed(str(reply["error"]))
                reached.result()
                first_block = int(reply["cached_blocks"])  # type: ignore[arg-type]
                begun = not prefix.cancelled() and self._begin(sequence, destination, first_block)
            except ErnieClusterError as e:
                begun = False
                if self._drop(sequence):
                    self._emit([RequestFailed(request_id, e)])
            if not begun:
                self._followers.drop(request_id, epoch)

        claim.add_done_callback(
            lambda _: reached.add_done_callback(lambda _: prefix.add_done_callback(lambda _: answered()))
        )

    def _begin(self, sequence: Sequence, destination: Destination | None, first_block: int) -> bool:
        """The whole path is reserved: the sequence may be scheduled. False when it is not wanted any more."""
        with self._engine.lock:
            if self._waiting.get(sequence.request_id) is not sequence:
                return False  # aborted, or fenced off by a newer attempt; its lease is gone
            del self._waiting[sequence.request_id]
            self._leases.take(sequence.request_id, sequence.epoch)
            if destination is not None:
                self._sender.begin(sequence, destination, first_block)
            self._engine.add(sequence)
            self._inbox.open_media(sequence)
            return True

    def _drop(self, sequence: Sequence) -> bool:
        """The path could not be reserved; False when the request was ended by others already, or is just now."""
        with self._engine.lock:
            if self._waiting.get(sequence.request_id) is not sequence:
                return False
            del self._waiting[sequence.request_id]
            return self._inbox.forget(sequence.request_id, sequence.epoch)
