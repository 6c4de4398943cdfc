"""The API's `Backend` over the cluster: router -> vision, prefill and decode, side by side -> one stream of events.

When a replica fails, the request goes on elsewhere from the tokens that the client has: a request is a value, so the
continuation is the same text. Engines know an attempt by a name of its own, `<request>#<number>`, so that nothing late
of one attempt can be taken for news of the next. What one attempt does is in `attempts`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.actors.attempts import Attempts
from ernie_cluster.actors.fault_desk import view_of
from ernie_cluster.actors.links import router_line, translate
from ernie_cluster.api.backend import ModelStatus, ReplicaExperts, ReplicaLoad
from ernie_cluster.api.operator import ClusterView, DecisionView, FaultsView, Order, ReplicaView
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.errors import (
    ContextTooLong,
    DeadlineExceeded,
    ErnieClusterError,
    Forbidden,
    Overloaded,
    ReplicaDraining,
    ReplicaError,
    ReplicaLost,
    TransferFailed,
)
from ernie_cluster.faults import FaultOrder, Faults
from ernie_cluster.observe.metrics import Metrics
from ernie_cluster.policy.retries import RetryBudget, backoff_s
from ernie_cluster.policy.snapshot import Demand
from ernie_cluster.request import GenerationRequest, MediaInput, Span, TokenEvent

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 10.0
"""For what the router has to ask replicas for."""
_STATUS_TIMEOUT_S = 1.0
"""For the router's view of things, which it has at hand."""
_RECOVERY_S = 60.0
"""A request that lost a replica waits this long for another one; Serve replaces one in about ten seconds."""


