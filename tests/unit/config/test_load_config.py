"""YAML, environment and overrides: round trip, precedence, and what is refused in which words."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.config.api import ApiConfig, TlsConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.load import dump_config, load_config
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.presets import PACKAGED, PRESETS
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.errors import ConfigError

COUNTS = st.integers(1, 2**40)
SECONDS = st.floats(5.5, 1e6)  # more than a heartbeat may take
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1)
NAMES = st.from_regex(r"[\w.:/@+-]+", fullmatch=True)

ENGINES = st.builds(
    EngineConfig,
    block_size=COUNTS.map(lambda n: 256 * n),  # GPUs take no others
    kv_cache_bytes=COUNTS,
    max_batch_tokens=st.integers(64, 2**40),
    enable_prefix_cache=st.booleans(),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    max_model_len=st.none() | st.integers(2, 2**20),
)
POOLS = st.tuples(
    *(
        st.builds(PoolConfig, st.just(role), COUNTS, st.floats(1e-9, 1e9), st.floats(0, 1), tp=st.integers(1, 64))
        for role in ("prefill", "decode", "mixed")
    )
).flatmap(lambda pools: st.sampled_from([pools, pools[:2], pools[2:]]))
DEPLOYMENTS = st.builds(ModelDeployment, NAMES, TEXTS, POOLS, ENGINES)
CONFIGS = st.builds(
    ClusterConfig,
    models=st.lists(DEPLOYMENTS, min_size=1, max_size=2, unique_by=lambda m: m.name).map(tuple),
    router=st.builds(RouterConfig, max_queued_tokens=COUNTS, lease_timeout_s=SECONDS, retry_after_s=SECONDS),
    api=st.builds(ApiConfig, host=TEXTS, port=st.integers(1, 65535), request_timeout_s=SECONDS),
    transport=st.builds(TransportConfig, piece_bytes=st.integers(1, 2**20)),
)


def load(text: str, *overrides: str, env: dict[str, str] | None = None) -> ClusterConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, env or {}, overrides)


TINY = "models: [{preset: tiny, path: /t}]\n"


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029 ", "\n", "数", "\ufeff"])
def test_odd_letters_survive_the_dump(text: str) -> None:
    (model,) = load(TINY).models
    config = ClusterConfig((model,), api=ApiConfig(host=text))
    assert load(dump_config(config)) == config


@given(CONFIGS)
def test_what_is_dumped_loads_back_equal(config: ClusterConfig) -> None:
    assert load(dump_config(config)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_entry_is_the_preset(name: str) -> None:
    assert load(f"models: [{{preset: {name}, path: /m}}]").models == PRESETS[name]("/m").models


@pytest.mark.parametrize(("name", "path"), PACKAGED.items())
def test_a_packaged_preset_brings_its_path(name: str, path: str) -> None:
    assert load(f"models: [{{preset: {name}}}]").models == PRESETS[name](path).models
    (own,) = load(f"models: [{{preset: {name}, path: /m, engine: {{max_num_seqs: 7}}}}]").models
    assert (own.path, own.engine.max_num_seqs) == ("/m", 7)


def test_an_entry_overlays_its_preset() -> None:
    text = """
    models:
      - preset: 28b
        path: /m
        name: mine
        engine: {max_num_seqs: 7}
        pools: [{role: mixed, num_gpus: 0.5}]
    """
    (model,) = load(text).models
    (preset,) = PRESETS["28b"]("/m").models
    assert (model.name, model.engine.max_num_seqs) == ("mine", 7)
    assert model.engine.kv_cache_bytes == preset.engine.kv_cache_bytes
    assert model.pools == (PoolConfig("mixed", num_gpus=0.5),)


def test_overrides_win_over_environment_wins_over_file() -> None:
    text = TINY + "api: {port: 1, max_images: 1, max_json_depth: 11}\n"
    env = {"ERNIE__API__PORT": "2", "ERNIE__API__MAX_IMAGES": "2", "ERNIE_LOG_LEVEL": "DEBUG", "PATH": "/bin"}
    api = load(text, "api.port=3", env=env).api
    assert (api.port, api.max_images, api.max_json_depth) == (3, 2, 11)


def test_what_is_absent_by_default_can_be_given_piece_by_piece() -> None:
    api = load(TINY, "api.grpc_port=9000", "api.grpc_tls.key=/k", env={"ERNIE__API__GRPC_TLS__CERTIFICATE": "/c"}).api
    assert api.grpc_tls == TlsConfig("/c", "/k")


def test_list_items_are_reached_by_index_also_behind_a_preset() -> None:
    (model,) = load(TINY, "models.0.pools.1.num_replicas=3", "models.0.engine.max_num_seqs=5").models
    assert [p.num_replicas for p in model.pools] == [1, 3, 1]
    assert model.engine.max_num_seqs == 5


def test_a_whole_configuration_without_a_file() -> None:
    env = {"ERNIE__MODELS__0__PATH": "/t", "ERNIE__MODELS__0__PRESET": "tiny-mixed"}
    assert load_config(None, env) == PRESETS["tiny-mixed"]("/t")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("models.0.engine.kv_cache_bytes=256MiB", 256 * 2**20),
        ("models.0.engine.kv_cache_bytes=1.5 GiB", 3 * 2**29),
        ("models.0.engine.kv_cache_bytes=2GB", 2 * 10**9),
        ("models.0.engine.kv_cache_bytes=9007199254740993", 2**53 + 1),
        ("models.0.engine.max_model_len=null", None),
        ("models.0.engine.enable_prefix_cache=false", False),
        ("models.0.name=28", "28"),
        ("models.0.path=on", "on"),
        ("models.0.pools.0.num_cpus=1e-3", 0.001),
        ("router.lease_timeout_s=1min", 60.0),
        ("router.lease_timeout_s=45", 45.0),
        ("router.snapshot_interval_s=100ms", 0.1),
        ("transport.kind=local", "local"),
    ],
)
def test_values_are_read_by_the_type_of_their_field(override: str, expected: object) -> None:
    node: object = load(TINY, override)
    for key in override.partition("=")[0].split("."):
        node = node[int(key)] if isinstance(node, tuple) else getattr(node, key)
    assert node == expected
    assert type(node) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {", "not valid YAML"),
        ("- 1", "expected keys and values at the top, got a list"),
        ("", "^models: missing; ClusterConfig needs it$"),
        ("models: []", "models is empty"),
        ("models: {a: 1}", "models: expected a list, got a dict"),
        ("models: [{preset: tiny}]", "models.0.path: missing"),
        ("models: [{preset: tinny, path: x}]", "models.0.preset: unknown preset 'tinny'; did you mean 'tiny'"),
        (TINY + "api: {}\napi: {}", "key 'api' appears twice"),
        (TINY + "apii: {}", "apii: unknown key 'apii'; did you mean 'api'"),
        (TINY + "api: {prot: 1}", "api.prot: unknown key 'prot'; did you mean 'port'"),
        (TINY + "api: {tls: {}}", "api.tls: unknown key 'tls'; did you mean 'grpc_tls'"),
        (TINY + "api: {grpc_port: 1, grpc_tls: {certificate: /c}}", "api.grpc_tls.key: missing; TlsConfig needs it"),
        (TINY + "zzz: 1", "unknown key 'zzz'; known: models, router, api, transport"),
        (TINY + "api: {port: x}", "api.port: expected a whole number, got 'x'"),
        (TINY + "api: {port: true}", "api.port: expected a whole number, got True"),
        (TINY + "api: {port: 80.5}", "api.port: expected a whole number, got 80.5"),
        (TINY + "api: {port: [1]}", "api.port: expected a whole number, got a list"),
        (TINY + "api: {host: 1}", "api.host: expected text, got 1"),
        (TINY + "api: 3", "api: expected keys of ApiConfig, got 3"),
        (TINY + "api: {port: 0}", "^api: port = 0 must be between 1 and 65535$"),
        (TINY + "api: {max_body_bytes: 3 potatoes}", "api.max_body_bytes: .* such as \"256MiB\", got '3 potatoes'"),
        (TINY + "api: {max_body_bytes: 3s}", "api.max_body_bytes: expected bytes"),
        (TINY + "router: {lease_timeout_s: 3MiB}", "router.lease_timeout_s: .* such as \"30s\", got '3MiB'"),
        (TINY + "transport: {kind: pigeon}", "transport.kind: expected one of auto, local, .*, got 'pigeon'"),
        ("models: [{preset: tiny, path: x, engine: {enable_prefix_cache: 1}}]", "expected true or false, got 1"),
        ("models: [!!python/object/apply:os.getcwd []]", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_in_plain_words(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("api.port", "must look like key.path=value"),
        ("=1", "must look like key.path=value"),
        ("api.port=", "api.port: expected a whole number, got None"),
        ("api.port={", "cannot be read as YAML"),
        ("api.port.x=1", "api.port takes no key below it, got 'x'"),
        ("models.x=1", "models takes an index from 0 to 1, got 'x'"),
        ("models.2.name=x", "models takes an index from 0 to 1, got '2'"),
        ("models.1.name=x", "models.1.path: missing"),
    ],
)
def test_a_bad_override_is_refused_in_plain_words(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(TINY + "api: {port: 1}", override)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml", {})
