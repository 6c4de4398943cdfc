"""The API's `Backend` over the cluster: router -> vision, prefill and decode, side by side -> one stream of events.

One attempt opens the request on every replica of its path at once; each stage starts when the one behind it has
confirmed its place. When a replica fails, the request goes on elsewhere from the tokens that the client has: a request
is a value, so the continuation is the same text. Engines know an attempt by a name of its own, `<request>#<number>`,
so that nothing late of one attempt can be taken for news of the next.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.actors import background
from ernie_cluster.actors.links import Link, failure_of, router_line, translate
from ernie_cluster.actors.merge import AttemptFailed, Failure, News, merge
from ernie_cluster.actors.messages import EncodeTask, ReplicaInfo, Route
from ernie_cluster.api.backend import ModelStatus, ReplicaExperts, ReplicaLoad
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.errors import DeadlineExceeded, Overloaded, ReplicaError, ReplicaLost
from ernie_cluster.observe.metrics import Metrics
from ernie_cluster.policy.demand import demand_of, demand_of_picture
from ernie_cluster.policy.snapshot import Demand
from ernie_cluster.policy.waiting import patience_s
from ernie_cluster.request import GenerationRequest, MediaInput, Span, TokenEvent

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 10.0
"""Longest wait for the router, which may be starting again, and for clean-up calls."""
_STATUS_TIMEOUT_S = 1.0
"""For the router's view of things, which it has at hand."""
_ROUTER_PAUSE_S = 0.2
"""Before a router that is gone is looked for again."""
_RECOVERY_S = 60.0
"""A request that lost a replica waits this long for another one; Serve replaces one in about ten seconds."""


