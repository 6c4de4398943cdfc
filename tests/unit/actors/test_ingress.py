"""From the configuration to the door of an API replica."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from ernie_cluster.actors.ingress import face_browsers, make_grpc, make_guard, make_processor
from ernie_cluster.config.api import ApiConfig, TlsConfig
from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.config.presets import tiny_mixed
from ernie_cluster.errors import ConfigError
from ernie_cluster.observe.metrics import InMemoryMetrics
from tests.tiny import tiny_config, tiny_folder
from tests.unit.api.client import Server
from tests.unit.api.clusters import PREFILL, operated


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_configured_keys_open(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: alice, sha256: {sha256('k')}}}", encoding="utf-8")
    api = ApiConfig(keys_file=str(path), admin_key_sha256=sha256("root"), isolate_prefix_cache=True)
    server = Server(guard=make_guard(api, InMemoryMetrics()))
    asked = [("/v1/models", ""), ("/v1/models", "k"), ("/metrics", "k"), ("/metrics", "root"), ("/ready", "")]
    assert [(await server.get(url, {"x-api-key": key})).status_code for url, key in asked] == [401, 200, 401, 200, 200]
    await server.post("/v1/completions", {"model": "tiny", "prompt": "p"}, {"x-api-key": "k"})
    assert server.backend.requests[0].cache_salt != b""


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_without_keys_all_is_open() -> None:
    server = Server(guard=make_guard(ApiConfig(), InMemoryMetrics()))
    assert (await server.chat()).status_code == 200
    assert (await server.get("/metrics")).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    ("api", "status"),
    [
        (ApiConfig(), 200),
        (ApiConfig(host="localhost"), 200),
        (ApiConfig(host="0.0.0.0"), 403),
        (ApiConfig(host="0.0.0.0", admin_key_sha256=sha256("root")), 200),
        (ApiConfig(admin_key_sha256=sha256("other")), 401),
        (ApiConfig(keys_file="/made/below.yaml"), 403),
    ],
)
async def test_orders_are_taken_as_it_is_configured(api: ApiConfig, status: int, tmp_path: Path) -> None:
    if api.keys_file is not None:
        path = tmp_path / "keys.yaml"
        path.write_text("[]", encoding="utf-8")
        api = replace(api, keys_file=str(path))
    server = Server(operated(), guard=make_guard(api, InMemoryMetrics()))
    url = f"/admin/replicas/{PREFILL.replica}/drain"
    assert (await server.post(url, b"", {"x-api-key": "root"})).status_code == status


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("api", "status"), [(ApiConfig(), 200), (ApiConfig(playground=False), 404)])
async def test_the_playground_can_be_switched_off(api: ApiConfig, status: int) -> None:
    server = Server(guard=make_guard(api, InMemoryMetrics()))
    face_browsers(server.app, api)
    assert (await server.get("/")).status_code == status


def test_keys_that_cannot_be_read_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        make_guard(ApiConfig(keys_file=str(tmp_path / "none.yaml")), InMemoryMetrics())


def test_a_certificate_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    api = ApiConfig(grpc_port=9000, grpc_tls=TlsConfig(str(tmp_path / "none.pem"), str(tmp_path / "none.key")))
    guard = make_guard(api, InMemoryMetrics())
    with pytest.raises(ConfigError, match="cannot be read"):
        make_grpc(api, guard)
    assert make_grpc(ApiConfig(), guard) is None


def test_no_sequence_is_promised_more_than_a_replica_holds() -> None:
    config = tiny_mixed(tiny_folder())
    (model,) = config.models
    block_bytes = KVLayout.from_model(tiny_config(), model.engine.block_size, "float32").block_bytes
    engine = replace(model.engine, kv_cache_bytes=25 * block_bytes + 1)  # one block is for padding
    small = replace(config, models=(replace(model, engine=engine),))
    lengths = [make_processor(c, "tiny").max_model_len for c in (config, small)]
    assert lengths == [4096, 24 * engine.block_size]
