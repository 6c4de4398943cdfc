"""Hand-overs between gangs whose ranks hold their own KV heads: the tokens of one engine, and one end for all mishaps."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from types import TracebackType

import pytest

from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import EngineFailed, ReplicaLost, TransferFailed
from ernie_cluster.request import GenerationRequest
from ernie_cluster.transport.base import Message, Payload
from ernie_cluster.transport.gpu_side import Deadlines
from ernie_cluster.transport.local import Faults, LocalChannel
from tests.tiny import make_worker
from tests.unit.engine.gangs import PATIENCE_S, Gang, Network
from tests.unit.engine.handover_path import show
from tests.unit.engine.test_laws import answers, requests
from tests.unit.transport.nccl_twin import Mishaps

Settings = dict[str, object]
SMALL: Settings = {"piece_bytes": 2048, "max_batch_tokens": 16}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """One engine on one rank does it all."""
    return answers(*make_worker(max_batch_tokens=1024), requests())


class Road:
    """Two gangs; at the end nothing may be left anywhere.

    Args:
        prefill, decode: how many ranks; 0 = two that share one cache.
        network: between them.
    """

    def __init__(self, prefill: int, decode: int, network: Network | None = None, **settings: object) -> None:
        self.network = network or Network()
        self.is_one_dead = False
        """Then the decode side need not be able to go on."""
        whole = {**SMALL, **settings}
        with ExitStack() as stack:
            stack.callback(self.network.close)
            self.prefill = Gang(stack, "prefill", prefill or 2, self.network, shares_kv=not prefill, **whole)
            self.decode = Gang(stack, "decode", decode or 2, self.network, shares_kv=not decode, **whole)
            self._stack = stack.pop_all()

    def open(self, request: GenerationRequest, epoch: int = 0) -> None:
        self.decode.outcomes.tokens[request.request_id] = [-1]  # the first token comes from prefill
        self.decode.worker.open_decode(request, epoch)
        self.prefill.open_prefill(request, epoch, self.decode)

    def run(self, some: list[GenerationRequest], epoch: int = 0) -> dict[str, list[int]]:
        """Tokens of requests that all go well."""
        with closing(LocalChannel(self.network.receivers["prefill/0"], "vision")) as embeds:
            for request in some:
                self.open(request, epoch)
                show(embeds, request, epoch)
            self.decode.outcomes.wait_for([r.request_id for r in some], PATIENCE_S)
        self.prefill.outcomes.drain()
        assert not self.prefill.outcomes.errors
        assert not self.decode.outcomes.errors
        return {r.request_id: self.said(r.request_id) for r in some}

    def said(self, request_id: str) -> list[int]:
        """Tokens of a request so far, of both sides."""
        first, rest = self.prefill.outcomes.tokens, self.decode.outcomes.tokens
        return first[request_id] + rest[request_id][1:]

    def failure(self, request_id: str) -> Exception:
        """How a request failed on the prefill side; nobody decodes it."""
        self.prefill.outcomes.wait_for([request_id], PATIENCE_S)
        self.decode.outcomes.drain()
        assert self.decode.outcomes.tokens[request_id] == [-1]
        self.prefill.outcomes.tokens.pop(request_id, None)
        return self.prefill.outcomes.errors.pop(request_id)

    def __enter__(self) -> Road:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        with self._stack:
            for worker in (self.prefill.worker, self.decode.worker) if kind is None and not self.is_one_dead else ():
                assert worker.failure is None
                wait_until(worker, lambda worker=worker: worker.pool.num_used == 0)  # type: ignore[misc]
                assert worker.check()
            if kind is None:
                assert all(follower.is_idle for follower in self.decode.followers.values()) or self.is_one_dead


def wait_until(worker: Worker, holds: Callable[[], bool]) -> None:
    """Until something holds of a worker that changes with its lock held."""
    with worker.engine.lock:
        assert worker.engine.lock.wait_for(holds, PATIENCE_S)


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (2, 2)])
def test_gangs_of_any_sizes_say_what_one_rank_says(expected: dict[str, list[int]], prefill: int, decode: int) -> None:
    with Road(prefill, decode) as road:
        assert road.run(requests()) == expected


def test_so_do_gangs_whose_kv_is_in_8_bits() -> None:
    said = []
    for prefill, decode in ((1, 1), (2, 1), (1, 2), (2, 0)):
        with Road(prefill, decode, kv_dtype="int8") as road:
            said.append(road.run(requests()))
    assert all(one == said[0] for one in said)


@pytest.mark.parametrize(
    ("prefill", "decode", "kind"),
    [(2, 0, "local"), (0, 2, "shared_memory"), (2, 1, "shared_memory"), (2, 1, "nccl"), (1, 2, "nccl"), (1, 2, "ipc")],
)
def test_by_every_transport_and_from_and_to_ranks_that_share_a_cache(
    request_for_faults: GenerationRequest, expected: dict[str, list[int]], prefill: int, decode: int, kind: str
) -> None:
    with Road(prefill, decode, Network(kind)) as road:
        request_id = request_for_faults.request_id
        assert road.run([request_for_faults])[request_id] == expected[request_id]


def test_ranks_meet_only_those_that_they_have_heads_for() -> None:
    with Road(2, 2) as road:
        road.run(requests()[:1])
        assert road.network.pairs == {("prefill/0", "decode/0"), ("prefill/1", "decode/1")}
    with Road(1, 2) as road:
        road.run(requests()[:1])
        assert road.network.pairs == {("prefill/0", "decode/0"), ("prefill/0", "decode/1")}


def test_prefixes_that_both_sides_hold_are_not_sent_again(expected: dict[str, list[int]]) -> None:
    with Road(2, 2) as road:
        road.run(requests())
        sent = road.prefill.worker.snapshot().kv_bytes_sent
        again = road.run([dataclasses.replace(r, request_id=f"again-{r.request_id}") for r in requests()])
        assert again == {f"again-{key}": tokens for key, tokens in expected.items()}
        assert road.prefill.worker.snapshot().kv_bytes_sent - sent < sent / 2


@pytest.mark.parametrize(("prefill", "decode"), [(2, 2), (0, 2)])
def test_each_rank_brings_its_own_heads_back(expected: dict[str, list[int]], prefill: int, decode: int) -> None:
    with Road(prefill, decode, num_blocks=22, host_blocks=80) as road:
        for i in range(2):
            for request in requests():
                again = dataclasses.replace(request, request_id=f"{i}-{request.request_id}")
                assert road.run([again])[again.request_id] == expected[request.request_id]
        for worker in (road.prefill.worker, road.decode.worker):
            use = worker.snapshot().host_tier
            assert use is not None
            assert use.restored > 0


# ---- mishaps


@pytest.fixture
def request_for_faults() -> GenerationRequest:
    return requests()[2]  # 40 tokens of text: 10 blocks in 4 layers


def next_attempt_succeeds(road: Road, request: GenerationRequest, expected: dict[str, list[int]]) -> None:
    assert road.run([request], epoch=1)[request.request_id] == expected[request.request_id]
    assert all(follower.is_idle for follower in road.prefill.followers.values())


PAIRS = [(2, 2, "prefill/1", "decode/1"), (2, 1, "prefill/1", "decode/0"), (1, 2, "prefill/0", "decode/1")]


@pytest.mark.parametrize(
    ("prefill", "decode", "sender", "receiver", "mishap", "piece"),
    [(*pair, "fail", 7) for pair in PAIRS] + [(*PAIRS[0], *m) for m in (("corrupt", 0), ("lose", 9), ("drop", 3))],
)
def test_a_mishap_between_two_ranks_fails_the_attempt_and_the_next_one_succeeds(
    request_for_faults: GenerationRequest,
    expected: dict[str, list[int]],
    prefill: int,
    decode: int,
    sender: str,
    receiver: str,
    mishap: str,
    piece: int,
) -> None:
    network, request = Network(stall_s=0.3), request_for_faults
    network.faults[sender, receiver] = faults = Faults()
    getattr(faults, mishap)(piece)
    with Road(prefill, decode, network) as road:
        road.open(request)
        assert isinstance(road.failure(request.request_id), (TransferFailed, ReplicaLost))
        now = road.prefill.worker.snapshot()
        assert now.free_blocks == now.total_blocks
        network.part(sender, receiver)
        next_attempt_succeeds(road, request, expected)


@pytest.mark.parametrize(("prefill", "decode", "sender", "receiver"), PAIRS)
def test_nothing_is_decoded_before_the_last_rank_has_its_last_piece(
    request_for_faults: GenerationRequest,
    expected: dict[str, list[int]],
    prefill: int,
    decode: int,
    sender: str,
    receiver: str,
) -> None:
    network, request = Network(), request_for_faults
    network.faults[sender, receiver] = faults = Held(5)
    with Road(prefill, decode, network) as road:
        road.open(request)
        while not road.prefill.outcomes.tokens.get(request.request_id):
            road.prefill.outcomes.drain(PATIENCE_S)
        road.decode.outcomes.drain()
        assert road.decode.outcomes.tokens[request.request_id] == [-1]
        assert road.decode.worker.snapshot().num_leases == 1
        assert faults.came.wait(PATIENCE_S)
        faults.release()
        road.decode.outcomes.wait_for([request.request_id], PATIENCE_S)
        assert road.said(request.request_id) == expected[request.request_id]


@pytest.mark.parametrize(("prefill", "decode", "sender", "receiver"), PAIRS)
def test_a_late_piece_of_a_lost_attempt_is_refused(
    request_for_faults: GenerationRequest,
    expected: dict[str, list[int]],
    prefill: int,
    decode: int,
    sender: str,
    receiver: str,
) -> None:
    """It arrives while the next attempt decodes in the very same blocks."""
    network, request = Network(stall_s=0.3), request_for_faults
    network.faults[sender, receiver] = faults = Held(5)
    with Road(prefill, decode, network) as road:
        road.open(request)
        road.failure(request.request_id)
        network.part(sender, receiver)
        road.decode.outcomes.tokens[request.request_id] = [-1]
        road.decode.worker.open_decode(request, 1)
        road.prefill.open_prefill(request, 1, road.decode)
        faults.release()
        road.decode.outcomes.wait_for([request.request_id], PATIENCE_S)
        road.prefill.outcomes.drain()
        assert road.said(request.request_id) == expected[request.request_id]


class Held(Faults):
    """A certain piece is held up until it is released."""

    def __init__(self, piece: int) -> None:
        super().__init__()
        self.came = threading.Event()
        self.release = self.hold(piece)
        keep = self._mishaps[piece]

        def tell(payload: Payload, receive: Callable[[Payload], Future[Message]]) -> Future[Message]:
            delivery = keep(payload, receive)
            self.came.set()
            return delivery

        self._mishaps[piece] = tell


class Death(Faults):
    """At a certain piece a rank's door closes for ever."""

    def __init__(self, piece: int, close: Callable[[], None]) -> None:
        super().__init__()

        def die(payload: Payload, receive: Callable[[Payload], Future[Message]]) -> Future[Message]:
            close()
            return receive(payload)

        self._mishaps[piece] = die