class ClusterBackend:
    """Implements `api.backend.Backend`; lives on the API replica's event loop."""

    def __init__(self, app: str, config: ClusterConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._client_id = uuid.uuid4().hex
        self._router = router_line(app, config)
        self._links: dict[str, Link] = {}
        self._background: set[asyncio.Future[Any]] = set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """See `Backend`."""
        deadline = time.monotonic() + request.timeout_s
        tokens, spans, lost = list(request.output_token_ids), list[Span](), set[str]()
        number = num_failures = 0
        recover_until = 0.0
        while True:
            attempt = dataclasses.replace(
                request,
                request_id=f"{request.request_id}#{number}",
                output_token_ids=tuple(tokens),
                timeout_s=deadline - time.monotonic(),
            )
            try:
                async with aclosing(self._attempt(attempt, number, lost, spans)) as answer:
                    async for events in answer:
                        for event in events:
                            tokens.extend(event.token_ids)
                        yield [dataclasses.replace(e, request_id=request.request_id) for e in events]
                return
            except Overloaded as e:  # refused before it was accepted; or it was, and waits for a place
                if time.monotonic() + e.retry_after_s > min(recover_until, deadline):
                    raise
                await asyncio.sleep(e.retry_after_s)
            except ReplicaError as e:
                num_failures += 1
                log.warning("%s failed after %d tokens: %s", attempt.request_id, len(tokens), e)
                if num_failures == self._config.router.max_attempts:
                    raise
                recover_until = time.monotonic() + _RECOVERY_S
            number += 1

    async def embed(self, model: str, media: MediaInput, timeout_s: float) -> NDArray[np.float32]:
        """See `Backend`."""
        lost = set[str]()
        deadline = time.monotonic() + timeout_s
        number = 0
        while True:
            number += 1
            key = f"embed-{uuid.uuid4().hex}#{number}"
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await self._embed(key, model, media, lost)
            except TimeoutError:
                raise DeadlineExceeded(f"no vector of a picture within {timeout_s:g} s") from None
            except ReplicaError as e:
                log.warning("%s failed: %s", key, e)
                if number == self._config.router.max_attempts:
                    raise

    async def status(self) -> list[ModelStatus]:
        """See `Backend`."""
        try:
            status: list[ModelStatus] = await self._told("status", _STATUS_TIMEOUT_S)
        except Exception as e:  # which may name addresses and paths, and everybody may ask
            log.warning("no status: %s", e)
            return [ModelStatus(m.name, False, "the router does not answer") for m in self._config.models]
        return status

    async def loads(self) -> list[ReplicaLoad]:
        """See `Backend`."""
        loads: list[ReplicaLoad] = await self._told("loads", _STATUS_TIMEOUT_S)
        return loads

    async def experts(self) -> list[ReplicaExperts]:
        """See `Backend`."""
        experts: list[ReplicaExperts] = await self._told("experts", _CALL_TIMEOUT_S)
        return experts

    async def _told(self, what: str, timeout_s: float) -> Any:
        """What the router tells of all replicas; its errors are of our tree."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._router.call(what)
        except Exception as e:
            raise translate(e, "the router") from None

    async def close(self) -> None:
        """See `Backend`."""
        if self._background:
            await asyncio.wait(self._background, timeout=_CALL_TIMEOUT_S)
        for link in self._links.values():
            await link.close()
        self._links.clear()
        await self._router.close()

    # ---- one attempt

    async def _attempt(
        self, request: GenerationRequest, epoch: int, lost: set[str], spans: list[Span]
    ) -> AsyncGenerator[list[TokenEvent], None]:
        key, start = request.request_id, time.time()
        queue: asyncio.Queue[News] = asyncio.Queue()
        links: list[Link] = []
        opens: list[asyncio.Task[None]] = []
        to_abort: list[Link] = []
        try:
            route = await self._acquire(request, lost)
            self._note_route(route, request.model, start, spans)
            try:
                links += map(self._link, route.replicas)
                to_abort = links
                for link in links:
                    link.subscribe(key, queue)
                opens += self._open(route, request, epoch, queue)
                self._in_background(self._tell_opened(opens, key, route))
                first = len(request.output_token_ids)
                async with aclosing(merge(queue, first, spans, request.timeout_s)) as answer:
                    async for events in answer:
                        if events[-1].finish_reason is not None:
                            # it has left its engines by itself; but where its first token was its last, a decode
                            # lease waits for KV that will never come
                            to_abort = links[-1:] if events[-1].index == first else []
                        yield events
            except AttemptFailed as e:
                self._blame(e.failure, route.replicas, lost)
                raise e.failure.error from None
        finally:
            for link in links:
                link.unsubscribe(key)
            self._in_background(self._end(key, to_abort))

    def _note_route(self, route: Route, model: str, start_s: float, spans: list[Span]) -> None:
        """Into the timeline and the metrics: what was decided, and why."""
        took_s, path = time.time() - start_s, route.path
        detail = (("why", "; ".join(path.reasons)), ("expected_ttft_s", round(path.ttft_s, 6)))
        spans.append(Span("route", start_s, took_s, detail))
        self._metrics.observe("ernie_route_seconds", took_s, model=model)
        for stage, why in path.kinds:
            self._metrics.inc("ernie_route_choices_total", model=model, stage=stage, why=why)

    async def _embed(self, key: str, model: str, media: MediaInput, lost: set[str]) -> NDArray[np.float32]:
        links: list[Link] = []
        try:
            info: ReplicaInfo = await self._booked("acquire_encoder", key, demand_of_picture(model, media), lost=lost)
            links.append(self._link(info))
            try:
                vector: NDArray[np.float32] = await links[0].call("embed", key, media)
            except Exception as e:
                failure = failure_of(e, info.replica_id)
                self._blame(failure, [info], lost)
                raise failure.error from None
            return vector
        finally:
            self._in_background(self._end(key, links))

    async def _acquire(self, request: GenerationRequest, lost: set[str]) -> Route:
        """Ask the router for a path."""
        demand = demand_of(request, self._config.model(request.model).engine)
        route: Route = await self._booked("acquire", request.request_id, demand, lost=lost)
        return route

    async def _booked(self, method: str, key: str, demand: Demand, *, lost: set[str]) -> Any:
        """Let the router book something; one that has died is started again and asked again."""
        deadline = time.monotonic() + _CALL_TIMEOUT_S + patience_s(demand, self._config.router)
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
        self._links = {k: link for k, link in self._links.items() if not link.is_lost}
        if info.replica_id not in self._links:
            self._links[info.replica_id] = Link(info, self._client_id)
        return self._links[info.replica_id]

    def _open(
        self, route: Route, request: GenerationRequest, epoch: int, queue: asyncio.Queue[News]
    ) -> list[asyncio.Task[None]]:
        """Ask all replicas of the route at once, engines first. Engines get the request without its patches."""
        me = self._client_id
        plain = dataclasses.replace(request, media=tuple(dataclasses.replace(m, patches=None) for m in request.media))
        destination = route.decode.endpoint if route.decode else None
        calls: list[tuple[ReplicaInfo, tuple[Any, ...]]] = [
            (route.prefill, ("open_prefill", me, plain, epoch, destination))
        ]
        if route.decode is not None:  # first, for prefill waits for its lease
            calls.insert(0, (route.decode, ("open_decode", me, plain, epoch)))
        if route.encoder is not None:
            task = EncodeTask(request.request_id, epoch, request.media, route.prefill.endpoint)
            calls.append((route.encoder, ("encode", task)))
        return [background.start(self._watch(self._links[info.replica_id], call, queue)) for info, call in calls]

    @staticmethod
    async def _watch(link: Link, call: tuple[Any, ...], queue: asyncio.Queue[News]) -> None:
        """Put into the queue what a call brings: its report, or its failure."""
        try:
            report: News | None = await link.call(*call)
        except Exception as e:
            queue.put_nowait(failure_of(e, link.info.replica_id))
        else:
            if report is not None:
                queue.put_nowait(report)

    def _blame(self, failure: Failure, replicas: Sequence[ReplicaInfo], lost: set[str]) -> None:
        """Note the replica that this request had better not meet again."""
        culprit = failure.culprit([info.replica_id for info in replicas])
        if culprit is not None:
            lost.add(culprit)
            self._in_background(self._tell_lost(culprit))

    # ---- afterwards

    async def _tell_opened(self, opens: Sequence[asyncio.Task[None]], key: str, route: Route) -> None:
        """Tell the router when engines hold what it booked; their next snapshots show it."""
        engines = [info.replica_id for info in (route.prefill, route.decode) if info is not None]
        await asyncio.wait(opens[: len(engines)])
        await self._router.call("opened", key, engines)

    async def _tell_lost(self, replica_id: str) -> None:
        await self._router.call("lost", replica_id)

    async def _end(self, key: str, links: Sequence[Link]) -> None:
        """Give everything back, on all replicas side by side; one that is dead must not stand in the others' way."""
        aborts = (link.call("abort", [key]) for link in links)
        await asyncio.gather(self._router.call("release", [key]), *aborts, return_exceptions=True)

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
