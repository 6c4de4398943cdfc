"""`/admin`: what an operator sees of the cluster, and can order. Who may come in, the door has decided."""

from __future__ import annotations

from typing import Literal

from fastapi import FastAPI, Request, Response
from pydantic import Field

from ernie_cluster.api.body import parse_object, read_body
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.operator import DecisionView, Operations, Order, Role
from ernie_cluster.api.service import json_response
from ernie_cluster.api.shapes import Shape
from ernie_cluster.api.validate import Strict, shortened, validated
from ernie_cluster.config.faults import MAX_LASTS_S, Action, FaultRole, FaultRule
from ernie_cluster.errors import ConfigError, InvalidRequest
from ernie_cluster.faults import FaultOrder

MAX_DECISIONS = 1000
MAX_FAULT_S = 600.0
DEFAULT_DECISIONS = 100
MAX_DRAIN_S = 1_000_000


class RoleBody(Strict):
    """What a replica shall do from now on."""

    role: Role


class FaultBody(Strict):
    """A fault on purpose."""

    point: str
    """Where it strikes."""
    action: Action
    """What happens there."""
    lasts_s: float = Field(1.0, gt=0, le=MAX_LASTS_S)
    """How long a delay or a stop lasts."""
    role: FaultRole = "any"
    """Processes of this kind only."""
    replica: str = Field("*", min_length=1)
    """Replicas whose id has this in it only; `*` and `?` stand for any characters and any one."""
    probability: float = Field(1.0, ge=0, le=1)
    """Of striking each time."""
    after: int = Field(0, ge=0)
    """So many times nothing happens at first."""
    times: int | None = Field(None, ge=1)
    """It strikes at most so often in each process."""
    for_s: float = Field(30.0, gt=0, le=MAX_FAULT_S)
    """Then it is over, whatever it did."""

    def order(self) -> FaultOrder:
        """What it asks for; raises InvalidRequest for what cannot happen."""
        try:
            return FaultOrder("add", FaultRule(**self.model_dump(exclude={"for_s"})), self.for_s)
        except ConfigError as e:
            raise InvalidRequest(str(e), str(e).partition(" ")[0]) from None


class DrainBody(Strict):
    """How long a replica has for what it is at; nothing at all will do."""

    within_s: float | None = Field(None, ge=0, le=MAX_DRAIN_S, allow_inf_nan=False)
    """Seconds; others go on with what is left then. None = `router.drain_timeout_s`."""


class Decisions(Shape):
    """Actions of the autoscaler and of operators, the newest first."""

    object: Literal["list"]
    data: list[DecisionView]


def add_admin(app: FastAPI, operations: Operations, limits: ApiLimits) -> None:
    """The routes. Orders are not counted as requests: they have to come through when the cluster is full.

    A replica's id stands in the path as it is or percent-encoded, its slashes too.
    """

    @app.get("/admin/status")
    async def status() -> Response:
        return json_response(await operations.cluster())

    @app.get("/admin/decisions")
    async def decisions(request: Request) -> Response:
        limit = limit_of(request.query_params.get("limit"))
        return json_response({"object": "list", "data": (await operations.decisions())[:limit]})

    @app.post("/admin/replicas/{replica:path}/role")
    async def role(replica: str, request: Request) -> Response:
        raw = await read_body(request.scope, request.receive, limits)
        body = validated(RoleBody, parse_object(raw, limits))
        return json_response(await operations.order(Order(replica, "role", body.role)))

    @app.get("/admin/faults")
    async def faults() -> Response:
        return json_response(await operations.faults(FaultOrder("list")))

    @app.post("/admin/faults")
    async def add_fault(request: Request) -> Response:
        raw = await read_body(request.scope, request.receive, limits)
        return json_response(await operations.faults(validated(FaultBody, parse_object(raw, limits)).order()))

    @app.delete("/admin/faults")
    async def clear_faults() -> Response:
        return json_response(await operations.faults(FaultOrder("clear")))

    async def leave(replica: str, action: Literal["drain", "restart"], request: Request) -> Response:
        body = DrainBody(within_s=None)
        if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
            raw = await read_body(request.scope, request.receive, limits)
            body = validated(DrainBody, parse_object(raw, limits))
        return json_response(await operations.order(Order(replica, action, within_s=body.within_s)))

    @app.post("/admin/replicas/{replica:path}/drain")
    async def drain(replica: str, request: Request) -> Response:
        return await leave(replica, "drain", request)

    @app.post("/admin/replicas/{replica:path}/restart")
    async def restart(replica: str, request: Request) -> Response:
        return await leave(replica, "restart", request)

    @app.post("/admin/replicas/{replica:path}/undrain")
    async def undrain(replica: str) -> Response:
        return json_response(await operations.order(Order(replica, "undrain")))


def limit_of(given: str | None) -> int:
    """Of the query parameter `limit`. Raises InvalidRequest."""
    if given is None:
        return DEFAULT_DECISIONS
    is_number = given.isascii() and given.isdigit() and len(given) < 10
    if not is_number or not 1 <= int(given) <= MAX_DECISIONS:
        raise InvalidRequest(f"limit must be 1 to {MAX_DECISIONS}, not {shortened(given)}", "limit")
    return int(given)
