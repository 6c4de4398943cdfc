"""`/admin`: what operators see, what they can order, and who may."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest

from ernie_cluster.api.operator import FaultsView, FaultView, Order
from ernie_cluster.config.faults import FaultRule
from ernie_cluster.errors import Forbidden, Overloaded, ReplicaLost
from ernie_cluster.faults import FaultOrder
from tests.fakes import NO_CLUSTER
from tests.unit.api.client import Server
from tests.unit.api.clusters import DECODE, PREFILL, operated

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

JSON = {"content-type": "application/json"}


def order_url(replica: str, action: str) -> str:
    return f"/admin/replicas/{replica}/{action}"


async def test_the_cluster() -> None:
    told = (await Server(operated()).get("/admin/status")).json()
    assert told["replicas"][1] == {
        "replica": "org/m/prefill/abc123",
        "model": "org/m",
        "home": "prefill",
        "role": "prefill",
        "phase": "ready",
        "node": "node-1",
        "gpus": 1.0,
        "num_running": 3,
        "num_waiting": 2,
        "waiting_tokens": 4096,
        "free_blocks": 60,
        "total_blocks": 100,
        "age_s": 0.1,
        "num_leases": 0,
        "started_s": 0.0,
    }
    assert told["models"][0]["needs"] == {"prefill": 2.3, "decode": 1.1}
    assert (told["budget"], told["used"], told["budget_unit"]) == (8.0, 6.0, "GPUs")


@pytest.mark.parametrize(("query", "times"), [("", [1000.0, 990.0, 900.0]), ("?limit=1", [1000.0]), ("?limit=1000", [1000.0, 990.0, 900.0])])  # fmt: skip
async def test_decisions(query: str, times: list[float]) -> None:
    told = (await Server(operated()).get(f"/admin/decisions{query}")).json()
    assert (told["object"], [decision["at_s"] for decision in told["data"]]) == ("list", times)


@pytest.mark.parametrize("limit", ["", "0", "-1", "1001", "x", "1.0"])
async def test_a_limit_has_bounds(limit: str) -> None:
    response = await Server(operated()).get(f"/admin/decisions?limit={limit}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


@pytest.mark.parametrize("spelled", [PREFILL.replica, quote(PREFILL.replica, safe="")])
async def test_orders_reach_the_replica_however_its_id_is_spelled(spelled: str) -> None:
    server = Server(operated())
    async with server.client() as client:
        drained = await client.post(order_url(spelled, "drain"))  # no body, no content type
        back = await client.post(order_url(spelled, "undrain"), content=b"{", headers=JSON)  # a body is not looked at
        hurried = await client.post(order_url(spelled, "drain"), json={"within_s": 0})
        switched = await client.post(order_url(spelled, "role"), json={"role": "decode", "more": 1})
    phases = [r.json()["phase"] for r in (drained, back, hurried, switched)]
    assert phases == ["draining", "ready", "draining", "switching"]
    assert switched.json()["role"] == "decode"
    name = PREFILL.replica
    assert server.backend.orders == [
        Order(name, "drain"), Order(name, "undrain"), Order(name, "drain", within_s=0.0), Order(name, "role", "decode"),
    ]  # fmt: skip


@pytest.mark.parametrize("within_s", [-1, 1e9, "soon", True, [1]])
async def test_the_time_of_a_drain_is_checked(within_s: object) -> None:
    server = Server(operated())
    response = await server.post(order_url(PREFILL.replica, "drain"), {"within_s": within_s})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "within_s")
    assert not server.backend.orders


async def test_ids_may_have_marks_that_mean_something_in_a_url() -> None:
    server = Server(operated())
    response = await server.post(order_url(quote("a/b#1?x=ü%", safe=""), "drain"), b"")
    assert response.status_code == 404
    assert "'a/b#1?x=ü%'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("replica", "body", "status", "param", "code", "words"),
    [
        ("m/none", {"role": "decode"}, 404, "replica", "replica_not_found", DECODE.replica),
        (PREFILL.replica, {"role": "mixed"}, 409, None, "order_refused", "no mixed pool"),
        (PREFILL.replica, {"role": "king"}, 400, "role", None, "'king'"),
        (PREFILL.replica, {"role": None}, 400, "role", None, "None"),
        (PREFILL.replica, {}, 400, "role", None, "role"),
        (PREFILL.replica, b"role", 400, None, "invalid_json", "JSON object"),
    ],
)
async def test_what_cannot_be_done_is_told(
    replica: str, body: Any, status: int, param: str | None, code: str | None, words: str
) -> None:
    response = await Server(operated()).post(order_url(replica, "role"), body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert words in error["message"]


async def test_a_role_comes_as_json() -> None:
    async with Server(operated()).client() as client:
        response = await client.post(order_url(PREFILL.replica, "role"), content=b'{"role": "decode"}')
    assert response.status_code == 415


async def test_a_router_that_is_gone_is_told() -> None:
    server = Server(operated())
    server.backend.cluster_news = server.backend.decision_news = ReplicaLost("the router at 10.0.0.7 is gone")
    answers = [await server.get("/admin/status"), await server.get("/admin/decisions")]
    answers += [await server.post(order_url("x", action), {"role": "decode"}) for action in ("drain", "role")]
    assert {r.status_code for r in answers} == {503}
    assert all("10.0.0.7" not in r.text for r in answers)


async def test_orders_come_through_when_the_cluster_is_full() -> None:
    server = Server(operated())
    server.backend.script = [Overloaded("full")]
    assert (await server.chat()).status_code == 429
    assert (await server.post(order_url(PREFILL.replica, "undrain"), b"")).status_code == 200


async def test_nothing_there_is_an_answer_too() -> None:
    server = Server()
    assert (await server.get("/admin/status")).json()["replicas"] == list(NO_CLUSTER.replicas)


FAULT = {"point": "decode.step", "action": "kill", "role": "decode", "after": 20, "times": 1, "for_s": 12}


async def test_faults_on_purpose_are_set_told_and_ended() -> None:
    server = Server(operated())
    rule = FaultRule("decode.step", "kill", role="decode", after=20, times=1)
    server.backend.fault_news = FaultsView((FaultView("ernie:m/decode/x:1", rule, 12.0, 21, 1),), ("m/decode/y",))
    async with server.client() as client:
        answers = [
            await client.post("/admin/faults", json=FAULT),
            await client.get("/admin/faults"),
            await client.delete("/admin/faults"),
        ]
    assert [r.status_code for r in answers] == [200] * 3
    assert server.backend.fault_orders == [FaultOrder("add", rule, 12.0), FaultOrder("list"), FaultOrder("clear")]
    (told,) = answers[1].json()["faults"]
    assert (told["fault"]["point"], told["num_struck"], answers[1].json()["silent"]) == (
        "decode.step",
        1,
        ["m/decode/y"],
    )


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"point": "decode.stop"}, "point"),
        ({"action": "corrupt"}, "action"),
        ({"action": "explode"}, "action"),
        ({"for_s": 601}, "for_s"),
        ({"for_s": 0}, "for_s"),
        ({"lasts_s": 1e9}, "lasts_s"),
        ({"probability": 2}, "probability"),
        ({"times": 0}, "times"),
        ({"role": "king"}, "role"),
        ({"replica": ""}, "replica"),
    ],
)
async def test_a_fault_that_cannot_be_names_its_field(change: dict[str, Any], param: str) -> None:
    server = Server(operated())
    response = await server.post("/admin/faults", FAULT | change)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert server.backend.fault_orders == []


async def test_faults_are_refused_where_they_are_off() -> None:
    server = Server(operated())
    server.backend.fault_news = Forbidden("set faults.enabled", code="faults_disabled")
    response = await server.post("/admin/faults", FAULT)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "faults_disabled")
