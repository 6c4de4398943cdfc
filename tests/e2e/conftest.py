"""One application for the whole folder: several models, each in its own arrangement of pools, on one local Ray.

tiny          vision, prefill, two decode replicas   the disaggregated way
mixed         vision, mixed                          the same checkpoint without a hand-over
small         mixed, 24 KV blocks of 16 tokens       to be over capacity soon
gang          vision, prefill tp 2, decode dp 2      the same answers from ranks with KV heads of their own, experts on the
                                                     move; --slow only
ernie-pocket  vision, prefill, decode                the packaged model, where it is there: answers that can be right
sleepy        mixed                                  goes to sleep when nobody asks; the autoscaler may change nothing else
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from ernie_cluster.cli.local import is_packaged
from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.faults import FaultsConfig
from ernie_cluster.config.image_search import ImageSearchConfig
from ernie_cluster.config.pool import EplbConfig, PoolConfig
from ernie_cluster.config.presets import POCKET, PRESETS
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.config.scaling import AutoscalerConfig
from ernie_cluster.config.tracing import TracingConfig
from ernie_cluster.config.units import MIB
from tests.tiny import tiny_folder

START_TIMEOUT_S = 300.0
SMALL_BLOCKS = 24
SLEEP_S = 10.0
GANG_POOLS = (
    PoolConfig("vision", num_cpus=0.1),
    PoolConfig("prefill", num_cpus=0.1, tp=2, eplb=EplbConfig(enabled=True, interval_steps=2, min_gain=0.0)),
    PoolConfig("decode", num_cpus=0.1, dp=2, eplb=EplbConfig(enabled=True, interval_steps=20, redundant_experts=1)),
)


def pinned(model: ModelDeployment) -> ModelDeployment:
    """The same for an autoscaler that may neither add nor stop any of its replicas."""
    pools = (dataclasses.replace(p, min_replicas=p.num_replicas, max_replicas=p.num_replicas) for p in model.pools)
    return dataclasses.replace(model, pools=tuple(pools))


def build_config(
    folder: str, port: int, grpc_port: int, trace_port: int, *, has_gang: bool, image_search: ImageSearchConfig | None
) -> ClusterConfig:
    """See the module."""
    (tiny,), (mixed,) = (
        [dataclasses.replace(m, engine=dataclasses.replace(m.engine, poison_freed_blocks=True)) for m in preset.models]
        for preset in (PRESETS["tiny"](folder), PRESETS["tiny-mixed"](folder))
    )
    pools = tuple(dataclasses.replace(p, num_replicas=2 if p.role == "decode" else 1) for p in tiny.pools)
    block_bytes = 2 * 16 * 1024  # 16 tokens; 2 KiB of float32 keys and values per token, see the checkpoint
    engine = dataclasses.replace(
        tiny.engine, kv_cache_bytes=(SMALL_BLOCKS + 1) * block_bytes, max_model_len=2048, enable_prefix_cache=False
    )
    sleepy = ModelDeployment(
        "sleepy", folder, (PoolConfig("mixed", num_cpus=0.1),), tiny.engine, floor=0, idle_to_zero_s=SLEEP_S
    )
    split = dataclasses.replace(tiny.engine, kv_placement="split")
    others = (
        dataclasses.replace(tiny, pools=pools, switch_roles=True),
        dataclasses.replace(mixed, name="mixed"),
        ModelDeployment("small", folder, (PoolConfig("mixed", num_cpus=0.1),), engine),
        *((dataclasses.replace(tiny, name="gang", pools=GANG_POOLS, engine=split),) if has_gang else ()),
        *(PRESETS["pocket"](POCKET).models if is_packaged() else ()),
    )
    return ClusterConfig(
        models=(*map(pinned, others), sleepy),
        api=ApiConfig(
            port=port,
            grpc_port=grpc_port,
            max_body_bytes=4 * MIB,
            max_image_bytes=MIB,
            max_image_pixels=1_000_000,
            client_idle_timeout_s=4.0,
            image_search=image_search,
            tracing=TracingConfig(f"http://127.0.0.1:{trace_port}/v1/traces", sample_ratio=0.0),
        ),
        scaling=AutoscalerConfig(down_delay_s=3.0),
        faults=FaultsConfig(enabled=True),
        # the ranks of all these models share two cores, and pause for seconds while others start
        router=RouterConfig(heartbeat_timeout_s=5.0, lease_timeout_s=15.0),
    )


@pytest.fixture(scope="package")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSearchConfig | None:
    """A folder of pictures and its index, made by the command; None without the model that makes it."""
    if not is_packaged():
        return None
    from ernie_cluster.skills.catalog import draw
    from tests.e2e.processes import Program
    from tests.e2e.test_skills import PHOTO_SEEDS

    folder = tmp_path_factory.mktemp("photos")
    for seed in PHOTO_SEEDS:
        draw("zoom", seed).pictures[0].image.save(folder / f"{seed}.png")
    index = tmp_path_factory.mktemp("index") / "photos.index"
    program = Program(["index", str(folder), "--out", str(index)])
    assert program.end(START_TIMEOUT_S)[0] == 0, program.text
    return ImageSearchConfig(str(index), str(folder), "ernie-pocket")


@pytest.fixture(scope="package")
def app(request: pytest.FixtureRequest, photos: ImageSearchConfig | None) -> Iterator[object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token file in the home of whoever runs the tests
        from ernie_cluster.actors import launch
        from ernie_cluster.actors.environment import free_port
        from tests.e2e.application import Application, eventually

        config = build_config(
            tiny_folder(),
            free_port(),
            free_port(),
            free_port(),
            has_gang=request.config.getoption("--slow"),
            image_search=photos,
        )
        application = Application(config)
        launch.check(application.config)
        launch.start_ray(application.config, None, print)
        try:
            launch.start(application.config, print, timeout_s=START_TIMEOUT_S)
            eventually(application.objection_to_ready, 180)  # the second decode replica, too
            yield application
        finally:
            launch.stop(print)


@pytest.fixture
def whole_app(app: object) -> Iterator[object]:
    """For tests that break something: whole before, and whole and at rest again afterwards."""
    from tests.e2e.application import Application, eventually

    assert isinstance(app, Application)
    eventually(app.objection_to_ready, 180)
    yield app
    eventually(app.objection_to_ready, 180)
    eventually(app.objection_to_rest, 60)
