"""What one request asks for, and how it is done, by whichever face of the API it came. Knows no HTTP and no gRPC.

An answer of a model goes: read (thread) -> find model -> fetch media -> prepare (thread) -> run -> write.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from ernie_cluster.api.alias import errand_of
from ernie_cluster.api.answer import Answer
from ernie_cluster.api.deadline import Deadline
from ernie_cluster.api.dialect import Asked, Dialect, Heading, Presentation
from ernie_cluster.api.guest import Guest
from ernie_cluster.api.image_search import check_offer
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.media import Fetched, has_media, wanted_media
from ernie_cluster.api.prepare import Job, prepare
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.rounds import rounds_of, with_default_tools
from ernie_cluster.api.service import Service
from ernie_cluster.api.stream import Wire, write_stream, write_whole
from ernie_cluster.api.traffic import Meter
from ernie_cluster.api.translate import renamed
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.request import Span

R = TypeVar("R")

INLINE_BYTES = 4096
"""A body up to this, without media, is read and prepared on the event loop: two hops to a thread cost 1.5 ms there
and back, the work itself under one."""


def is_small(raw: bytes) -> bool:
    """Whether a body is little work; every picture in JSON is said to be base64."""
    return len(raw) <= INLINE_BYTES and b"base64" not in raw


class Work(Protocol):
    """One request with a body, and its answer."""

    @property
    def look(self) -> Presentation | None:
        """Of an answer that has begun; tells its end if it fails."""
        ...

    async def answer(self, raw: bytes, wire: Wire, meter: Meter, guest: Guest, timeout_s: float) -> None:
        """Do it.

        Args:
            raw: the request's body.
            wire: where the answer goes.
            meter: of the request.
            guest: who sent it.
            timeout_s: what it may take, from the meter's start.
        """
        ...


class Lookup:
    """A request that nothing is generated for. It counts as a request without a model: it is no part of its traffic.

    Args:
        query: from a request's body to what the wire writes whole; CPU work.
        has_files: a small body may hold a picture, which is much work.
    """

    look: Presentation | None = None

    def __init__(self, service: Service, query: Callable[[bytes], Any], *, has_files: bool = False) -> None:
        self._service = service
        self._query = query
        self._has_files = has_files

    async def answer(self, raw: bytes, wire: Wire, meter: Meter, guest: Guest, timeout_s: float) -> None:
        is_quick = is_small(raw) and not self._has_files
        may_have_media = self._has_files or b"base64" in raw
        told = await self._service.run(partial(self._query, raw), is_quick, has_media=may_have_media)
        await wire.write_whole(told)


class Generation(Generic[R]):
    """A request for an answer of a model.

    Args:
        parse: from a request's body to what the dialect reads, within limits; CPU work.
    """

    def __init__(self, service: Service, dialect: Dialect[R], parse: Callable[[bytes, ApiLimits], R]) -> None:
        self._service = service
        self._dialect = dialect
        self._parse = parse
        self.look: Presentation | None = None

    async def answer(self, raw: bytes, wire: Wire, meter: Meter, guest: Guest, timeout_s: float) -> None:
        service, deadline = self._service, Deadline(meter.start_s + timeout_s)
        start_s = time.time()
        is_quick = is_small(raw)
        asked = await service.run(partial(self._read, raw), is_quick)
        del raw
        meter.accept(service.processor(asked.body.model).served_name)
        await self._knock(asked, deadline)
        fetched = {**await self._fetch(asked), **asked.content}
        asked, choice = self._chosen(asked, fetched)
        body = asked.body
        processor = service.processor(body.model)
        meter.accept(body.model)
        heading = Heading(self._dialect.id_prefix + uuid.uuid4().hex, int(start_s), body.model)
        is_quick = is_quick and not body.has_format and not fetched
        job = await service.run(
            partial(self._prepare, asked, fetched, processor, heading, guest, deadline.left_s),
            is_quick,
            has_media=has_media(body),
        )
        preprocess = Span("preprocess", start_s, time.time() - start_s, choice)
        meter.timeline.append(preprocess)
        look = asked.present(heading, job, [preprocess])
        backend = guest.pay(job, service.backend)
        rounds = rounds_of(body, job, processor, service, fetched, deadline, backend)
        del asked, body, fetched
        meter.prepared(job.num_prompt_tokens)
        self.look = look
        limits = service.limits
        async with Answer(backend, job, processor, rounds, max_unread_tokens=limits.max_unread_tokens) as answer:
            try:
                if job.is_stream:
                    meter.num_unread = lambda: answer.num_unread_tokens
                    await write_stream(
                        wire, answer, look, meter, lambda: service.traffic.num_streams, limits.keep_alive_s
                    )
                else:
                    await write_whole(wire, answer, look, meter)
            finally:
                for chosen in answer.choices:
                    meter.stages(chosen.spans)
            meter.further(answer.num_prompt_tokens - job.num_prompt_tokens)
            meter.cached(answer.num_cached_tokens)
            if service.alias is not None and meter.ttft_s is not None:
                service.alias.saw(meter.model, meter.ttft_s)

    def _read(self, raw: bytes) -> Asked:
        asked = self._dialect.read(self._parse(raw, self._service.limits))
        return with_default_tools(asked, self._service.default_tools)

    def _chosen(self, asked: Asked, fetched: Fetched) -> tuple[Asked, tuple[tuple[str, str], ...]]:
        """The request with a served model's name in the place of the alias, and details of the choice, if there was one."""
        alias = self._service.alias
        if alias is None or asked.body.model != alias.name:
            return asked, ()
        model, reason = alias.choose(**errand_of(asked.body, fetched))
        return replace(asked, body=asked.body.model_copy(update={"model": model})), (("model", model), ("why", reason))

    async def _knock(self, asked: Asked, deadline: Deadline) -> None:
        """Whom nobody could serve now is told so before his pictures are fetched and decoded. Raises Overloaded."""
        body = asked.body
        if has_media(body) and body.model in self._service.processors:  # an alias chooses by what was fetched
            max_tokens = body.asked_max_tokens[1] or 1
            await self._service.backend.knock(body.model, max_tokens, body.priority or 0, deadline.left_s)

    async def _fetch(self, asked: Asked) -> Fetched:
        try:
            return await self._service.fetcher.fetch(wanted_media(asked.body))
        except InvalidRequest as e:
            raise renamed(e, asked.origins) from None

    def _prepare(
        self, asked: Asked, fetched: Fetched, processor: Processor, heading: Heading, guest: Guest, timeout_s: float
    ) -> Job:
        try:
            check_offer(asked.body, self._service.searcher)
            return prepare(
                asked.body,
                processor,
                self._service.limits,
                response_id=heading.response_id,
                seed=secrets.randbits(63),
                timeout_s=timeout_s,
                tenant_salt=guest.cache_salt,
                tenant=guest.name,
                fetched=fetched,
            )
        except InvalidRequest as e:
            raise renamed(e, asked.origins) from None
