"""What operators ask goes to the router, and its refusals come back as themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from ernie_cluster.actors import cluster_backend
from ernie_cluster.actors.cluster_backend import ClusterBackend
from ernie_cluster.actors.direct import DirectPeer, DirectServer, Method
from ernie_cluster.actors.links import Line
from ernie_cluster.api.operator import Order
from ernie_cluster.errors import EngineFailed, OrderRefused, ReplicaError, ReplicaLost, UnknownReplica
from tests.unit.api.clusters import DECISIONS, PREFILL, VIEW

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

ORDER = Order(PREFILL.replica, "role", "decode")


class Asking(ClusterBackend):
    """A backend whose router offers these methods."""

    def __init__(self, server: DirectServer) -> None:
        async def connect() -> DirectPeer:
            return await DirectPeer.connect(await server.start("127.0.0.1"), "the router")

        self._router = Line(connect)


async def asked(methods: Mapping[str, Method], what: str, *args: Any) -> Any:
    server = DirectServer(methods)
    backend = Asking(server)
    try:
        return await getattr(backend, what)(*args)
    finally:
        await backend._router.close()
        await server.close()


async def test_the_routers_answers() -> None:
    async def cluster() -> Any:
        return VIEW

    async def decisions() -> Any:
        return DECISIONS

    async def order(order: Order) -> Any:
        assert order == ORDER
        return PREFILL

    methods: dict[str, Method] = {"cluster": cluster, "decisions": decisions, "order": order}
    assert await asked(methods, "cluster") == VIEW
    assert await asked(methods, "decisions") == DECISIONS
    assert await asked(methods, "order", ORDER) == PREFILL


@pytest.mark.parametrize("error", [UnknownReplica("no replica 'x'; there are: y"), OrderRefused("no such pool")])
async def test_its_refusals_are_the_operators_to_read(error: UnknownReplica | OrderRefused) -> None:
    async def refuse(order: Order) -> Any:
        raise error

    with pytest.raises(type(error)) as caught:
        await asked({"order": refuse}, "order", ORDER)
    assert (caught.value.message, caught.value.code, caught.value.param) == (error.message, error.code, error.param)


async def test_its_faults_are_ours() -> None:
    async def fail() -> Any:
        raise ZeroDivisionError

    with pytest.raises(EngineFailed):
        await asked({"cluster": fail}, "cluster")
    with pytest.raises(ReplicaError):
        await asked({}, "decisions")


async def test_a_router_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def say_nothing() -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(cluster_backend, "_STATUS_TIMEOUT_S", 0.01)
    with pytest.raises(ReplicaLost, match="does not answer"):
        await asked({"cluster": say_nothing}, "cluster")
