"""Groups of nodes hold what the configuration asks for, whatever machines there are; and say what they cannot."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.checks import label_selector
from ernie_cluster.config.load import from_tree
from ernie_cluster.config.scaling import AutoscalerConfig
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.sizing.check import check_fit
from ernie_cluster.policy.sizing.gpus import GPUS
from ernie_cluster.render.brief import arguments
from ernie_cluster.render.files import CLOUDS
from ernie_cluster.render.groups import NodeGroup, gpus_of, node_groups
from ernie_cluster.render.machines import MACHINES, Cloud, machines_of
from ernie_cluster.render.pods import GPU_PRODUCTS
from ernie_cluster.render.setup import SETUPS, Setup, config_setup, labelled, preset_setup
from tests.unit.render.consistency import node_faults


def with_replicas(setup: Setup, *numbers: int) -> Setup:
    """The pools of each model in turn, with so many replicas."""
    models = tuple(
        replace(m, pools=tuple(replace(p, num_replicas=n) for p, n in zip(m.pools, numbers, strict=False)))
        for m in setup.config.models
    )
    return replace(setup, config=replace(setup.config, models=models))


def nodes(groups: tuple[NodeGroup, ...]) -> list[tuple[dict[str, str], int, float, float]]:
    return [(label_selector(g.labels), g.nodes, float(g.cpus), float(g.gpus)) for g in groups]


@settings(max_examples=30)
@given(
    name=st.sampled_from(list(SETUPS)),
    cloud=st.sampled_from(CLOUDS),
    fill=st.booleans(),
    numbers=st.tuples(*[st.integers(1, 20)] * 3),
)
def test_nodes_hold_every_replica_as_a_whole(name: str, cloud: Cloud, fill: bool, numbers: tuple[int, ...]) -> None:
    setup = with_replicas(preset_setup(name, "/models"), *numbers)
    groups = node_groups(setup, machines_of(cloud, ()), fill=fill)
    assert node_faults(setup.config, nodes(groups)) == []
    needed = math.fsum(p.num_replicas * p.dims.world * p.num_gpus for m in setup.config.models for p in m.pools)
    assert sum(g.nodes * g.gpus for g in groups) >= needed
    for group in groups:
        assert group.gpus <= group.machine.gpus
        assert group.all_cpus <= group.machine.cpus
        assert group.memory_bytes <= group.machine.memory_bytes
        assert group.object_store_bytes <= group.shm_bytes < group.memory_bytes
        assert (group.nodes - 1) * group.per_node < group.num_replicas, "a node too many"
    assert from_tree(arguments(setup), {}) == setup.config


def test_every_group_has_a_label_of_its_own() -> None:
    for name in SETUPS:
        groups = node_groups(preset_setup(name, "/models"), machines_of("on-prem", ()), fill=False)
        assert len({g.labels for g in groups}) == len({g.name for g in groups}) == len(groups)
        assert all(g.labels == (f"pool={g.name}",) for g in groups)


def test_large_machines_are_filled_and_pods_hold_one() -> None:
    setup = with_replicas(preset_setup("28b", "/models"), 3, 11, 11)
    filled = {g.name: g for g in node_groups(setup, machines_of("aws", ["p5.48xlarge"]), fill=True)}
    assert (filled["prefill"].per_node, filled["prefill"].nodes, filled["prefill"].gpus) == (8, 2, 8)
    assert (filled["vision"].per_node, filled["vision"].nodes) == (3, 1)
    pods = {g.name: g for g in node_groups(setup, machines_of("aws", ["p5.48xlarge"]), fill=False)}
    assert (pods["prefill"].per_node, pods["prefill"].nodes, pods["prefill"].gpus) == (1, 11, 1)


@pytest.mark.parametrize(
    ("share", "replicas", "gpus"), [(0.0, 9, 0), (1.0, 9, 9), (0.5, 9, 5), (0.4, 9, 5), (0.3, 9, 3)]
)
def test_parts_of_gpus_are_never_spread_over_two(share: float, replicas: int, gpus: int) -> None:
    (model,) = preset_setup("28b", "/models").config.models
    assert gpus_of(replace(model.pools[1], num_gpus=share), replicas) == gpus


def test_the_machines_chosen_are_those_that_the_plan_accepts() -> None:
    for name in SETUPS:
        setup = preset_setup(name, "/models")
        for cloud in CLOUDS:
            groups = node_groups(setup, machines_of(cloud, ()), fill=True)
            largest = max((GPUS[g.machine.gpu] for g in groups if g.gpus), key=lambda g: g.memory_bytes, default=None)
            check_fit(setup.config, setup.shapes, [] if largest is None else [largest], None)


@pytest.mark.parametrize(
    ("name", "only", "words"),
    [
        ("424b", ["p5.4xlarge"], "pool prefill: a replica fits on no machine with GPUs"),
        ("424b", ["p5.48xlarge"], "weights 105.9"),
        ("28b", ["p5.9xlarge"], "known on aws are"),
    ],
)
def test_what_fits_nowhere_is_refused_with_the_reason(name: str, only: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        node_groups(preset_setup(name, "/models"), machines_of("aws", only), fill=True)


def test_a_gang_larger_than_any_machine_is_refused() -> None:
    setup = preset_setup("424b", "/models")
    (model,) = setup.config.models
    pools = tuple(replace(p, dp=2) if p.role == "decode" else p for p in model.pools)
    large = replace(setup, config=replace(setup.config, models=(replace(model, pools=pools),)))
    with pytest.raises(ConfigError, match="takes 16 GPUs, all on one node, and it has 8"):
        node_groups(large, machines_of("gcp", ()), fill=True)


def test_where_replicas_follow_the_load_nodes_may_become_as_many_as_the_budget_holds() -> None:
    setup = preset_setup("28b", "/models")
    scaled = replace(setup, config=replace(setup.config, scaling=AutoscalerConfig(budget=6)))
    groups = {g.name: g for g in node_groups(scaled, machines_of("on-prem", ()), fill=False)}
    assert {n: (g.nodes, g.max_nodes) for n, g in groups.items()} == {
        "api": (2, 2), "vision": (1, 6), "prefill": (1, 6), "decode": (1, 6)
    }  # fmt: skip


def test_labels_of_ones_own_stay() -> None:
    tree = {
        "models": [{"preset": "pocket"}],
        "api": {"node_labels": ["front=yes"]},
    }
    setup = config_setup(from_tree(tree, {}), "mine")
    assert setup.config.api.node_labels == ("front=yes",)
    assert [p.node_labels for p in setup.config.models[0].pools] == [
        ("pool=vision",),
        ("pool=prefill",),
        ("pool=decode",),
    ]
    assert labelled(setup) == setup
    assert from_tree(arguments(setup), {}) == setup.config


def test_catalogues_name_gpus_that_the_plan_knows_smallest_first() -> None:
    for machines in MACHINES.values():
        gpus = [m for m in machines if m.gpus]
        assert all(m.gpu in GPUS and m.gpu in GPU_PRODUCTS for m in gpus)
        assert [m.gpus * GPUS[m.gpu].memory_bytes for m in gpus] == sorted(
            m.gpus * GPUS[m.gpu].memory_bytes for m in gpus
        )
