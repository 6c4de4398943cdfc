"""What a rank does for hand-overs that holds some of the KV heads and follows a leader, who decides.

Its part of the receiving side is a mirror of the leader's leases: a piece is written under the very attempt that the
leader expects, or refused. Its part of the sending side are the hand-overs that it was told to reach the other side for.
What the messages mean is in `followers`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.engine.followers import refusal
from ernie_cluster.engine.host_tier import Copies, HostMemory
from ernie_cluster.engine.leases import Lease
from ernie_cluster.engine.poison import Poison
from ernie_cluster.engine.slices import KV_PIECE, Outgoing, Run, SliceOf, SliceSender, check_filled, write_piece
from ernie_cluster.errors import TransferFailed
from ernie_cluster.model.step import KVCache
from ernie_cluster.transport.base import JSON, Channel, Message, Payload, PieceHeader, Reply
from ernie_cluster.transport.choose import Endpoint
from ernie_cluster.transport.plan import HeadCopy


def _in_a_thread(call: Callable[[], None]) -> None:
    threading.Thread(target=call, daemon=True).start()


class Follower:
    """A `transport.base.Sink` of a following rank, and what its engine thread does beside the steps.

    Args:
        kv: the rank's cache.
        part: which of the model's KV heads it holds.
        piece_bytes: bound of a piece.
        connect: the channel to a rank of another replica, on a thread of ours; raises ReplicaError.
        memory: the rank's part of the host's memory behind the cache; None where there is none.
        spawn: calls what may wait for another replica.
    """

    def __init__(
        self,
        kv: KVCache,
        part: SliceOf,
        piece_bytes: int,
        connect: Callable[[Endpoint], Channel],
        memory: HostMemory | None = None,
        spawn: Callable[[Callable[[], None]], None] = _in_a_thread,
    ) -> None:
        self._kv, self._part, self._connect, self._spawn = kv, part, connect, spawn
        self._layout = KVLayout.of_cache(kv.data.shape, kv.data.element_size())
        self._slices = SliceSender(kv, self._layout, piece_bytes)
        self._lock = threading.Lock()  # guards the books, and the cache against writes under a lease that is forgotten
        self._leases: dict[tuple[str, int], Lease] = {}
        self._outgoing: dict[str, Outgoing] = {}
        self._reaching: set[tuple[str, int]] = set()
        """Attempts whose channels are being opened, unless they have been given up meanwhile."""
        self._memory, self._poison, self._num_copied = memory, Poison(kv.data), 0
        self._early: dict[tuple[str, int], tuple[int, Lease, Reply]] = {}
        """Leases of blocks that are to be copied first: after how many orders, and whom to tell."""
        self._early_loans: list[tuple[int, Callable[[], None]]] = []
        """Likewise what is to be sent: after how many orders, and what to do then."""

    # ---- the engine thread

    def noted(self, notes: Sequence[Message]) -> Callable[[int], None]:
        """What the leader noted, before the next step runs; to be called after each of its layers."""
        runs = []
        for note in notes:
            for order, body in note.items():
                if order in ("offload", "restore", "poison", "clean"):
                    self._change(order, _as_list(body))
                    continue
                request_id, epoch, *blocks = _as_list(body)
                with self._lock:
                    if order == "drop":
                        self._reaching.discard((str(request_id), int(epoch)))  # type: ignore[arg-type]
                    outgoing = self._outgoing.get(str(request_id))
                    if outgoing is None or outgoing.epoch != epoch:
                        continue  # dropped
                    if order == "drop":
                        del self._outgoing[outgoing.request_id]
                if order == "drop":
                    outgoing.fail(TransferFailed(f"request {request_id}: attempt {epoch} was given up"))
                else:
                    first_block, ids = blocks
                    runs.append(Run(outgoing, int(first_block), [int(i) for i in _as_list(ids)]))  # type: ignore[arg-type]
        return self._slices.hook(runs)

    # ---- Sink

    def accept(self, header: PieceHeader, payload: Payload) -> None:
        """See `Sink`."""
        if header.detail[0] != KV_PIECE:
            raise TransferFailed(f"piece of kind {header.detail[0]}; embeddings go to the rank that leads")
        with self._lock:
            write_piece(self._kv, self._layout, self._lease(header.request_id, header.epoch), header, payload)

    def handle(self, message: Message, reply: Reply) -> None:
        """See `Sink`; only the leader calls."""
        request_id, epoch = str(message["request_id"]), int(message["epoch"])  # type: ignore[arg-type]
        if message["type"] == "reach":
            ranks = [Endpoint.from_json(rank) for rank in _as_list(message["ranks"])]
            with self._lock:
                self._reaching.add((request_id, epoch))
            self._spawn(partial(self._reach, request_id, epoch, ranks, reply))
            return
        if message["type"] == "settle":
            self._settle(request_id, epoch, int(message["num_blocks"]), reply)  # type: ignore[arg-type]
            return
        if message["type"] == "lend":
            blocks = [int(block) for block in _as_list(message["blocks"])]  # type: ignore[arg-type]
            first_block, num_copied = int(message["first_block"]), int(message.get("num_copied", 0))  # type: ignore[arg-type]
            lend = partial(self._lend, request_id, epoch, first_block, blocks, reply)
            with self._lock:
                if num_copied > self._num_copied:
                    self._early_loans.append((num_copied, lend))
                    return
            lend()
            return
        with self._lock:
            if message["type"] == "expect":
                blocks = [int(block) for block in _as_list(message["blocks"])]  # type: ignore[arg-type]
                lease = Lease(request_id, epoch, blocks, int(message["num_shared"]), float("inf"))  # type: ignore[arg-type]
                num_copied = int(message.get("num_copied", 0))  # type: ignore[arg-type]
                if num_copied > self._num_copied:
                    self._early[request_id, epoch] = num_copied, lease, reply
                    return
                self._leases[request_id, epoch] = lease
            elif message["type"] == "complete":
                check_filled(self._lease(request_id, epoch), self._layout, int(message["num_tokens"]))  # type: ignore[arg-type]
                del self._leases[request_id, epoch]
            elif message["type"] == "forget":
                self._leases.pop((request_id, epoch), None)
            else:
                raise TransferFailed(f"unknown message {message['type']!r}")
        reply({})

    def disconnected(self, peer: str) -> None:
        """See `Sink`. The leader ends what will not be completed."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is expected and nothing under way."""
        with self._lock:
            return not (self._leases or self._early or self._early_loans or self._outgoing or self._reaching)

    # ---- inside

    def _change(self, order: str, body: list[JSON]) -> None:
        """Copy or erase blocks, and see who has waited for that."""
        if order in ("poison", "clean"):
            blocks: list[int] = body  # type: ignore[assignment]
            (self._poison.poison if order == "poison" else self._poison.clean)(blocks)
        else:
            assert self._memory is not None, "the leader has memory of the host, so all have"
            copies: Copies = [(slot, block) for slot, block in map(_as_list, body)]  # type: ignore[misc]
            (self._memory.offload if order == "offload" else self._memory.restore)(copies)
        with self._lock:
            self._num_copied += 1
            ready = [key for key, (after, *_) in self._early.items() if after <= self._num_copied]
            replies = []
            for key in ready:
                _, self._leases[key], reply = self._early.pop(key)
                replies.append(reply)
            loans = [lend for after, lend in self._early_loans if after <= self._num_copied]
            self._early_loans = [loan for loan in self._early_loans if loan[0] > self._num_copied]
        for reply in replies:
            reply({})
        for lend in loans:
            lend()

    def _lease(self, request_id: str, epoch: int) -> Lease:
        lease = self._leases.get((request_id, epoch))
        if lease is None:
            raise TransferFailed(f"request {request_id}: attempt {epoch} has no lease; it ended or ran out")
        return lease

    def _reach(self, request_id: str, epoch: int, ranks: Sequence[Endpoint], reply: Reply) -> None:
        answer: Message = {}
        ways: list[tuple[HeadCopy, Channel]] | None = None
        try:
            ways = [(copy, self._connect(ranks[copy.dst_rank])) for copy in self._part.copies_to(len(ranks))]
        except Exception as e:
            answer = refusal(e)
        with self._lock:
            is_wanted = (request_id, epoch) in self._reaching
            self._reaching.discard((request_id, epoch))
            old = self._outgoing.get(request_id)
            if ways is not None and is_wanted and (old is None or old.epoch < epoch):
                self._outgoing[request_id] = Outgoing(request_id, epoch, self._part, ways)
        reply(answer)

    def _lend(self, request_id: str, epoch: int, first_block: int, blocks: list[int], reply: Reply) -> None:
        with self._lock:
            outgoing = self._outgoing.get(request_id)
        if outgoing is None or outgoing.epoch != epoch:
            reply(refusal(TransferFailed(f"request {request_id}: attempt {epoch} is not under way here")))
            return
        push = self._slices.hook([Run(outgoing, first_block, blocks)])
        for layer in range(self._layout.num_layers):
            push(layer)
        self._settle(request_id, epoch, len(blocks), reply)

    def _settle(self, request_id: str, epoch: int, num_blocks: int, reply: Reply) -> None:
        with self._lock:
            outgoing = self._outgoing.get(request_id)
        if outgoing is None or outgoing.epoch != epoch:
            raise TransferFailed(f"request {request_id}: attempt {epoch} is not under way here")
        found = outgoing

        def settled(error: Exception | None) -> None:
            with self._lock:
                if self._outgoing.get(request_id) is found:
                    del self._outgoing[request_id]
            if error is not None:
                found.fail(error)
            reply({"num_pieces": found.num_pieces} if error is None else refusal(error))

        found.settle(self._slices.nbytes(found, num_blocks), settled)


def _as_list(value: JSON) -> list[JSON]:
    assert isinstance(value, list), f"the leader sends {value!r} where a list belongs"
    return value
