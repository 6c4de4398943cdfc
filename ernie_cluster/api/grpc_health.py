"""`grpc.health.v1`: SERVING while every model can take requests, as `/ready` says it over HTTP."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2

from ernie_cluster.api.grpc_call import Call, handler
from ernie_cluster.api.protobuf import parse_message
from ernie_cluster.api.service import Service
from ernie_cluster.errors import Overloaded, UnknownModel

NAME = "grpc.health.v1.Health"

MAX_WATCHES = 64
"""Calls of `Watch`, which need no key and never end by themselves."""
INTERVAL_S = 1.0
"""Between two looks on behalf of a watch."""

_Status = health_pb2.HealthCheckResponse


class Health:
    """Answers for the server as a whole ("") and for each service that it is told of.

    Args:
        services: names that may be asked for.
        interval_s: see `INTERVAL_S`.
    """

    def __init__(self, service: Service, services: tuple[str, ...], interval_s: float = INTERVAL_S) -> None:
        self._service = service
        self._known = frozenset(("", *services))
        self._interval_s = interval_s
        self._num_watches = 0
        self._closing = asyncio.Event()

    def handlers(self) -> grpc.GenericRpcHandler:
        """The methods of `Health`."""
        limits = self._service.limits
        return grpc.method_handlers_generic_handler(
            NAME, {"Check": handler(self.check, limits), "Watch": handler(self.watch, limits)}
        )

    def close(self) -> None:
        """Not serving any more; ends all watches with this news."""
        self._closing.set()

    async def check(self, call: Call) -> None:
        name = await self._asked(call)
        if name not in self._known:
            raise UnknownModel(f"service {name[:100]!r} is not served here; served: {NAME}", "service", None)
        await call.write_whole(_bytes(await self._status(name)))

    async def watch(self, call: Call) -> None:
        if self._num_watches >= MAX_WATCHES:
            raise Overloaded(f"{self._num_watches} calls watch already, the limit is {MAX_WATCHES}; use Check")
        self._num_watches += 1
        try:
            name, told = await self._asked(call), None
            while True:
                is_over = self._closing.is_set()
                status = await self._status(name)
                if status != told:
                    await call.write_whole(_bytes(status))
                    told = status
                if is_over:
                    return
                await self._pause()
        finally:
            self._num_watches -= 1

    async def _asked(self, call: Call) -> str:
        raw = await call.read(self._service.limits)
        name: str = parse_message(health_pb2.HealthCheckRequest, raw, self._service.limits).service
        return name

    async def _status(self, name: str) -> int:
        if name not in self._known:
            return int(_Status.SERVICE_UNKNOWN)
        if self._closing.is_set():
            return int(_Status.NOT_SERVING)
        try:
            is_ready = bool((await self._service.readiness())["ready"])
        except Exception:  # whoever asks wants to know whether, not why
            is_ready = False
        return int(_Status.SERVING if is_ready else _Status.NOT_SERVING)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._interval_s):
                await self._closing.wait()
        except TimeoutError:
            pass


def _bytes(status: int) -> bytes:
    serialized: bytes = _Status(status=status).SerializeToString()
    return serialized