class ClusterBackend:
    """Implements `api.backend.Backend`; lives on the API replica's event loop."""

    _faults: Faults | None = None

    def __init__(self, app: str, config: ClusterConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._router = router_line(app, config)
        me = uuid.uuid4().hex
        self._attempts = Attempts(config, self._router, metrics, me)
        self._faults = Faults.of(config.faults, "api", f"api/{me[:8]}")
        self._budget = RetryBudget(config.router)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """See `Backend`."""
        accepted = time.monotonic()
        deadline = accepted + request.timeout_s
        tokens, spans, lost = list(request.output_token_ids), list[Span](), set[str]()
        number = num_failures = num_moves = num_cached = 0
        recover_until, is_moving = 0.0, False
        self._budget.arrived()
        with _noting(spans):
            while True:
                attempt = dataclasses.replace(
                    request,
                    request_id=f"{request.request_id}#{number}",
                    output_token_ids=tuple(tokens),
                    timeout_s=deadline - time.monotonic(),
                )
                if attempt.timeout_s <= 0:
                    raise DeadlineExceeded(f"no answer within {request.timeout_s:g} s")
                is_continued = len(tokens) > len(request.output_token_ids)
                try:
                    if self._faults is not None:
                        await self._faults.meet_async("api.generate")
                    async with aclosing(self._attempts.generate(attempt, number, lost, spans, accepted)) as answer:
                        async for events in answer:
                            for event in events:
                                tokens.extend(event.token_ids)
                            if not is_continued:  # what a replay finds in a cache is no saving of the client's
                                num_cached = events[-1].num_cached_tokens
                            yield [
                                dataclasses.replace(e, request_id=request.request_id, num_cached_tokens=num_cached)
                                for e in events
                            ]
                    return
                except Overloaded as e:  # refused before it was accepted; or it was, and waits for a place
                    if time.monotonic() + e.retry_after_s > min(recover_until, deadline):
                        raise
                    await asyncio.sleep(e.retry_after_s * random.uniform(0.5, 1.0))  # not all of them at once
                    if is_moving:
                        lost.clear()  # whoever parted with it may be told to stay, and be all that there is
                except ContextTooLong as e:
                    if not is_continued:
                        raise
                    raise ReplicaLost(f"who wrote the answer is gone, and nobody else can go on with it: {e}") from None
                except ReplicaDraining as e:  # nothing has failed, so it may wait for whoever comes instead
                    spans.append(_failed(e))
                    log.info("%s moves after %d tokens: %s", attempt.request_id, len(tokens), e)
                    recover_until, is_moving = deadline, True
                    self._metrics.inc("ernie_resumes_total", model=request.model, why="drained")
                    num_moves = 0 if len(tokens) > len(attempt.output_token_ids) else num_moves + 1
                    if num_moves > 1:  # until all know who is leaving, it may be sent there again and again
                        await asyncio.sleep(backoff_s(num_moves - 1, random.random(), self._config.router))
                except ReplicaError as e:
                    spans.append(_failed(e))
                    num_failures += 1
                    log.warning("%s failed after %d tokens: %s", attempt.request_id, len(tokens), e)
                    if isinstance(e, TransferFailed):
                        self._metrics.inc("ernie_transfer_failures_total", model=request.model, reason=type(e).__name__)
                    await self._pause(e, request.model, num_failures, deadline)
                    recover_until = time.monotonic() + _RECOVERY_S
                number += 1

    async def knock(self, model: str, max_tokens: int, priority: int, timeout_s: float) -> None:
        """See `Backend`."""
        if not self._config.model(model).has_vision_pool:  # it will be told what is wrong, whatever the load
            return
        least = Demand(model, 1, max_tokens, num_media=1, media_tokens=1, priority=priority, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                await self._router.call("knock", least)
        except Exception as e:
            error = translate(e, "the router")
            if isinstance(error, Overloaded):
                raise error from None
            log.info("nobody answers a knock: %s", error)

    async def embed(self, model: str, media: MediaInput, timeout_s: float) -> NDArray[np.float32]:
        """See `Backend`."""
        lost = set[str]()
        deadline = time.monotonic() + timeout_s
        number = num_failures = num_moves = 0
        self._budget.arrived()
        while True:
            number += 1
            key = f"embed-{uuid.uuid4().hex}#{number}"
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await self._attempts.embed(key, model, media, lost)
            except TimeoutError:
                raise DeadlineExceeded(f"no vector of a picture within {timeout_s:g} s") from None
            except Overloaded as e:
                if not num_moves or time.monotonic() + e.retry_after_s > deadline:
                    raise
                await asyncio.sleep(e.retry_after_s * random.uniform(0.5, 1.0))
                lost.clear()  # as in `generate`
            except ReplicaDraining as e:
                log.info("%s moves: %s", key, e)
                num_moves += 1
                if num_moves > 1:
                    await asyncio.sleep(backoff_s(num_moves - 1, random.random(), self._config.router))
            except ReplicaError as e:
                num_failures += 1
                log.warning("%s failed: %s", key, e)
                await self._pause(e, model, num_failures, deadline)

    async def _pause(self, error: ReplicaError, model: str, num_failures: int, deadline_s: float) -> None:
        """Until a request goes on after its newest failure, which is raised where it may not."""
        limits = self._config.router
        if num_failures >= limits.max_attempts:
            raise error
        now_s = time.monotonic()
        pause_s = backoff_s(num_failures, random.random(), limits) + self._budget.wait_s(num_failures, now_s)
        if now_s + pause_s > min(deadline_s, now_s + _RECOVERY_S):
            raise error
        self._metrics.inc("ernie_request_retries_total", model=model, reason=type(error).__name__)
        await asyncio.sleep(pause_s)

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

    async def cluster(self) -> ClusterView:
        """See `Operations`."""
        view: ClusterView = await self._told("cluster", _STATUS_TIMEOUT_S)
        return view

    async def decisions(self) -> list[DecisionView]:
        """See `Operations`."""
        decisions: list[DecisionView] = await self._told("decisions", _STATUS_TIMEOUT_S)
        return decisions

    async def order(self, order: Order) -> ReplicaView:
        """See `Operations`."""
        view: ReplicaView = await self._told("order", _CALL_TIMEOUT_S, order)
        return view

    async def faults(self, order: FaultOrder) -> FaultsView:
        """See `Operations`; faults of API processes are set in the one that is asked."""
        if self._faults is None:
            raise Forbidden(
                "faults on purpose are off here, as they must be where users are served; in staging set faults.enabled to "
                "true and start again",
                code="faults_disabled",
            )
        own = tuple(map(view_of, self._faults.obey(order)))
        view: FaultsView = await self._told("faults", _CALL_TIMEOUT_S, order)
        return dataclasses.replace(view, faults=(*view.faults, *own))

    async def _told(self, what: str, timeout_s: float, *args: Any) -> Any:
        """What the router answers; its errors are of our tree."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._router.call(what, *args)
        except Exception as e:
            raise translate(e, "the router") from None

    async def close(self) -> None:
        """See `Backend`."""
        await self._attempts.close()
        await self._router.close()


def _failed(error: ErnieClusterError) -> Span:
    """Marks in a timeline where an attempt ended, which another follows; what failed stays in our logs."""
    return Span("failed", time.time(), 0.0, (("failed", type(error).__name__),))


@contextmanager
def _noting(spans: list[Span]) -> Iterator[None]:
    """The error that ends a request tells how far that had come."""
    try:
        yield
    except ErnieClusterError as e:
        e.journey = tuple(sorted(spans, key=lambda s: s.start_s))
        raise