def test_when_a_receiving_rank_dies_its_leader_gives_the_gang_up(request_for_faults: GenerationRequest) -> None:
    network, request = Network(), request_for_faults
    network.faults["prefill/1", "decode/1"] = Death(4, lambda: network.receivers["decode/1"].close())
    with Road(2, 2, network) as road:
        road.is_one_dead = True
        road.open(request)
        assert isinstance(road.failure(request.request_id), (TransferFailed, ReplicaLost))
        now = road.prefill.worker.snapshot()
        assert now.free_blocks == now.total_blocks
        assert road.decode.worker.abort(request.request_id)
        wait_until(road.decode.worker, lambda: road.decode.worker.failure is not None)
        assert "does not answer its leader" in str(road.decode.worker.failure)
        assert road.decode.worker.pool.num_used > 0  # nobody's: the other rank may be writing there
        assert road.decode.worker.check()


def test_when_a_sending_rank_dies_both_sides_have_their_blocks_back(request_for_faults: GenerationRequest) -> None:
    network, request = Network(), request_for_faults
    network.faults["prefill/1", "decode/1"] = Death(4, lambda: network.receivers["prefill/1"].close())
    with Road(2, 2, network) as road:
        road.open(request)
        assert isinstance(road.failure(request.request_id), EngineFailed)  # ours, and not the decode side's
        assert road.decode.worker.abort(request.request_id)


