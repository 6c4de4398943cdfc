"""Sending side of a prefix: blocks of the prefix cache go to a replica that computes a prompt which begins with them.

The blocks are pinned while they are sent, and nothing is computed for it. What of the prefix has been evicted since
somebody saw it here is not sent; when all of it has, the other side is told at once. See `fetching` for the messages.

Runs on the caller's thread first, then on those of channels. Where KV heads are spread over ranks, each of ours sends what
it holds to those that want it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass

from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.engine.block_pool import Hold, OutOfBlocks
from ernie_cluster.engine.engine import Engine
from ernie_cluster.engine.followers import Followers
from ernie_cluster.engine.handover import Destination
from ernie_cluster.engine.slices import Outgoing, Run, SliceOf, SliceSender, failure_of
from ernie_cluster.errors import TransferFailed
from ernie_cluster.model.step import KVCache
from ernie_cluster.transport.base import JSON, Message

log = logging.getLogger(__name__)

_ASKED_S = 1.0
"""In which those that had to leave come to ask for what they left: they have to find another replica first."""
_TIMEOUT_S = 3.0
"""An offer that nobody has answered for this long came to a replica that never took the prompt, or gave up waiting."""


@dataclass(slots=True, eq=False)
class _Loan:
    request_id: str
    epoch: int
    destination: Destination
    blocks: list[int]
    """Pinned here; logical block index -> block id."""
    outgoing: Outgoing
    hold: Hold


class Lender:
    """Owns the prefixes that leave one engine.

    Args:
        engine: its pool holds the blocks, its lock guards them.
        kv: its cache.
        layout: of this rank.
        followers: the other ranks that hold KV heads.
        piece_bytes: bound of a piece.
    """

    def __init__(
        self, engine: Engine, kv: KVCache, layout: KVLayout, followers: Followers, *, piece_bytes: int
    ) -> None:
        self._engine, self._layout, self._followers = engine, layout, followers
        self._slices = SliceSender(kv, layout, piece_bytes)
        self._loans: list[_Loan] = []
        self._asked_until_s = -math.inf

    def parted(self) -> None:
        """Requests have to leave, and may want what is here of them."""
        self._asked_until_s = self._engine.clock() + _ASKED_S

    @property
    def is_wanted(self) -> bool:
        """Whether anything is lent, or may be asked for soon; with the engine's lock held."""
        if self._engine.is_parting and self._engine.sequences:  # they are told after the running step
            self.parted()
        return bool(self._loans) or self._engine.clock() < self._asked_until_s

    @property
    def bytes_sent(self) -> int:
        """KV that was pushed from this rank."""
        return self._slices.bytes_sent

    def blocks(self) -> list[int]:
        """All pinned blocks, as often as they are; with the engine's lock held."""
        return [block for loan in self._loans for block in loan.blocks]

    def lend(self, request_id: str, epoch: int, hashes: Seq[bytes], part: SliceOf, destination: Destination) -> None:
        """Send the leading blocks that are cached here; returns at once.

        Args:
            request_id, epoch: the attempt that wants them.
            hashes: of the blocks that are wanted.
            part: the heads of this rank.
            destination: the replica that computes the prompt.
        """
        ways = [(copy, destination.to(copy.dst_rank)) for copy in part.copies_to(destination.num_ranks)]
        with self._engine.lock:
            blocks = self._pinned(hashes)
            outgoing, hold = Outgoing(request_id, epoch, part, ways), self._engine.pool.hold(blocks)
            loan = _Loan(request_id, epoch, destination, blocks, outgoing, hold)
            self._loans.append(loan)
        if not blocks:
            self._decline(loan, TransferFailed("nothing of the prefix is cached here any more"))
            return
        answer = self._say(loan, "offer", blocks=len(blocks), hash=hashes[len(blocks) - 1].hex())
        reached = self._followers.reach(request_id, epoch, destination.peers.endpoints)

        def answered() -> None:
            error = failure_of(answer)
            if error is None and "error" in answer.result():
                error = TransferFailed(str(answer.result()["error"]))
            if error is not None:
                self._end(loan, error)
                return
            try:
                reached.result()
                self._send(loan, int(answer.result()["first_block"]))  # type: ignore[arg-type]
            except Exception as e:
                self._decline(loan, e)

        answer.add_done_callback(lambda _: reached.add_done_callback(lambda _: answered()))

    def _pinned(self, hashes: Seq[bytes]) -> list[int]:
        """The leading blocks that are known here, one reference to each; none where somebody waits for their place."""
        pool = self._engine.pool
        known = hashes[: pool.match(hashes)]
        try:
            blocks, _ = pool.acquire(known, len(known), self._engine.scheduler.num_blocks_owed)
        except OutOfBlocks:
            return []
        self._engine.lock.notify_all()  # followers may have to hear of copies before they send
        return blocks

    def _send(self, loan: _Loan, first_block: int) -> None:
        """Push all from `first_block` on; close with `prefix` when it was accepted."""
        blocks, outgoing = loan.blocks[first_block:], loan.outgoing
        run = Run(outgoing, first_block, blocks, loan.hold)
        others = self._followers.lend(run)
        push = self._slices.hook([run])
        for layer in range(self._layout.num_layers):
            push(layer)

        def others_settled() -> None:
            error = failure_of(others)
            if error is not None:
                self._decline(loan, error)
                return
            num_pieces = sum(int(str(reply["num_pieces"])) for reply in others.result())
            nbytes = self._slices.nbytes(outgoing, len(blocks))
            outgoing.settle(nbytes, lambda error: self._settled(loan, num_pieces, error))

        others.add_done_callback(lambda _: others_settled())

    def _settled(self, loan: _Loan, num_pieces: int, error: Exception | None) -> None:
        """Each piece was accepted; those of other ranks that went to the one that leads over there are so many."""
        if error is not None:
            self._decline(loan, error)
            return
        self._say(loan, "prefix", num_pieces=loan.outgoing.num_pieces + num_pieces)
        self._end(loan, None)

    def _decline(self, loan: _Loan, error: Exception) -> None:
        """The other side need not wait any longer."""
        self._say(loan, "decline")
        self._end(loan, error)

    def _say(self, loan: _Loan, kind: str, **more: JSON) -> Future[Message]:
        message: Message = {"type": kind, "request_id": loan.request_id, "epoch": loan.epoch, **more}
        return loan.destination.channel.call(message, _TIMEOUT_S)

    def _end(self, loan: _Loan, error: Exception | None) -> None:
        """Nothing is read any more."""
        if error is not None:
            log.info("request %s: no prefix was sent: %s", loan.request_id, error)
            self._followers.drop(loan.request_id, loan.epoch)
            loan.outgoing.fail(error)
        with self._engine.lock:
            self._loans.remove(loan)
            self._engine.pool.free(loan.blocks)
            self._engine.lock.notify_all()
