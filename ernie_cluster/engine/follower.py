"""What a rank does for hand-overs that holds some of the KV heads and follows a leader, who decides.

Its part of the receiving side is a mirror of the leader's leases: a piece is written under the very attempt that the
leader expects, or refused. Its part of the sending side are the hand-overs that it was told to reach the other side for.
What the messages mean is in `followers`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.engine.followers import refusal
from ernie_cluster.engine.leases import Lease
from ernie_cluster.engine.slices import KV_PIECE, Outgoing, Run, SliceOf, SliceSender, check_filled, write_piece
from ernie_cluster.errors import TransferFailed
from ernie_cluster.model.step import KVCache
from ernie_cluster.transport.base import JSON, Channel, Message, Payload, PieceHeader, Reply
from ernie_cluster.transport.choose import Endpoint


class Follower:
    """A `transport.base.Sink` of a following rank, and what its engine thread does beside the steps.

    Args:
        kv: the rank's cache.
        part: which of the model's KV heads it holds.
        piece_bytes: bound of a piece.
        connect: the channel to a rank of another replica, on a thread of ours; raises ReplicaError.
    """

    def __init__(self, kv: KVCache, part: SliceOf, piece_bytes: int, connect: Callable[[Endpoint], Channel]) -> None:
        self._kv, self._part, self._connect = kv, part, connect
        self._layout = KVLayout.of_cache(kv.data.shape, kv.data.element_size())
        self._slices = SliceSender(kv, self._layout, piece_bytes)
        self._lock = threading.Lock()  # guards the books, and the cache against writes under a lease that is forgotten
        self._leases: dict[tuple[str, int], Lease] = {}
        self._outgoing: dict[str, Outgoing] = {}

    # ---- the engine thread

    def noted(self, notes: Sequence[Message]) -> Callable[[int], None]:
        """What the leader noted for a step, before it runs; to be called after each of its layers."""
        runs = []
        for note in notes:
            for order, body in note.items():
                request_id, epoch, *blocks = _as_list(body)
                with self._lock:
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
            threading.Thread(target=self._reach, args=(request_id, epoch, ranks, reply), daemon=True).start()
            return
        if message["type"] == "settle":
            self._settle(request_id, epoch, int(message["num_blocks"]), reply)  # type: ignore[arg-type]
            return
        with self._lock:
            if message["type"] == "expect":
                blocks = [int(block) for block in _as_list(message["blocks"])]  # type: ignore[arg-type]
                lease = Lease(request_id, epoch, blocks, int(message["num_shared"]), float("inf"))  # type: ignore[arg-type]
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
            return not (self._leases or self._outgoing)

    # ---- inside

    def _lease(self, request_id: str, epoch: int) -> Lease:
        lease = self._leases.get((request_id, epoch))
        if lease is None:
            raise TransferFailed(f"request {request_id}: attempt {epoch} has no lease; it ended or ran out")
        return lease

    def _reach(self, request_id: str, epoch: int, ranks: Sequence[Endpoint], reply: Reply) -> None:
        try:
            ways = [(copy, self._connect(ranks[copy.dst_rank])) for copy in self._part.copies_to(len(ranks))]
        except Exception as e:
            reply(refusal(e))
            return
        with self._lock:
            old = self._outgoing.get(request_id)
            if old is None or old.epoch < epoch:
                self._outgoing[request_id] = Outgoing(request_id, epoch, self._part, ways)
        reply({})

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
            reply({"num_pieces": found.num_pieces} if error is None else refusal(error))

        found.settle(self._slices.nbytes(found, num_blocks), settled)


def _as_list(value: JSON) -> list[JSON]:
    assert isinstance(value, list), f"the leader sends {value!r} where a list belongs"
    return value
