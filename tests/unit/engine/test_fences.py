"""Every fence is needed: each stands in a history of the machine in `protocol` that ends well with it and badly without.

Where two fences stand behind each other, both are taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from ernie_cluster.engine import fetching, follower, inbox
from ernie_cluster.engine.block_pool import Hold
from ernie_cluster.engine.claims import Claims
from ernie_cluster.engine.fetching import Fetches
from ernie_cluster.engine.followers import Followers
from ernie_cluster.engine.handover import KVSender
from ernie_cluster.engine.inbox import Inbox
from ernie_cluster.engine.leases import Lease, LeaseTable
from ernie_cluster.engine.lending import Lender
from ernie_cluster.engine.scheduler import Scheduler
from ernie_cluster.engine.slices import Outgoing
from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport import inbox as transport_inbox
from tests.unit.engine.protocol import Protocol

History = Callable[[], Protocol]
Mutation = Callable[[pytest.MonkeyPatch], None]
FENCES: dict[Mutation, History] = {}
"""What takes a fence out, and a history that needs it."""


def without_in(history: History) -> Callable[[Mutation], Mutation]:
    """Register what takes out a fence that a history needs."""

    def register(mutation: Mutation) -> Mutation:
        FENCES[mutation] = history
        return mutation

    return register


def nothing(*args: Any, **kwargs: Any) -> None:
    """What a fence that is not there does."""


# ---- histories


def begin(tps: tuple[int, int] = (1, 1), **more: Any) -> Protocol:
    """Blocks, chunks and pieces are small; epochs alone tell attempts apart."""
    values = {"num_blocks": 12, "block_size": 2, "budget": 12, "piece_blocks": 1, "has_cache": True, "host_blocks": 0}
    state = Protocol()
    state.start(tps=tps, are_attempts_named=False, **{**values, **more})
    return state


def ask(state: Protocol, prompt: str = "abababab", path: tuple[int, int | None] = (0, 1), **more: Any) -> None:
    values = {"max_tokens": 3, "images": [], "is_prefill_first": False, "lent": "", "turns": 0}
    state.ask(prompt=prompt, path=path, **{**values, **more})


def ask_again(state: Protocol) -> None:
    state.ask_again(which=0, path=(0, 1), is_prefill_first=False, is_aborted_first=False, lent="", turns=0)


def pieces_wait(state: Protocol, rank: int = 0) -> bool:
    return any(line.rank == rank and line.jobs[0].header is not None for line in state.wayside())


def until(state: Protocol, condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        state.move(1)
    raise AssertionError("this never comes")


def is_expected(state: Protocol, rank: int) -> bool:
    """Whether a rank of the decode side knows the lease of the second attempt."""
    decode = state.world.replicas[1]
    leases = decode.worker.leases._leases if rank == 0 else decode.follower._leases  # type: ignore[union-attr]
    return any(lease.epoch == 1 for lease in leases.values())


def mishap(state: Protocol, how: str, rank: int = 0) -> None:
    lines = state.wayside()
    state.mishap(which=next(i for i, line in enumerate(lines) if line.rank == rank), how=how)


def all_goes_well() -> Protocol:
    state = begin()
    ask(state, max_tokens=5)  # more than there are attempts: each would bring one further
    return state


def nothing_ever_arrives() -> Protocol:
    return all_goes_well()


def an_old_piece_comes_late(tps: tuple[int, int] = (1, 1), rank: int = 0) -> Protocol:
    """While the next attempt waits for its own."""
    state = begin(tps)
    ask(state)
    until(state, lambda: pieces_wait(state, rank))
    mishap(state, "hold", rank)
    ask_again(state)
    until(state, lambda: is_expected(state, rank))
    state.arrive_late(which=0)
    return state


def an_old_piece_comes_late_to_the_second_rank() -> Protocol:
    return an_old_piece_comes_late((1, 2), 1)


def an_old_order_comes_late() -> Protocol:
    state = begin()
    ask(state)
    ask_again(state)
    state.open_comes_late(which=0, where=1)
    return state


def a_bit_flips() -> Protocol:
    state = begin()
    ask(state)
    until(state, lambda: pieces_wait(state))
    mishap(state, "spoil")
    state.run_until_quiet()
    return state


def a_piece_is_lost() -> Protocol:
    state = begin()
    ask(state)
    until(state, lambda: pieces_wait(state))
    mishap(state, "lose")
    state.run_until_quiet()
    return state


def a_commit_overtakes_its_pieces() -> Protocol:
    state = begin()
    ask(state)
    until(state, lambda: pieces_wait(state))
    mishap(state, "overtake")
    state.run_until_quiet()
    return state


def a_piece_names_a_shared_block() -> Protocol:
    state = begin()
    ask(state, path=(1, None))
    state.run_until_quiet()
    ask(state)
    state.piece_goes_astray(which=1, where=1, block=0)
    return state


def a_prompt_ends_while_its_pieces_wait() -> Protocol:
    """And another one takes its blocks."""
    state = begin(num_blocks=6, budget=3)
    ask(state)
    until(state, lambda: pieces_wait(state))
    state.leave(which=0, is_told=True)
    state.step(which=0, times=1)
    ask(state, "bbbbbbbbb", (0, None), max_tokens=1)
    state.step(which=0, times=3)
    state.run_until_quiet()
    return state


def a_source_needs_its_blocks() -> Protocol:
    state = begin(num_blocks=7)
    ask(state, path=(1, None), max_tokens=1)
    state.run_until_quiet()
    ask(state, path=(0, None), lent="its own")
    ask(state, "bbbbbbbb", (1, None), max_tokens=1)
    state.step(which=1, times=2)
    state.run_until_quiet()
    return state


def a_source_is_asked_for_another_prompt() -> Protocol:
    state = begin()
    ask(state, path=(1, None))
    state.run_until_quiet()
    ask(state, "babababa", (0, None), lent="another's")
    state.run_until_quiet()
    return state


def a_borrower_is_gone() -> Protocol:
    state = begin()
    ask(state, path=(1, None))
    state.run_until_quiet()
    ask(state, path=(0, None), lent="its own")
    state.die(which=0, num_late=0)
    return state


def a_lease_ends_under_two_ranks() -> Protocol:
    state = begin((1, 2))
    ask(state)
    until(state, lambda: pieces_wait(state))
    state.leave(which=0, is_told=True)
    return state


def an_answer_needs_the_blocks_of_a_prompt() -> Protocol:
    """That is being handed over, in chunks."""
    state = begin(num_blocks=7, budget=3, has_cache=False)
    ask(state, "ab", (0, None), max_tokens=5)
    ask(state)
    until(state, lambda: not state.wayside())
    state.step(which=0, times=4)
    state.step(which=0, times=2)
    state.run_until_quiet()
    return state


def a_claim_finds_nobody() -> Protocol:
    """There was no room for the decode side, and the prompt was aborted while its claim was on its way."""
    state = begin(num_blocks=6)
    ask(state, path=(1, None), max_tokens=1)
    ask(state, is_prefill_first=True)
    state.move(1)
    return state


def a_prompt_of_two_ranks_is_aborted() -> Protocol:
    state = begin((2, 1), budget=3)
    ask(state)
    until(state, lambda: pieces_wait(state))
    state.leave(which=0, is_told=True)
    return state


# ---- fences


@without_in(an_old_piece_comes_late)
def epochs_of_leases(patch: pytest.MonkeyPatch) -> None:
    def find(self: LeaseTable, request_id: str, epoch: int) -> Lease:
        if request_id not in self._leases:
            raise TransferFailed("no lease")
        return self._leases[request_id]

    patch.setattr(LeaseTable, "find", find)


@without_in(an_old_order_comes_late)
def epochs_of_orders(patch: pytest.MonkeyPatch) -> None:
    """An attempt that comes late takes the place of a newer one."""
    grant = LeaseTable.grant

    def granted(self: LeaseTable, request_id: str, *args: Any) -> Lease:
        self.end(request_id)
        return grant(self, request_id, *args)

    patch.setattr(Inbox, "fence", nothing)
    patch.setattr(LeaseTable, "grant", granted)


@without_in(a_bit_flips)
def checksums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        transport_inbox, "accept", lambda sink, header, digest, payload: transport_inbox.give(sink, header, payload)
    )


@without_in(a_commit_overtakes_its_pieces)
def counting_at_the_commit(patch: pytest.MonkeyPatch) -> None:
    for module in (inbox, fetching):
        patch.setattr(module, "check_counted", nothing)
    for module in (inbox, fetching, follower):
        patch.setattr(module, "check_filled", nothing)


@without_in(a_piece_names_a_shared_block)
def the_shared_prefix_is_read_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "owns", lambda self, first, count: 0 <= first < first + count <= len(self.blocks))


@without_in(a_prompt_ends_while_its_pieces_wait)
def holds_on_blocks_that_are_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Hold, "is_valid", True)
    patch.setattr(Outgoing, "check", nothing)


@without_in(all_goes_well)
def pins_of_a_hand_over(patch: pytest.MonkeyPatch) -> None:
    """Its blocks are free when its commit is sent, not when that is answered."""
    commit = KVSender._commit

    def committed(self: KVSender, transfer: Any, num_pieces: int) -> None:
        commit(self, transfer, num_pieces)
        self._done(transfer.sequence, None)

    patch.setattr(KVSender, "_commit", committed)


@without_in(a_source_needs_its_blocks)
def pins_of_a_loan(patch: pytest.MonkeyPatch) -> None:
    holds_on_blocks_that_are_read(patch)
    pinned, end = Lender._pinned, Lender._end

    def lent(self: Lender, hashes: Sequence[bytes]) -> list[int]:
        blocks = pinned(self, hashes)
        self._engine.pool.free(blocks)
        return blocks

    def ended(self: Lender, loan: Any, error: Exception | None) -> None:
        loan.blocks = []
        end(self, loan, error)

    patch.setattr(Lender, "_pinned", lent)
    patch.setattr(Lender, "_end", ended)
    patch.setattr(Lender, "blocks", lambda self: [])


@without_in(a_lease_ends_under_two_ranks)
def recall(patch: pytest.MonkeyPatch) -> None:
    """Blocks are free before the other ranks have forgotten the lease."""

    def end(self: LeaseTable, request_id: str, epoch: int | None = None) -> bool:
        lease = self._leases.get(request_id)
        if lease is None or (epoch is not None and lease.epoch != epoch):
            return False
        self.pool.free(self._leases.pop(request_id).blocks)
        return True

    patch.setattr(LeaseTable, "end", end)


@without_in(an_old_piece_comes_late_to_the_second_rank)
def followers_epochs(patch: pytest.MonkeyPatch) -> None:
    def lease(self: follower.Follower, request_id: str, epoch: int) -> Lease:
        found = next((lease for (name, _), lease in self._leases.items() if name == request_id), None)
        if found is None:
            raise TransferFailed("no lease")
        return found

    patch.setattr(follower.Follower, "_lease", lease)


@without_in(a_source_is_asked_for_another_prompt)
def offers_of_another_prompt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fetches, "_fits", lambda self, fetch, claim: True)


@without_in(an_answer_needs_the_blocks_of_a_prompt)
def blocks_on_their_way_stay(patch: pytest.MonkeyPatch) -> None:
    """A prompt that is being handed over can be preempted."""
    holds_on_blocks_that_are_read(patch)
    patch.setattr(Scheduler, "_is_victim", staticmethod(lambda sequence: True))


@without_in(nothing_ever_arrives)
def ends_of_leases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseTable, "sweep", lambda self, now_s: [])


@without_in(nothing_ever_arrives)
def ends_that_nobody_can_put_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "renew", lambda self, now_s, timeout_s: setattr(self, "deadline_s", now_s + timeout_s))


@without_in(a_claim_finds_nobody)
def ends_of_claims(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claims, "overdue", lambda self, now_s: iter(()))


@without_in(a_borrower_is_gone)
def ends_of_loans(patch: pytest.MonkeyPatch) -> None:
    end = Lender._end
    patch.setattr(Lender, "_end", lambda self, loan, error: nothing() if error else end(self, loan, error))


@without_in(a_piece_is_lost)
def ends_of_hand_overs_that_failed(patch: pytest.MonkeyPatch) -> None:
    end = KVSender._end
    patch.setattr(KVSender, "_end", lambda self, transfer, error: nothing() if error else end(self, transfer, error))


@without_in(a_prompt_of_two_ranks_is_aborted)
def what_followers_drop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Followers, "drop", nothing)


def play(history: History) -> None:
    """And what follows from it, to the end."""
    state = history()
    state.holds()
    state.teardown()


@pytest.mark.parametrize(
    "history", sorted(set(FENCES.values()), key=lambda h: h.__name__), ids=lambda h: h.__name__.replace("_", " ")
)
def test_with_all_fences_it_ends_well(history: History) -> None:
    play(history)


@pytest.mark.parametrize("mutation", FENCES, ids=lambda mutation: mutation.__name__.replace("_", " "))
def test_without_it_something_goes_wrong(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        play(FENCES[mutation])


FOUND_ALONE = [counting_at_the_commit, pins_of_a_hand_over, recall, ends_of_leases, ends_of_loans, what_followers_drop]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", FOUND_ALONE, ids=lambda mutation: mutation.__name__.replace("_", " "))
def test_the_machine_finds_it_by_itself(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    some = settings(
        max_examples=1000,
        stateful_step_count=20,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Protocol, settings=some)  # type: ignore[no-untyped-call]