def test_a_rank_that_cannot_reach_its_like_fails_the_attempt_before_any_work(
    request_for_faults: GenerationRequest,
) -> None:
    network, request = Network(), request_for_faults
    with Road(2, 2, network) as road:
        del network.receivers["decode/1"]
        road.open(request)
        assert "decode/1" in str(road.failure(request.request_id))
        assert road.prefill.worker.snapshot().steps == 0
        assert road.decode.worker.abort(request.request_id)


@pytest.mark.parametrize("mishaps", [{"launch": {1: "raise"}}, {"send": {1: "hang"}}, {"init": {0: "raise"}}])
def test_a_way_between_two_gpus_that_breaks_fails_the_attempt(
    request_for_faults: GenerationRequest, expected: dict[str, list[int]], mishaps: dict[str, dict[int, str]]
) -> None:
    quick = Deadlines(join_s=PATIENCE_S, transfer_s=0.5, abort_s=PATIENCE_S, stall_s=PATIENCE_S)
    network, request = Network("nccl", deadlines=quick), request_for_faults
    network.mishaps["prefill/1"] = Mishaps(mishaps)
    with Road(2, 1, network) as road:
        road.open(request)
        assert isinstance(road.failure(request.request_id), (TransferFailed, ReplicaLost))
        now = road.prefill.worker.snapshot()
        assert now.free_blocks == now.total_blocks
        next_attempt_succeeds(road, request, expected)
