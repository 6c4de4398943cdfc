"""What a configuration refuses at birth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from ernie_cluster.config.api import ApiConfig, TlsConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.emulate import EmulateConfig
from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.pool import EplbConfig, PoolConfig
from ernie_cluster.config.presets import PRESETS, ernie_28b_a3b, ernie_424b_a47b, tiny, tiny_mixed
from ernie_cluster.config.quantization import METHODS
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.errors import ConfigError, UnknownModel

MIXED = PoolConfig("mixed")


def deployment(*pools: PoolConfig, name: str = "m", path: str = "/m", engine: EngineConfig | None = None):  # type: ignore[no-untyped-def]
    return ModelDeployment(name, path, pools, engine or EngineConfig())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineConfig(block_size=0), "block_size = 0 must be at least 1"),
        (lambda: EngineConfig(kv_cache_bytes=0), "kv_cache_bytes = 0 must be at least 1"),
        (lambda: EngineConfig(num_threads=-1), "num_threads = -1 must be at least 0"),
        (lambda: EngineConfig(host_cache_bytes=-1), "host_cache_bytes = -1 must be at least 0"),
        (
            lambda: EngineConfig(host_cache_bytes=9, enable_prefix_cache=False),
            "host_cache_bytes = 9 with enable_prefix_cache = false: .* set host_cache_bytes to 0",
        ),
        (lambda: EngineConfig(max_model_len=1), "max_model_len = 1 must be at least 2"),
        (lambda: EngineConfig(max_batch_tokens=8, max_num_seqs=9), "max_batch_tokens = 8 .* max_num_seqs = 9"),
        (lambda: EmulateConfig(token_s=-0.1), "token_s = -0.1 must be at least 0"),
        (lambda: PoolConfig("mixed", num_replicas=0), "num_replicas = 0"),
        (lambda: PoolConfig("mixed", num_cpus=0), "num_cpus = 0 must be greater than 0"),
        (lambda: PoolConfig("mixed", num_cpus=math.nan), "num_cpus = nan"),
        (lambda: PoolConfig("mixed", num_gpus=2), "num_gpus = 2 must be between 0 and 1"),
        (lambda: PoolConfig("mixed", node_labels=("gpu",)), "node_labels has 'gpu'; a label is key=value"),
        (lambda: PoolConfig("mixed", node_labels=("a=1", "a=2")), "node_labels: key 'a' appears more than once"),
        (lambda: ApiConfig(node_labels=("a==b",)), "node_labels has 'a==b'"),
        (lambda: PoolConfig("mixed", tp=0), "tp = 0 must be at least 1"),
        (lambda: PoolConfig("vision", tp=2), r"tp \* dp = 2 \* 1 = 2 must be 1"),
        (lambda: PoolConfig("mixed", eplb=EplbConfig(enabled=True)), r"eplb.enabled with tp \* dp = 1"),
        (lambda: EplbConfig(interval_steps=0), "interval_steps = 0 must be at least 1"),
        (lambda: EplbConfig(redundant_experts=-1), "redundant_experts = -1 must be at least 0"),
        (lambda: EplbConfig(min_gain=1.5), "min_gain = 1.5 must be between 0 and 1"),
        (lambda: deployment(MIXED, name="a b"), "name = 'a b'"),
        (lambda: deployment(MIXED, path=""), "path is empty"),
        (lambda: deployment(), "cannot serve; add mixed, or prefill and decode"),
        (lambda: deployment(PoolConfig("vision")), "cannot serve"),
        (lambda: deployment(PoolConfig("prefill")), "prefill needs decode"),
        (lambda: deployment(PoolConfig("decode"), MIXED), "decode needs prefill"),
        (lambda: deployment(MIXED, MIXED), "pool role 'mixed' appears more than once"),
        (lambda: deployment(MIXED, engine=EngineConfig(device="cuda")), "mixed has num_gpus = 0"),
        (lambda: deployment(replace(MIXED, num_gpus=1)), r"block_size = 16 of 'm': mixed has GPUs.* set it to 256"),
        (lambda: replace(deployment(MIXED), image_min_pixels=9, image_max_pixels=8), "image_max_pixels = 8"),
        (lambda: TransportConfig(piece_bytes=0), "piece_bytes = 0"),
        (lambda: TransportConfig(piece_bytes=9, staging_bytes=8), "staging_bytes = 8"),
        (lambda: RouterConfig(max_attempts=0), "max_attempts = 0"),
        (lambda: RouterConfig(retry_after_s=0), "retry_after_s = 0"),
        (lambda: RouterConfig(snapshot_interval_s=5), "heartbeat_timeout_s = 2.0 must be more than"),
        (lambda: RouterConfig(lease_timeout_s=2), "lease_timeout_s = 2 must be more than"),
        (lambda: TlsConfig("server.pem", "/k"), "certificate = 'server.pem' must be an absolute path"),
        (lambda: TlsConfig("/c", "", None), "key = '' must be an absolute path"),
        (lambda: TlsConfig("/c", "/k", "ca"), "client_ca = 'ca' must be an absolute path"),
        (lambda: ApiConfig(host=""), "host is empty"),
        (lambda: ApiConfig(port=65536), "port = 65536 must be between 1 and 65535"),
        (lambda: ApiConfig(max_images=-1), "max_images = -1"),
        (lambda: ApiConfig(max_videos=-1), "max_videos = -1"),
        (lambda: ApiConfig(max_video_frames=1), "max_video_frames = 1 must be at least 2"),
        (lambda: ApiConfig(max_json_depth=2), "max_json_depth = 2 must be at least 8"),
        (lambda: ApiConfig(request_timeout_s=math.inf), "request_timeout_s = inf"),
        (lambda: ClusterConfig(models=()), "models is empty"),
        (lambda: ClusterConfig(models=(deployment(MIXED), deployment(MIXED))), "model name 'm' appears"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(("is_on", "slots"), [(True, 2), (False, 0)])
def test_slots_for_copies_of_experts_are_kept_only_where_experts_move(is_on: bool, slots: int) -> None:
    pool = PoolConfig("mixed", tp=2, eplb=EplbConfig(enabled=is_on, redundant_experts=2))
    assert pool.dims.redundant_experts == slots


@pytest.mark.parametrize(
    "roles", [("mixed",), ("prefill", "decode"), ("prefill", "decode", "mixed"), ("vision", "mixed")]
)
def test_pools_that_can_serve(roles: tuple[str, ...]) -> None:
    made = deployment(*(PoolConfig(role) for role in roles))  # type: ignore[arg-type]
    assert [made.pool(role) for role in roles] == list(made.pools)  # type: ignore[arg-type]
    assert made.has_vision_pool == ("vision" in roles)


def test_a_vision_pool_needs_a_model_with_eyes() -> None:
    seeing, blind = deployment(MIXED, PoolConfig("vision")), deployment(MIXED)
    seeing.check_media(is_multimodal=True)
    blind.check_media(is_multimodal=False)
    blind.check_media(is_multimodal=True)
    with pytest.raises(ConfigError, match="text-only; remove the vision pool"):
        seeing.check_media(is_multimodal=False)


def quantised(model: str, pool: str, **changes: Any) -> ModelDeployment:
    pools = (PoolConfig("prefill"), PoolConfig("decode", quantization=pool))  # type: ignore[arg-type]
    return replace(deployment(PoolConfig("mixed")), quantization=model, **{"pools": pools, **changes})


@pytest.mark.parametrize(
    ("model", "pool"), [("auto", "wint4"), ("none", "wint4"), ("wint8", "wint4"), ("wint4", "none")]
)
def test_pools_with_other_weights_than_the_model_are_refused(model: str, pool: str) -> None:
    why = "KV that one pool computes is continued by another"
    with pytest.raises(ConfigError, match=f"decode has quantization = {pool}, the model has {model}; {why}"):
        quantised(model, pool)


@pytest.mark.parametrize("name", ["none", "wint8", "wint4", "auto"])
def test_pools_may_repeat_the_models_weights(name: str) -> None:
    assert quantised(name, name).pool("decode").quantization == name  # type: ignore[union-attr]


def test_the_method_is_the_wish_or_the_checkpoints() -> None:
    assert quantised("auto", "auto").method("none") is None
    assert quantised("none", "auto").method("none") is None
    assert quantised("wint8", "auto").method("none") == quantised("auto", "auto").method("wint8") == METHODS["wint8"]
    for wish in ("none", "wint4"):
        with pytest.raises(ConfigError, match=f"'m': quantization = {wish}, but the checkpoint is stored as wint8"):
            quantised(wish, "auto").method("wint8")


@pytest.mark.parametrize(("wish", "stored"), [("fp8", "none"), ("auto", "fp8")])
def test_fp8_is_refused_on_cpu(wish: str, stored: Any) -> None:
    on_gpus = tuple(replace(p, num_gpus=1) for p in quantised("auto", "auto").pools)
    paged = EngineConfig(block_size=256)
    with pytest.raises(ConfigError, match="fp8 needs Hopper GPUs or newer ones, and pool prefill runs on CPU"):
        quantised(wish, "auto").method(stored)
    with pytest.raises(ConfigError, match="pool prefill runs on CPU"):
        quantised(wish, "auto", pools=on_gpus, engine=replace(paged, device="cpu")).method(stored)
    assert quantised(wish, "auto", pools=on_gpus, engine=paged).method(stored) == METHODS["fp8"]


def test_a_model_is_found_by_name() -> None:
    config = ClusterConfig(models=(deployment(MIXED, name="a"), deployment(MIXED, name="b")))
    assert config.model("b") is config.models[1]
    with pytest.raises(UnknownModel, match="'c' is not served here; known: a, b"):
        config.model("c")


def test_configurations_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ApiConfig().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_a_path_and_can_see_unless_their_model_reads_text_only(name: str) -> None:
    (model,) = PRESETS[name]("/some/folder").models
    assert model.path == "/some/folder"
    assert model.has_vision_pool == (name not in ("0.3b", "21b", "300b"))


def test_presets_differ_where_they_should() -> None:
    assert {p.role for p in tiny("x").models[0].pools} == {"vision", "prefill", "decode"}
    assert {p.role for p in tiny_mixed("x").models[0].pools} == {"vision", "mixed"}
    assert tiny("x").models[0].engine == tiny_mixed("x").models[0].engine
    gpus = [
        sum(p.num_gpus * p.dims.world for p in c.models[0].pools) for c in (ernie_28b_a3b("x"), ernie_424b_a47b("x"))
    ]
    assert gpus == [3, 17]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keys_file": "keys.yaml"}, "must be an absolute path"),
        ({"keys_file": ""}, "must be an absolute path"),
        ({"admin_key_sha256": "sk-s3cret"}, "64 hexadecimal digits"),
        ({"isolate_prefix_cache": True}, "needs keys_file"),
        ({"grpc_tls": TlsConfig("/c", "/k")}, "set it, or for HTTPS a proxy of your own before port = 8000"),
        ({"cors_origins": ("chat.example",)}, "must be like https://"),
        ({"cors_origins": ("https://chat.example/path",)}, "must be like https://"),
    ],
)
def test_access_that_cannot_work(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ApiConfig(**given)
    assert words in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"media_hosts": ("https://images.example.com",)}, "without http:// and path"),
        ({"media_hosts": ("images.example.com/a",)}, "without http:// and path"),
        ({"media_hosts": ("images.*.com",)}, "named as images.example.com"),
        ({"media_hosts": ("a b",)}, "'a b'"),
        ({"media_hosts": ("",)}, "''"),
        ({"media_folder": "media"}, "must be an absolute path"),
        ({"decode_memory_bytes": 2**20}, "at least 536870912"),
        ({"decode_processes": -1}, "at least 0"),
        ({"decode_timeout_s": 0.0}, "greater than 0"),
        ({"media_cache_bytes": -1}, "at least 0"),
    ],
)
def test_media_settings_that_cannot_work(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ApiConfig(**given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "host", ["images.example.com", "*.example.com", "*", "10.0.0.1:9000", "[::1]:80", "under_score"]
)
def test_media_hosts(host: str) -> None:
    assert ApiConfig(media_hosts=(host,)).media_hosts == (host,)


@pytest.mark.parametrize(
    ("host", "keys_file", "is_open"),
    [
        ("127.0.0.1", None, False),
        ("127.8.8.8", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("gpu-1", None, True),
        ("0.0.0.0", "/etc/keys.yaml", False),
    ],
)
def test_who_reaches_an_open_api(host: str, keys_file: str | None, is_open: bool) -> None:
    assert ApiConfig(host=host, keys_file=keys_file).is_open_to_strangers is is_open
