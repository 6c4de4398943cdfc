"""The actor that computes for a prefill, decode or mixed replica: one `Worker`, its transports, and its outcomes.

Calls return at once; tokens go out through `poll`. What a replica does is decided by what it is asked: a prompt with a
destination is handed over, one without is answered here, and `open_decode` waits for KV.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from ernie_cluster.actors import process
from ernie_cluster.actors.channels import Channels, Receivers, open_gpu, open_nixl, receive
from ernie_cluster.actors.direct import DirectServer, Method
from ernie_cluster.actors.duty import Duty
from ernie_cluster.actors.engine_load import load_of
from ernie_cluster.actors.events import EventHub
from ernie_cluster.actors.messages import Batch, Load, Meeting, Outcome, RankArgs, Ready
from ernie_cluster.actors.notice import Notice
from ernie_cluster.actors.parting import HEARD_S, Parting
from ernie_cluster.actors.telling import Teller
from ernie_cluster.actors.upkeep import Upkeep
from ernie_cluster.actors.visits import Pollers
from ernie_cluster.config.experts import LayerExperts
from ernie_cluster.config.pool import Role
from ernie_cluster.faults import FaultOrder, Faults, FaultState
from ernie_cluster.request import GenerationRequest
from ernie_cluster.transport.base import Channel, Message
from ernie_cluster.transport.choose import Endpoint

if TYPE_CHECKING:  # torch, which the conductor need not import
    from ernie_cluster.engine.handover import Peers

_FLUSH_S = 1.0
_IDLE_PAUSE_S = 0.02
_MEETING_TIMEOUT_S = 300.0


@ray.remote(num_cpus=0, max_restarts=0)
class EngineRank:
    """The first rank of a tensor-parallel group, which leads it; the only one where there are no others."""

    def __init__(self, args: RankArgs) -> None:
        process.share_interpreter()
        process.log_lines()
        self._args, self._duty = args, Duty(args)
        self._faults = Faults.of(args.config.faults, args.role, args.actor_name)
        self._parting = Parting(self._duty, lambda: self._worker.part(), lambda: self._worker.stay())
        self._hub: EventHub | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._store: Any = None
        self._opening: set[str] = set()
        """Prompts whose way to a decode replica is being made."""

    async def meet(self) -> Meeting:
        """Where the ranks of the gang find each other; asked of its rank 0."""
        from ernie_cluster.model.group import open_store  # torch, which the conductor need not import

        host = ray.util.get_node_ip_address()
        self._store = open_store(host, _MEETING_TIMEOUT_S)
        return host, self._store.port

    async def load(self, meeting: Meeting | None) -> None:
        """Join the gang if there is one, load, and begin to work; raises as `load_runner` does."""
        start = time.perf_counter()
        from ernie_cluster.actors.load_worker import join_gang, load_worker

        args, transport = self._args, self._args.config.transport
        nixl = open_nixl(transport)  # before anything is loaded, for it may not be there
        place = join_gang(args, self._store or meeting)
        self._worker = load_worker(args, place, self._publish)
        gpu = open_gpu(self._worker.inbox, self._worker.engine.runner.device, transport)
        self._receivers = Receivers(self._worker.inbox, args.actor_name, transport, gpu, nixl, self._faults)
        self._endpoint = self._receivers.endpoint
        self._channels = self._receivers.channels()
        self._orders = Channels(self._endpoint, transport.kind)
        teller = Teller(self._now, self._worker.cached, args.config.router)
        calls = (
            self.open_prefill, self.open_decode, self.lend, self.abort, self.poll, teller.tell, self.become, self.drain,
        )  # fmt: skip
        methods: Mapping[str, Method] = {call.__name__: call for call in calls}
        methods = methods if self._faults is None else self._faults.guard("replica", methods)
        self._server = DirectServer(methods, Pollers(methods, lambda client_id: self._events().left(client_id)).visit)
        self._worker.warm_up()
        if self._faults is not None:
            self._worker.engine.before_run = self._before_run
        process.started()
        self._worker.start()
        self._load_s = time.perf_counter() - start

    async def lead(self, others: Sequence[Endpoint]) -> None:
        """Other ranks hold KV heads too, and can be reached there: hand-overs concern them from now on."""
        self._endpoint = dataclasses.replace(self._endpoint, others=tuple(others))
        ways = [other.without_gpu("orders of a leader need none") for other in others]
        self._worker.lead([await self._orders.reach(way) for way in ways])

    async def ready(self) -> Ready:
        """Answers once the weights are loaded."""
        self._events()
        self._notice = Notice(self._given_notice)
        address = await self._server.start(ray.util.get_node_ip_address())
        node_id = ray.get_runtime_context().get_node_id()
        return Ready(address, self._endpoint, node_id, os.getpid(), self._load_s)

    async def open_prefill(
        self,
        client_id: str,
        request: GenerationRequest,
        epoch: int,
        destination: Endpoint | None,
        prefix_s: float = 0.0,
    ) -> None:
        """See `Worker.open_prefill`; outcomes go to `client_id`."""
        self._events().open(client_id, request.request_id)
        self._opening.add(request.request_id)
        try:
            way = (None,) if destination is None else await self._reach(destination)
            if self._events().is_open(request.request_id):  # not aborted while the channel was made
                self._worker.open_prefill(request, epoch, *way, prefix_s=prefix_s)
        except BaseException:
            self._events().close(request.request_id)
            raise
        finally:
            self._opening.discard(request.request_id)

    async def open_decode(self, client_id: str, request: GenerationRequest, epoch: int) -> None:
        """See `Worker.open_decode`; outcomes go to `client_id`."""
        self._events().open(client_id, request.request_id)
        try:
            self._worker.open_decode(request, epoch)
        except BaseException:
            self._events().close(request.request_id)
            raise

    async def lend(
        self, request: GenerationRequest, epoch: int, num_blocks: int, destination: Endpoint, within_s: float = math.inf
    ) -> None:
        """See `Worker.lend`; raises ReplicaError when the destination cannot be reached."""
        self._worker.lend(request, epoch, num_blocks, *await self._reach(destination), within_s)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests without an outcome; unknown ones are over already."""
        for request_id in request_ids:
            self._events().close(request_id)
            self._worker.abort(request_id)

    async def poll(self, client_id: str, acknowledged: int) -> Batch:
        """See `EventHub.poll`."""
        return await self._events().poll(client_id, acknowledged)

    async def become(self, role: Role) -> None:
        """See `Duty.become`."""
        self._duty.become(role)

    async def drain(self, is_draining: bool, within_s: float | None = None) -> None:
        """See `Parting.drain`."""
        self._parting.drain(is_draining, within_s)

    async def leave(self, within_s: float) -> None:
        """See `Parting.leave`."""
        self._parting.leave(within_s)

    async def deliver(self, message: Message, refs: list[Any]) -> Message:
        """A piece or control message that came through the object store."""
        return await receive(self._receivers, message, refs)

    async def snapshot(self) -> Load:
        """Load now; raises EngineFailed when the engine has stopped or hangs, so that the replica is replaced."""
        return self._now()

    def _now(self) -> Load:
        self._worker.look_after()
        token_bytes = self._worker.layout.bytes_per_token
        return load_of(self._worker.snapshot(), self._duty, token_bytes, len(self._opening))

    async def faults(self, order: FaultOrder) -> list[FaultState]:
        """See `Faults.obey`."""
        return [] if self._faults is None else self._faults.obey(order)

    def _before_run(self, is_prefill: bool) -> None:
        assert self._faults is not None
        self._faults.meet("prefill.step" if is_prefill else "decode.step")

    async def experts(self) -> list[LayerExperts]:
        """Use and place of every expert."""
        return self._worker.experts()

    async def check(self) -> bool:
        """Invariants of the block pool and the books; raises AssertionError."""
        return self._worker.check()

    async def stop(self) -> None:
        """Give transports and thread back, once clients have what was told them."""
        await self._events().flushed(_FLUSH_S)
        await self._server.close()
        await asyncio.to_thread(self._worker.stop)
        await asyncio.to_thread(self._channels.close)
        await asyncio.to_thread(self._orders.close)
        await asyncio.to_thread(self._receivers.close)

    async def _reach(self, destination: Endpoint) -> tuple[Channel, Peers]:
        """The ways to a replica: to the rank that leads, and to those others that KV goes to from here."""
        from ernie_cluster.engine.handover import Peers

        ranks = destination.ranks
        targets = self._worker.sender.targets(len(ranks))
        channel, *others = await asyncio.gather(*(self._channels.reach(ranks[i]) for i in (0, *targets)))
        return channel, Peers(ranks, dict(zip(targets, others, strict=True)))

    def _events(self) -> EventHub:
        """Made on the actor's own loop, which does not run yet in the constructor."""
        if self._hub is None:
            self._hub = EventHub(time.monotonic, self._args.config.router.sign_of_life_s)
            self._upkeep = asyncio.ensure_future(Upkeep(self._hub, self._worker, self._opening).run())
        return self._hub

    def _publish(self, outcomes: list[Outcome]) -> None:
        assert self._hub is not None, "a request came before the first call"
        self._hub.publish(outcomes)

    async def _given_notice(self) -> None:
        """This process is to end soon: its streams go elsewhere at once, whatever they have left."""
        self._parting.leave(HEARD_S)
        async with asyncio.timeout(self._args.config.router.notice_s):
            await asyncio.sleep(HEARD_S)
            while not self._now().is_idle:  # noqa: ASYNC110  transports say so
                await asyncio.sleep(_IDLE_PAUSE_S)
            await self._events().flushed(_FLUSH_S)
            while self._args.shard.dims.dp > 1 and self._worker.is_working:  # noqa: ASYNC110  the other groups need its steps
                await asyncio.sleep(_IDLE_PAUSE_S)
