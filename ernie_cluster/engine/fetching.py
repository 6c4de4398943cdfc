"""Receiving side of a prefix: blocks that another replica has computed come for a prompt that waits for them here.

They are written into the prompt's own lease, so nothing has to be moved when they are all here: the prompt is computed
from there on. A source first *offers* so many leading blocks, with the hash of the last one, which covers all before it
and which the prompt here must have too. Whatever goes wrong, the prompt goes on without: at its deadline at the latest.

    offer    source -> here    answered with the first block that is wanted
    prefix   source -> here    all pieces have been sent
    decline  source -> here    there will be no offer

Everything with the engine's lock held.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.engine.claims import Claim, Claims
from ernie_cluster.engine.engine import Engine
from ernie_cluster.engine.followers import Followers
from ernie_cluster.engine.leases import Lease
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.engine.slices import check_counted, check_filled, failure_of
from ernie_cluster.errors import TransferFailed
from ernie_cluster.request import Span
from ernie_cluster.transport.base import Reply


@dataclass(slots=True, eq=False)
class _Fetch:
    sequence: Sequence
    lease: Lease
    deadline_s: float
    start_s: float
    """Wall clock."""
    is_ready: bool = False
    """Every rank of ours knows the lease, and pieces may come."""
    depth: int = 0
    """Leading blocks of the offer that was taken; 0 = none yet."""
    done: Future[None] = field(default_factory=Future)


class Fetches:
    """Owns the prompts that wait for a prefix.

    Args:
        engine: of the prompts.
        claims: where offers wait that come before their prompt.
        layout: of this rank's KV.
        followers: the other ranks here that hold KV heads.
        wall_clock: seconds since the epoch, for the timeline.
    """

    def __init__(
        self,
        engine: Engine,
        claims: Claims,
        layout: KVLayout,
        followers: Followers,
        wall_clock: Callable[[], float],
    ) -> None:
        self._engine, self._claims, self._layout = engine, claims, layout
        self._followers, self._wall_clock = followers, wall_clock
        self._open: dict[str, _Fetch] = {}

    def __contains__(self, request_id: str) -> bool:
        """Whether pieces of a prefix may come for it."""
        return request_id in self._open

    @property
    def next_deadline_s(self) -> float:
        """When `sweep` has something to do, on the engine's clock."""
        return min((fetch.deadline_s for fetch in self._open.values()), default=float("inf"))

    def expect(self, sequence: Sequence, lease: Lease, deadline_s: float) -> Future[None]:
        """A prefix may come into the lease of a prompt until the deadline.

        Returns:
            Done when nothing of it is written any more, well or not; what has come counts as computed then. Cancelled
            when the prompt is over.
        """
        self.forget(sequence.request_id)
        fetch = self._open[sequence.request_id] = _Fetch(sequence, lease, deadline_s, self._wall_clock())
        if self._followers:
            lease.told = told = self._followers.expect(lease)
            told.add_done_callback(lambda _: self._told(fetch))
        else:
            self._ready(fetch)
        return fetch.done

    def offered(self, claim: Claim) -> None:
        """A source has so many leading blocks; raises TransferFailed where nobody waits for them any more."""
        fetch, sequence = self._open.get(claim.request_id), self._engine.sequences.get(claim.request_id)
        if fetch is not None and fetch.sequence.epoch > claim.epoch:
            raise TransferFailed(f"request {claim.request_id}: attempt {claim.epoch} is fenced off")
        if sequence is not None and sequence.epoch == claim.epoch:
            raise TransferFailed(f"request {claim.request_id}: its prompt waits for no prefix any more")
        self._claims.add(claim)
        if fetch is not None and fetch.is_ready:
            self._ready(fetch)

    def arrived(self, request_id: str, epoch: int, num_pieces: int, reply: Reply) -> None:
        """All was sent; raises TransferFailed when something is missing here, and replies what is on other ranks."""
        fetch = self._find(request_id, epoch)
        num_tokens = fetch.depth * self._layout.block_size
        try:
            if not fetch.depth:
                raise TransferFailed(f"request {request_id}: no offer of attempt {epoch} was taken")
            check_counted(fetch.lease, num_pieces)
            check_filled(fetch.lease, self._layout, num_tokens)
        except TransferFailed:
            self._give_up(fetch, "incomplete")
            raise
        if not self._followers:
            self._begin(fetch)
            reply({})
            return
        others = self._followers.complete(fetch.lease, num_tokens)

        def completed() -> None:
            error = failure_of(others)
            with self._engine.lock:
                if self._open.get(request_id) is not fetch:
                    error = error or TransferFailed(f"request {request_id}: its prompt goes on without the prefix")
                elif error is None:
                    self._begin(fetch)
                else:
                    self._give_up(fetch, "incomplete")
            reply({} if error is None else {"error": str(error)})

        others.add_done_callback(lambda _: completed())

    def declined(self, request_id: str, epoch: int) -> None:
        """The source has nothing of it any more, or cannot send it."""
        fetch = self._open.get(request_id)
        if fetch is not None and fetch.sequence.epoch == epoch:
            self._give_up(fetch, "declined")

    def forget(self, request_id: str, epoch: int | None = None) -> None:
        """A prompt, or one attempt of it, is over; its lease has ended or will."""
        fetch = self._open.get(request_id)
        if fetch is not None and epoch in (None, fetch.sequence.epoch):
            del self._open[request_id]
            fetch.done.cancel()

    def fence(self, request_id: str, epoch: int) -> None:
        """Make way for an attempt: an older one is over."""
        fetch = self._open.get(request_id)
        if fetch is not None and fetch.sequence.epoch < epoch:
            self.forget(request_id)

    def sweep(self, now_s: float) -> None:
        """Prompts whose prefix is late go on without."""
        for fetch in [f for f in self._open.values() if f.deadline_s <= now_s]:
            self._give_up(fetch, "late")

    # ---- inside

    def _find(self, request_id: str, epoch: int) -> _Fetch:
        fetch = self._open.get(request_id)
        if fetch is None or fetch.sequence.epoch != epoch:
            raise TransferFailed(f"request {request_id}: attempt {epoch} waits for no prefix")
        return fetch

    def _told(self, fetch: _Fetch) -> None:
        assert fetch.lease.told is not None
        with self._engine.lock:
            if failure_of(fetch.lease.told) is None and self._is_open(fetch):
                self._ready(fetch)

    def _ready(self, fetch: _Fetch) -> None:
        """Pieces may come: say so to who has offered some."""
        fetch.is_ready = True
        for claim in self._claims.take(fetch.sequence.request_id, fetch.sequence.epoch, "offer"):
            if fetch.depth or not self._is_open(fetch):
                claim.refuse(f"request {claim.request_id}: its prefix comes from elsewhere")
            elif self._fits(fetch, claim):
                fetch.depth = int(claim.message["blocks"])  # type: ignore[arg-type]
                claim.reply({"first_block": fetch.lease.num_shared})
            else:
                claim.refuse(f"request {claim.request_id}: this prefix is another one, or no longer than what is here")
                self._give_up(fetch, "refused")

    def _fits(self, fetch: _Fetch, claim: Claim) -> bool:
        """Whether an offer is a beginning of this very prompt, longer than what is here; the last token is always computed."""
        depth, sequence = int(claim.message["blocks"]), fetch.sequence  # type: ignore[arg-type]
        most = min(len(sequence.hashes), (len(sequence.tokens) - 1) // self._layout.block_size)
        is_longer = fetch.lease.num_shared < depth <= most
        return is_longer and sequence.hashes[depth - 1].hex() == claim.message["hash"]

    def _is_open(self, fetch: _Fetch) -> bool:
        return self._open.get(fetch.sequence.request_id) is fetch

    def _begin(self, fetch: _Fetch) -> None:
        """All of it is here, and others may use it too."""
        del self._open[fetch.sequence.request_id]
        sequence, lease = fetch.sequence, fetch.lease
        num_blocks = fetch.depth - lease.num_shared
        sequence.num_computed = sequence.num_cached = fetch.depth * self._layout.block_size
        self._engine.scheduler.publish(sequence)
        num_bytes = num_blocks * self._layout.block_bytes * (1 + len(self._followers))
        self._note(fetch, ("bytes", num_bytes), ("blocks", num_blocks))
        fetch.done.set_result(None)

    def _give_up(self, fetch: _Fetch, why: str) -> None:
        """The prompt goes on without, once nothing is written into its blocks any more."""
        request_id, lease = fetch.sequence.request_id, fetch.lease
        del self._open[request_id]
        for claim in self._claims.take(request_id, fetch.sequence.epoch, "offer"):
            claim.refuse(f"request {request_id}: its prompt goes on without a prefix")
        self._note(fetch, ("failed", why))
        if lease.told is None:
            fetch.done.set_result(None)
        else:  # not before they know it, for messages may overtake each other
            lease.told.add_done_callback(
                lambda _: self._followers.forget(lease).add_done_callback(lambda _: fetch.done.set_result(None))
            )

    def _note(self, fetch: _Fetch, *detail: tuple[str, str | int]) -> None:
        span = Span("fetch", fetch.start_s, self._wall_clock() - fetch.start_s, detail)
        fetch.sequence.spans.append(span)
