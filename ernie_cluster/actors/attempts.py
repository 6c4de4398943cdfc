"""One attempt at a request: a path of replicas, opened at once on all of them, one stream of events, everything given back.

Each stage starts when the one behind it has confirmed its place. Knows nothing of the attempts
before and after it but the replicas that they lost.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Collection, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.actors import background
from ernie_cluster.actors.errands import Errand
from ernie_cluster.actors.links import Line, Link, failure_of, translate
from ernie_cluster.actors.mailbox import Mailbox
from ernie_cluster.actors.merge import AttemptFailed, Cast, Failure, News, merge
from ernie_cluster.actors.messages import EncodeTask, Ended, ReplicaInfo, Route
from ernie_cluster.actors.patience import answered
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.errors import ReplicaDraining, ReplicaLost
from ernie_cluster.observe.metrics import Metrics
from ernie_cluster.policy.demand import demand_of, demand_of_picture, demand_of_pictures
from ernie_cluster.policy.hedging import hedge_after_s
from ernie_cluster.policy.routing import EncoderShare
from ernie_cluster.policy.snapshot import Demand
from ernie_cluster.policy.waiting import patience_s
from ernie_cluster.request import GenerationRequest, MediaInput, Span, TokenEvent

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 10.0
"""Longest wait for the router, which may be starting again, and for clean-up calls."""
_ROUTER_PAUSE_S = 0.2
"""Before a router that is gone is looked for again."""


class Attempts:
    """Owns the links to replicas, and the calls that clean up after attempts.

    Args:
        config: the application.
        router: books paths; closed by the caller.
        metrics: takes what was decided.
        client_id: of this API replica.
    """

    def __init__(self, config: ClusterConfig, router: Line, metrics: Metrics, client_id: str) -> None:
        self._config, self._router, self._metrics, self._client_id = config, router, metrics, client_id
        self._links: dict[str, Link] = {}
        self._background: set[asyncio.Future[Any]] = set()

    async def close(self) -> None:
        """Wait for the clean-up, as long as it may take, and part from all replicas."""
        if self._background:
            await asyncio.wait(self._background, timeout=_CALL_TIMEOUT_S)
        for link in self._links.values():
            await link.close()
        self._links.clear()

    async def generate(
        self, request: GenerationRequest, epoch: int, lost: set[str], spans: list[Span], accepted_s: float
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Answer a request, over one path.

        Args:
            request: under the name of this attempt, with the tokens that its client has.
            epoch: number of the attempt.
            lost: replicas that are not to be met again; one that fails is added.
            spans: the timeline, which is added to.
            accepted_s: monotonic time at which the request came.

        Raises:
            Overloaded, ReplicaError: of our tree, as engines and router told.
        """
        key, start, first = request.request_id, time.time(), len(request.output_token_ids)
        queue = Mailbox(first)
        links: list[Link] = []
        errands: list[asyncio.Task[None]] = []
        to_abort: list[Link] = []
        served: list[str] = []
        try:
            route = await self._acquire(request, lost)
            queue.routed()
            self._note_route(route, request.model, start, spans)
            try:
                links += map(self._link, route.engines)
                to_abort = links
                for link in links:
                    link.subscribe(key, queue)
                opens = self._open(route, request, epoch, queue)
                self._in_background(self._tell_opened(opens, key, route))
                errands += self._encode(route, request, epoch, lost, served, queue)
                cast = Cast(route.prefill.replica_id, None if route.decode is None else route.decode.replica_id)
                async with aclosing(merge(queue, first, spans, request.timeout_s, cast)) as answer:
                    async for events in answer:
                        if events[-1].finish_reason is not None:
                            # it has left its engines by itself; but where its first token was its last, a decode
                            # lease waits for KV that will never come
                            to_abort = links[-1:] if events[-1].index == first else []
                            served += (link.info.replica_id for link in links)
                        yield events
            except AttemptFailed as e:
                self._blame(e.failure, request.model, route.links, lost)
                raise e.failure.error from None
        finally:
            for link in links:
                link.unsubscribe(key)
            for errand in errands:
                errand.cancel()
            ended = dataclasses.replace(queue.ended(key, accepted_s if epoch == 0 else None), served=tuple(served))
            self._in_background(self._end(request.model, ended, to_abort))

    def _note_route(self, route: Route, model: str, start_s: float, spans: list[Span]) -> None:
        """Into the timeline and the metrics: what was decided, and why."""
        took_s, path = time.time() - start_s, route.path
        detail = (("why", "; ".join(path.reasons)), ("expected_ttft_s", round(path.ttft_s, 6)))
        spans.append(Span("route", start_s, took_s, detail))
        self._metrics.observe("ernie_route_seconds", took_s, model=model)
        for stage, why in path.kinds:
            self._metrics.inc("ernie_route_choices_total", model=model, stage=stage, why=why)

    async def embed(self, key: str, model: str, media: MediaInput, lost: set[str]) -> NDArray[np.float32]:
        """The vector of a picture; `lost` and errors as of `generate`."""
        links: list[Link] = []
        served: tuple[str, ...] = ()
        try:
            info: ReplicaInfo = await self._booked("acquire_encoder", key, demand_of_picture(model, media), lost=lost)
            links.append(self._link(info))
            links[0].subscribe(key, None)
            try:
                vector: NDArray[np.float32] = await links[0].work("embed", key, media)
            except Exception as e:
                failure = failure_of(e, info.replica_id)
                self._blame(failure, model, {}, lost)
                raise failure.error from None
            served = (info.replica_id,)
            return vector
        finally:
            for link in links:
                link.unsubscribe(key)
            self._in_background(self._end(model, Ended(key, served=served), links))

    async def _acquire(self, request: GenerationRequest, lost: set[str]) -> Route:
        """Ask the router for a path."""
        demand = demand_of(request, self._config.model(request.model).engine)
        route: Route = await self._booked("acquire", request.request_id, demand, lost=lost)
        return route

    async def _booked(self, method: str, key: str, demand: Demand, *, lost: Collection[str]) -> Any:
        """Let the router book something; one that has died is started again and asked again."""
        deadline = (
            time.monotonic()
            + _CALL_TIMEOUT_S
            + patience_s(demand, self._config.router, self._config.wake_up_s(demand.model))
        )
        while True:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await self._router.call(
                        method, key, demand, sorted(lost), self._config.router.lease_timeout_s
                    )
            except Exception as e:
                error = translate(e, "the router")
                if not isinstance(error, ReplicaLost) or time.monotonic() + _ROUTER_PAUSE_S > deadline:
                    raise error from None
            await asyncio.sleep(_ROUTER_PAUSE_S)

    def _link(self, info: ReplicaInfo) -> Link:
        """The link to a replica, made when the two first meet."""
        for link in [link for link in self._links.values() if link.is_lost]:
            del self._links[link.info.replica_id]
            self._in_background(link.close())  # one that hangs has heard all that it is to hear, once it goes on
        if info.replica_id not in self._links:
            timeout_s = self._config.router.heartbeat_timeout_s
            self._links[info.replica_id] = Link(info, self._client_id, timeout_s)
        return self._links[info.replica_id]

    def _open(
        self, route: Route, request: GenerationRequest, epoch: int, queue: asyncio.Queue[News]
    ) -> list[asyncio.Task[None]]:
        """Ask the engines of the route at once. They get the request without its patches."""
        me, limits = self._client_id, self._config.router
        plain = dataclasses.replace(request, media=tuple(dataclasses.replace(m, patches=None) for m in request.media))
        destination, fetch = route.decode.endpoint if route.decode else None, route.path.fetch
        prefix_s = fetch.timeout_s if fetch and route.source else 0.0
        calls: list[
            tuple[ReplicaInfo, float, tuple[Any, ...]]
        ] = [  # which may first have to reach a new decode replica
            (route.prefill, limits.lease_timeout_s, ("open_prefill", me, plain, epoch, destination, prefix_s))
        ]
        if route.decode is not None:  # first, for prefill waits for its lease
            calls.insert(0, (route.decode, limits.heartbeat_timeout_s, ("open_decode", me, plain, epoch)))
        if fetch is not None and route.source is not None:
            lend = self._link(route.source).call(
                "lend", plain, epoch, fetch.num_blocks, route.prefill.endpoint, fetch.timeout_s
            )
            self._in_background(lend)
        return [
            background.start(self._watch(self._links[info.replica_id], timeout_s, call, queue))
            for info, timeout_s, call in calls
        ]

    @staticmethod
    async def _watch(link: Link, timeout_s: float, call: tuple[Any, ...], queue: asyncio.Queue[News]) -> None:
        """Put into the queue that a call has failed, or is not answered."""
        try:
            await answered(link.call(*call), timeout_s)
        except Exception as e:
            queue.put_nowait(failure_of(e, link.info.replica_id))

    def _encode(
        self,
        route: Route,
        request: GenerationRequest,
        epoch: int,
        lost: set[str],
        served: list[str],
        queue: asyncio.Queue[News],
    ) -> list[asyncio.Task[None]]:
        """Have the pictures encoded by the replicas of the route, or by others where these are late or fail."""
        key, model = request.request_id, request.model

        async def run(share: EncoderShare, info: ReplicaInfo) -> None:
            task = EncodeTask(key, epoch, {i: request.media[i] for i in share.media}, route.prefill.endpoint)
            booking = f"{key}+{info.replica_id}"

            async def another() -> Link:
                demand = demand_of_pictures(model, list(task.media.values()))
                avoid = lost.union(encoder.replica_id for encoder in route.encoders)
                found = await self._booked("acquire_encoder", booking, demand, lost=avoid)
                self._metrics.inc("ernie_encode_hedges_total", model=model)
                return self._link(found)

            errand = Errand(task, self._link(info), self._in_background)
            try:
                done = await errand.run(hedge_after_s(share.wait_s, self._config.router), another)
            finally:
                if errand.is_hedged:
                    self._in_background(self._end(model, Ended(booking), ()))
            if done is None:
                queue.put_nowait(errand.failures[0])
                return
            served.append(done[0])
            queue.put_nowait(done[1])
            for failure in errand.failures:
                self._blame(failure, model, route.links, lost)

        pairs = zip(route.path.encoders, route.encoders, strict=True)
        return [background.start(run(share, info)) for share, info in pairs]

    def _blame(self, failure: Failure, model: str, links: Mapping[str, str], lost: set[str]) -> None:
        """Note the replica that this request had better not meet again."""
        culprit = failure.culprit(links)
        if culprit is not None:
            lost.add(culprit)
            if not isinstance(failure.error, ReplicaDraining):  # which others may fetch prefixes from
                self._in_background(self._tell_lost(culprit, model))

    # ---- afterwards

    async def _tell_opened(self, opens: Sequence[asyncio.Task[None]], key: str, route: Route) -> None:
        """Tell the router when engines hold what it booked; their next snapshots show it."""
        await asyncio.wait(opens)
        await self._router.call("opened", key, [info.replica_id for info in route.engines])

    async def _tell_lost(self, replica_id: str, model: str) -> None:
        if await self._router.call("lost", replica_id):
            self._metrics.inc("ernie_breaker_openings_total", model=model)

    async def _end(self, model: str, ended: Ended, links: Sequence[Link]) -> None:
        """Give everything back, on all replicas side by side; one that is dead must not stand in the others' way."""
        aborts = (link.call("abort", [ended.key]) for link in links)
        await asyncio.gather(self._router.call("release", model, [ended]), *aborts, return_exceptions=True)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        async def quietly() -> None:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    await work
            except Exception as e:
                log.info("a clean-up call failed: %s", e)

        task = background.start(quietly())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
