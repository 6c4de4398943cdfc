"""The API's `Backend` over the cluster: router -> vision, prefill and decode, side by side -> one stream of events.

One attempt opens the request on every replica of its path at once; each stage starts when the one behind it has
confirmed its place. When a replica fails, the request goes on elsewhere from the tokens that the client has: a request
is a value, so the continuation is the same text.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from ernie_cluster.actors.links import Link, translate
from ernie_cluster.actors.messages import EncodeReport, EncodeTask, Outcome, ReplicaInfo, Route
from ernie_cluster.actors.router import find_router
from ernie_cluster.api.backend import ModelStatus
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.errors import DeadlineExceeded, Overloaded, ReplicaError
from ernie_cluster.policy.snapshot import Demand
from ernie_cluster.request import GenerationRequest, RequestFailed, Span, TokenEvent

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
"""Longest wait for the router."""


class ClusterBackend:
    """Implements `api.backend.Backend`; lives on the API replica's event loop."""

    def __init__(self, app: str, config: ClusterConfig) -> None:
        self._app, self._config = app, config
        self._client_id = uuid.uuid4().hex
        self._router = find_router(app, config)
        self._links: dict[str, Link] = {}
        self._background: set[asyncio.Future[Any]] = set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """See `Backend`."""
        deadline = time.monotonic() + request.timeout_s
        failed: list[str] = []
        tokens = list(request.output_token_ids)
        for attempt in range(self._config.router.max_attempts):
            is_last = attempt + 1 == self._config.router.max_attempts
            now = dataclasses.replace(request, output_token_ids=tuple(tokens), timeout_s=deadline - time.monotonic())
            try:
                async with aclosing(self._attempt(now, attempt, failed)) as answer:
                    async for events in answer:
                        for event in events:
                            tokens.extend(event.token_ids)
                        yield events
                return
            except ReplicaError as e:
                log.warning("%s: attempt %d failed after %d tokens: %s", request.request_id, attempt, len(tokens), e)
                if is_last:
                    raise

    async def status(self) -> list[ModelStatus]:
        """See `Backend`."""
        try:
            status: list[ModelStatus] = await asyncio.wait_for(self._router.status.remote(), 1.0)
        except Exception as e:
            return [ModelStatus(m.name, False, f"the router does not answer: {e}") for m in self._config.models]
        return status

    async def close(self) -> None:
        """See `Backend`."""
        for link in self._links.values():
            await link.close()
        self._links.clear()

    # ---- one attempt

    async def _attempt(
        self, request: GenerationRequest, attempt: int, failed: list[str]
    ) -> AsyncGenerator[list[TokenEvent], None]:
        key = f"{request.request_id}#{attempt}"
        start = time.time()
        route = await self._acquire(key, request, failed)
        spans = [Span("route", start, time.time() - start, (("why", "; ".join(route.path.reasons)),))]
        queue: asyncio.Queue[Outcome | EncodeReport] = asyncio.Queue()
        links: list[Link] = []
        opens: list[asyncio.Task[None]] = []
        to_abort: tuple[ReplicaInfo | None, ...] = route.replicas
        try:
            links = [self._link(info) for info in route.replicas]
            for link in links:
                link.subscribe(request.request_id, queue)  # type: ignore[arg-type]
            opens = [
                asyncio.ensure_future(self._watch_open(c, info, request.request_id, queue, failed))
                for info, c in self._calls(route, request, attempt, queue)
            ]
            self._after_opens(opens, key, route)
            first = len(request.output_token_ids)
            async with aclosing(self._merge(queue, first, spans, request.timeout_s)) as answer:
                async for events in answer:
                    if events[-1].finish_reason is not None:
                        to_abort = (route.decode,) if events[-1].index == first else ()
                    yield events
        finally:
            for link in links:
                link.unsubscribe(request.request_id)
            self._end(to_abort, key, request.request_id)

    async def _acquire(self, key: str, request: GenerationRequest, failed: list[str]) -> Route:
        demand = Demand(
            model=request.model,
            num_prompt_tokens=request.num_prompt_tokens + len(request.output_token_ids),
            max_tokens=max(1, request.sampling.max_tokens - len(request.output_token_ids)),
            num_media=len(request.media),
            media_tokens=sum(m.num_tokens for m in request.media),
        )
        try:
            call = self._router.acquire.remote(key, demand, failed, self._config.router.lease_timeout_s)
            route: Route = await asyncio.wait_for(call, _CALL_TIMEOUT_S)
        except Exception as e:
            error = translate(e, "the router")
            if isinstance(error, ReplicaError):
                self._router = find_router(self._app, self._config)
            raise error from None
        return route

    def _calls(
        self, route: Route, request: GenerationRequest, attempt: int, queue: asyncio.Queue[Any]
    ) -> list[tuple[ReplicaInfo, Coroutine[Any, Any, None]]]:
        """What to ask of each replica; all at once. Engines get the request without its patches."""
        plain = dataclasses.replace(request, media=tuple(dataclasses.replace(m, patches=None) for m in request.media))
        me = self._client_id
        destination = route.decode.endpoint if route.decode else None
        prefill = self._links[route.prefill.replica_id].actor.open_prefill

        async def open_prefill() -> None:
            await prefill.remote(me, plain, attempt, destination)

        calls = [(route.prefill, open_prefill())]
        if route.decode is not None:
            decode = self._links[route.decode.replica_id].actor.open_decode

            async def open_decode() -> None:
                await decode.remote(me, plain, attempt)

            calls.insert(0, (route.decode, open_decode()))
        if route.encoder is not None:
            encode = self._links[route.encoder.replica_id].actor.encode
            task = EncodeTask(request.request_id, attempt, request.media, route.prefill.endpoint)

            async def run_encode() -> None:
                queue.put_nowait(await encode.remote(task))

            calls.append((route.encoder, run_encode()))
        return calls

    async def _watch_open(
        self,
        call: Coroutine[Any, Any, None],
        info: ReplicaInfo,
        request_id: str,
        queue: asyncio.Queue[Any],
        failed: list[str],
    ) -> None:
        """Turn a failed call into the request's failure."""
        try:
            await call
        except Exception as e:
            error = translate(e, info.replica_id)
            if not isinstance(error, Overloaded):
                failed.append(info.replica_id)
            queue.put_nowait(RequestFailed(request_id, error))

    async def _merge(
        self, queue: asyncio.Queue[Any], next_index: int, spans: list[Span], timeout_s: float
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Events of all replicas in the order of their indices; a failure raises, once what came before it is out."""
        early: dict[int, TokenEvent] = {}
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                item = await asyncio.wait_for(queue.get(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
            items = [item]
            while not queue.empty():
                items.append(queue.get_nowait())
            failure: Exception | None = None
            for item in items:
                if isinstance(item, RequestFailed):
                    failure = failure or item.error
                elif isinstance(item, EncodeReport):
                    spans.extend(item.spans)
                else:
                    spans.extend(item.spans)
                    early[item.index] = item
            ready: list[TokenEvent] = []
            while next_index in early:
                event = early.pop(next_index)
                next_index += len(event.token_ids)
                is_last = event.finish_reason is not None
                ready.append(dataclasses.replace(event, spans=in_order(spans) if is_last else ()))
            if ready:
                yield ready
                if ready[-1].finish_reason is not None:
                    return
            if failure is not None:
                raise failure

    def _link(self, info: ReplicaInfo) -> Link:
        link = self._links.get(info.replica_id)
        if link is None or link.is_lost or link.info != info:
            link = self._links[info.replica_id] = Link(info, self._client_id)
        return link

    def _after_opens(self, opens: list[asyncio.Task[None]], key: str, route: Route) -> None:
        """Tell the router when engines hold what it booked; their next snapshots show it."""

        async def tell() -> None:
            await asyncio.wait(opens[: 1 if route.decode is None else 2])
            engines = [r.replica_id for r in route.replicas if r.role != "vision"]
            await self._router.opened.remote(key, engines)

        self._in_background(tell())

    def _end(self, to_abort: tuple[ReplicaInfo | None, ...], key: str, request_id: str) -> None:
        """Give everything back. A finished request has left its engines by itself; only where its first token was its
        last does a decode lease wait for KV that will never come."""

        async def tell() -> None:
            await self._router.release.remote([key])
            for info in to_abort:
                link = self._links.get(info.replica_id) if info else None
                if link is not None and not link.is_lost:
                    await link.actor.abort.remote([request_id])

        self._in_background(tell())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        async def quietly() -> None:
            try:
                await asyncio.wait_for(work, _CALL_TIMEOUT_S)
            except Exception as e:
                log.info("clean-up call failed, leases will run out by themselves: %s", e)

        task = asyncio.ensure_future(quietly())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def in_order(spans: list[Span]) -> tuple[Span, ...]:
    return tuple(sorted(spans, key=lambda s: s.start_s))
