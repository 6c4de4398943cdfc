"""The gRPC server of one API replica. Owns its port.

Why it does not go through Serve, whose proxy HTTP comes by (Ray 2.60): a replica's gRPC port would listen on all
interfaces, whatever `api.host` says; take messages of 2 GiB from anybody, for only an environment variable of Ray's
processes bounds them, and parse them before a key can be asked for; and tell nothing of a call's deadline. The price:
Serve does not count these calls, and a client reaches the replicas of one machine, which share the port. For replicas
on several machines it needs a balancer, or their names.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import grpc
from grpc_reflection.v1alpha import reflection

from ernie_cluster.api import grpc_health, grpc_service
from ernie_cluster.api.grpc_call import Call, handler
from ernie_cluster.api.grpc_door import Door
from ernie_cluster.api.guard import Guard
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.service import Service
from ernie_cluster.errors import ConfigError

GRACE_S = 10.0
"""What running calls get to come to their end."""
CONNECTION_S = 3600.0
"""Age at which a client is told to connect anew, and its calls get what a request may take to end."""


class GrpcServer:
    """Listens as long as an `async with` block lasts.

    Args:
        service: what HTTP serves, too.
        guard: who may come in; None lets everybody in.
        host: address to listen on.
        port: 0 takes any that is free.
        credentials: for TLS, see `tls.Certificate`; None speaks plain text.
        health_interval_s: see `grpc_health.INTERVAL_S`.
    """

    def __init__(
        self,
        service: Service,
        *,
        guard: Guard | None,
        host: str,
        port: int,
        credentials: Any = None,
        health_interval_s: float = grpc_health.INTERVAL_S,
    ) -> None:
        self._service = service
        self._guard = guard
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._credentials = credentials
        self._health = grpc_health.Health(service, (grpc_service.NAME,), health_interval_s)
        self.port = port

    async def __aenter__(self) -> Self:
        """Raises ConfigError when nobody can listen there."""
        refuse = handler(_refuse, self._service.limits)
        door = Door(self._guard, refuse, self._service.tracer.sample_ratio)
        self._server = grpc.aio.server(interceptors=(door,), options=_options(self._service.limits))
        self._server.add_generic_rpc_handlers((grpc_service.inference(self._service), self._health.handlers()))
        names = (grpc_service.NAME, grpc_health.NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(self._address)
            else:
                self.port = self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as e:
            raise ConfigError(f"cannot listen on {self._address} for gRPC: {e}; choose another api.grpc_port") from None
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._health.close()
        await self._server.stop(GRACE_S)


async def _refuse(call: Call) -> None:
    assert call.visit.error is not None, "the door refused him"
    raise call.visit.error


def _options(limits: ApiLimits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.max_body_bytes),  # also of a compressed message, when unpacked
        ("grpc.max_concurrent_streams", limits.max_in_flight),  # of one connection
        ("grpc.keepalive_time_ms", 60_000),  # a client that vanished is noticed, and its calls are cancelled
        ("grpc.keepalive_timeout_ms", 20_000),
        # the end of a call that is not read waits behind its last message for as long as its connection lasts
        ("grpc.max_connection_age_ms", int(CONNECTION_S * 1000)),
        ("grpc.max_connection_age_grace_ms", int(limits.request_timeout_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients may look after us, too
        ("grpc.so_reuseport", 1),  # by the API replicas of one machine
    ]
