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
_AT_ONCE = 4
"""Loans that are sent side by side: of all that a replica is asked for when it leaves, the first are then whole soon."""
_TELLING_BYTES = 1 << 20
"""Of fewer the time says little of the way."""
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
    until_s: float
    """Nobody waits for it any longer."""
    num_bytes: int = 0
    """To be sent from this rank."""
    first_block: int = 0
    """Of those that are to be sent."""
    began_s: float = 0.0


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
        self._accepted: list[_Loan] = []
        """Those of them that wait to be sent."""
        self._sending: list[_Loan] = []
        self._bytes_per_s = math.inf
        """As the last one went, of those that are sent in one go; not known before it."""
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

    def lend(
        self,
        request_id: str,
        epoch: int,
        hashes: Seq[bytes],
        part: SliceOf,
        destination: Destination,
        within_s: float = math.inf,
    ) -> None:
        """Send the leading blocks that are cached here, or decline where that would take too long; returns at once.

        Args:
            request_id, epoch: the attempt that wants them.
            hashes: of the blocks that are wanted.
            part: the heads of this rank.
            destination: the replica that computes the prompt.
            within_s: so long they are waited for.
        """
        ways = [(copy, destination.to(copy.dst_rank)) for copy in part.copies_to(destination.num_ranks)]
        with self._engine.lock:
            blocks = self._pinned(hashes)
            outgoing, hold = Outgoing(request_id, epoch, part, ways), self._engine.pool.hold(blocks)
            until_s = self._engine.clock() + within_s
            loan = _Loan(request_id, epoch, destination, blocks, outgoing, hold, until_s)
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
                loan.first_block = int(answer.result()["first_block"])  # type: ignore[arg-type]
            except Exception as e:
                self._decline(loan, e)
                return
            loan.num_bytes = self._slices.nbytes(loan.outgoing, len(loan.blocks) - loan.first_block)
            with self._engine.lock:
                self._accepted.append(loan)
            self._go_on()

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

    def _go_on(self) -> None:
        """Send whose turn it is, and tell those who would wait in vain."""
        late, sent = list[_Loan](), list[_Loan]()
        with self._engine.lock:
            now_s = self._engine.clock()
            bytes_before = sum(loan.num_bytes for loan in self._sending)
            for loan in self._accepted[:]:
                bytes_before += loan.num_bytes
                if now_s + bytes_before / self._bytes_per_s > loan.until_s:
                    bytes_before -= loan.num_bytes
                    late.append(loan)
                elif len(self._sending) < _AT_ONCE:
                    loan.began_s = now_s
                    self._sending.append(loan)
                    sent.append(loan)
            self._accepted = [loan for loan in self._accepted if loan not in late and loan not in sent]
        for loan in sent:
            try:
                self._send(loan)
            except Exception as e:
                self._decline(loan, e)
        for loan in late:
            self._decline(loan, TransferFailed("others are sent first, and it would come too late"))

    def _send(self, loan: _Loan) -> None:
        """Push all that is to be sent; close with `prefix` when it was accepted."""
        blocks, outgoing = loan.blocks[loan.first_block :], loan.outgoing
        run = Run(outgoing, loan.first_block, blocks, loan.hold)
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
            outgoing.settle(loan.num_bytes, lambda error: self._settled(loan, num_pieces, error))

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
            if loan in self._sending:
                took_s = self._engine.clock() - loan.began_s
                if error is None and took_s > 0 and loan.num_bytes >= _TELLING_BYTES:
                    self._bytes_per_s = loan.num_bytes * len(self._sending) / took_s
                self._sending.remove(loan)
                if not self._sending and not self._accepted:
                    self._bytes_per_s = math.inf
        self._go_on()
