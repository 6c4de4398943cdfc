"""One request and its answer over HTTP, under one deadline and one watch over the client's presence.

A generation request goes: read body -> read its dialect (thread) -> find model -> fetch media -> prepare (thread) -> run -> write.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ernie_cluster.api.answer import Answer
from ernie_cluster.api.body import parse_object, read_body
from ernie_cluster.api.dialect import Asked, Dialect, Heading, Presentation
from ernie_cluster.api.guest import Guest, guest_of
from ernie_cluster.api.media import Fetched, wanted_media
from ernie_cluster.api.openai import encode
from ernie_cluster.api.prepare import Job, prepare
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.rounds import rounds_of, with_default_tools
from ernie_cluster.api.service import Service
from ernie_cluster.api.status import INTERNAL, status_of
from ernie_cluster.api.stream import write_stream, write_whole
from ernie_cluster.api.tokens import Query
from ernie_cluster.api.traffic import Meter
from ernie_cluster.api.translate import renamed
from ernie_cluster.api.unknown import refuse_unknown, wants_strict
from ernie_cluster.api.wire import Wire, unless_disconnected
from ernie_cluster.errors import Aborted, DeadlineExceeded, InvalidRequest
from ernie_cluster.request import Span

_log = logging.getLogger(__name__)

LAST_WORD_TIMEOUT_S = 5.0
"""For the error event that ends a stream."""

INLINE_BYTES = 4096
"""A body up to this, without media, is read and prepared on the event loop: two hops to a thread cost 1.5 ms there
and back, the work itself under one."""


def is_small(raw: bytes) -> bool:
    """Whether a body is little work; every picture in one is said to be base64."""
    return len(raw) <= INLINE_BYTES and b"base64" not in raw


class Exchange(Response):
    """One request with a body, from its first byte to the last of its answer; what lies between, subclasses know."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._look: Presentation | None = None
        """Of a stream."""
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, wire = self._service, Wire(send)
        try:
            with service.traffic.request() as meter:
                try:
                    async with asyncio.timeout(service.limits.request_timeout_s) as deadline:
                        body = await read_body(scope, receive, service.limits)
                        await unless_disconnected(receive, self._answer(body, wire, meter, guest_of(scope)))
                except TimeoutError:
                    if not deadline.expired():
                        raise
                    raise DeadlineExceeded(
                        f"the answer was not finished within {service.limits.request_timeout_s:g} s"
                    ) from None
        except Exception as e:
            if wire.is_broken:
                return
            if not wire.is_stream_open:
                raise  # the handlers of the app make it a response
            assert self._look is not None
            log_error(e)
            with suppress(Aborted, TimeoutError):  # who has left, or reads no more, misses nothing
                async with asyncio.timeout(LAST_WORD_TIMEOUT_S):
                    await wire.write_events(b"".join(self._look.failure(e)), is_last=True)

    async def _answer(self, raw: bytes, wire: Wire, meter: Meter, guest: Guest) -> None:
        raise NotImplementedError


class Lookup(Exchange):
    """A request that nothing is generated for. It counts as a request without a model: it is no part of its traffic."""

    def __init__(self, service: Service, query: Query) -> None:
        super().__init__(service)
        self._query = query

    async def _answer(self, raw: bytes, wire: Wire, meter: Meter, guest: Guest) -> None:
        result = await self._service.run(partial(self._result, raw), is_small(raw))
        await wire.write_whole(encode(result))

    def _result(self, raw: bytes) -> dict[str, Any]:
        return self._query(parse_object(raw, self._service.limits), self._service.processor)


class Generation(Exchange):
    """A request for an answer of a model."""

    def __init__(self, service: Service, dialect: Dialect) -> None:
        super().__init__(service)
        self._dialect = dialect
        self._is_strict = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._is_strict = wants_strict(scope)
        await super().__call__(scope, receive, send)

    async def _answer(self, raw: bytes, wire: Wire, meter: Meter, guest: Guest) -> None:
        service = self._service
        start_s = time.time()
        is_quick = is_small(raw)
        asked = await service.run(partial(self._read, raw), is_quick)
        del raw
        body = asked.body
        processor = service.processor(body.model)
        meter.accept(body.model)
        heading = Heading(self._dialect.id_prefix + uuid.uuid4().hex, int(start_s), body.model)
        fetched = await self._fetch(asked)
        is_quick = is_quick and not body.has_format and not fetched
        job = await service.run(partial(self._prepare, asked, fetched, processor, heading, meter, guest), is_quick)
        look = asked.present(heading, job, [Span("preprocess", start_s, time.time() - start_s)])
        rounds = rounds_of(body, job, processor, service, fetched, meter.start_s)
        del asked, body, fetched
        backend = guest.pay(job, service.backend)
        meter.prepared(job.num_prompt_tokens)
        self._look = look
        async with Answer(backend, job, processor, rounds) as answer:
            if job.is_stream:
                await write_stream(wire, answer, look, meter, lambda: service.traffic.num_streams)
            else:
                await write_whole(wire, answer, look, meter)
            meter.further(answer.num_prompt_tokens - job.num_prompt_tokens)
            meter.cached(answer.num_cached_tokens)

    def _read(self, raw: bytes) -> Asked:
        given = parse_object(raw, self._service.limits)
        asked = self._dialect.read(given)
        if self._is_strict:
            refuse_unknown(self._dialect.body_type, given)
        return with_default_tools(asked, self._service.default_tools)

    async def _fetch(self, asked: Asked) -> Fetched:
        try:
            return await self._service.fetcher.fetch(wanted_media(asked.body))
        except InvalidRequest as e:
            raise renamed(e, asked.origins) from None

    def _prepare(
        self, asked: Asked, fetched: Fetched, processor: Processor, heading: Heading, meter: Meter, guest: Guest
    ) -> Job:
        limits = self._service.limits
        try:
            return prepare(
                asked.body,
                processor,
                limits,
                response_id=heading.response_id,
                seed=secrets.randbits(63),
                timeout_s=max(0.001, limits.request_timeout_s - (time.monotonic() - meter.start_s)),
                tenant_salt=guest.cache_salt,
                fetched=fetched,
            )
        except InvalidRequest as e:
            raise renamed(e, asked.origins) from None


def log_error(exc: Exception) -> None:
    """Faults of ours with their trace; all others in a line."""
    if status_of(exc) is INTERNAL:
        _log.error("request failed", exc_info=exc)
    else:
        _log.info("request failed: %s", exc)
