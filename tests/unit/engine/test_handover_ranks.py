"""Hand-overs between gangs whose ranks hold their own KV heads: the tokens of one engine, and one end for all mishaps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from types import TracebackType

import pytest

from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import ErnieClusterError, ReplicaLost, TransferFailed
from ernie_cluster.request import GenerationRequest
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
        whole = {**SMALL, **settings}
        self.prefill, self.decode = (
            Gang(role, role, tp or 2, self.network, shares_kv=not tp, **whole)  # type: ignore[arg-type]
            for role, tp in (("prefill", prefill), ("decode", decode))
        )
        self.may_fail = False

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
        first, rest = self.prefill.outcomes.tokens, self.decode.outcomes.tokens
        return {r.request_id: first[r.request_id] + rest[r.request_id][1:] for r in some}

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
        workers = self.prefill.worker, self.decode.worker
        if kind is None:
            for worker in workers:
                assert worker.failure is None
                wait_until(worker, lambda worker=worker: worker.pool.num_used == 0)  # type: ignore[misc]
                assert worker.check()
            assert all(follower.is_idle for follower in self.decode.followers.values())
        for gang in (self.prefill, self.decode):
            gang.stop()
        self.network.close()


def wait_until(worker: Worker, holds: Callable[[], bool]) -> None:
    """Until something holds of a worker that changes with its lock held."""
    with worker.engine.lock:
        assert worker.engine.lock.wait_for(holds, PATIENCE_S)


@pytest.mark.parametrize(
    ("prefill", "decode", "kind"),
    [
        (2, 1, "local"),
        (1, 2, "local"),
        (2, 2, "local"),
        (0, 2, "local"),
        (2, 0, "local"),
        (2, 1, "shared_memory"),
        (1, 2, "shared_memory"),
        (2, 1, "nccl"),
        (1, 2, "nccl"),
        (2, 2, "ipc"),
    ],
)
def test_gangs_of_any_sizes_say_what_one_rank_says(
    expected: dict[str, list[int]], prefill: int, decode: int, kind: str
) -> None:
    with Road(prefill, decode, Network(kind)) as road:
        assert road.run(requests()) == expected
