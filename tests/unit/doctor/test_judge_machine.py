"""What is thought of a machine: tables of facts, good and bad."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.presets import ernie_28b_a3b, pocket_mixed
from ernie_cluster.config.published import PUBLISHED
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.config.units import GIB
from ernie_cluster.doctor import judge_machine
from ernie_cluster.doctor.facts import (
    Card,
    Cpu,
    Disks,
    Gpus,
    Memory,
    Nccl,
    OpenFiles,
    Package,
    Port,
    Program,
    Software,
    Space,
)
from ernie_cluster.doctor.finding import Finding
from ernie_cluster.doctor.need import Need

H100 = Card("NVIDIA H100 80GB HBM3", 81_559 << 20, "580.65.06", (9, 0))
A100 = Card("NVIDIA A100-SXM4-80GB", 81_920 << 20, "580.65.06", (8, 0))
V100 = Card("Tesla V100-SXM2-32GB", 32_768 << 20, "580.65.06", (7, 0))
NONE = Gpus((), "nvidia-smi is not installed")

NOTHING = Need()
ON_CPU = Need(pocket_mixed())
SHAPE = PUBLISHED["28b"]


def on_gpus(quantization: str = "none", num_replicas: int = 1) -> Need:
    """One pool of the 28B model, a GPU per replica."""
    (model,) = ernie_28b_a3b("/models/28b").models
    pool = replace(model.pools[0], role="mixed", num_replicas=num_replicas, num_gpus=1.0, tp=1, dp=1)
    model = replace(model, quantization=quantization, pools=(pool,))  # type: ignore[arg-type]
    return Need(ClusterConfig((model,)), {model.name: SHAPE})


def levels(findings: Iterable[Finding]) -> list[str]:
    """And that each one that is not well says what to do."""
    found = list(findings)
    assert all(f.seen for f in found)
    assert all(f.remedy and f.bound for f in found if f.level in ("warning", "problem"))
    return [f.level for f in found]


RAY = Package("ray", ">=2.60,<2.61", "2.60.0")
GPU = Package("cupy-cuda13x", ">=14", None, "gpu")
NIXL = Package("nixl", ">=1.5,<2", None, "nixl")


@pytest.mark.parametrize(
    ("need", "packages", "expected"),
    [
        (NOTHING, (RAY, GPU, NIXL), ["ok"]),
        (NOTHING, (replace(RAY, found="2.59.1"),), ["problem"]),
        (NOTHING, (replace(RAY, found=None), GPU), ["problem"]),
        (NOTHING, (Package("torch", ">=2.13,<2.14", "2.13.0+cu130"),), ["ok"]),
        (NOTHING, (RAY, replace(GPU, found="13.6.0")), ["warning", "ok"]),
        (Need(replace(pocket_mixed(), transport=TransportConfig(kind="nixl"))), (RAY, NIXL), ["problem"]),
    ],
)
def test_software(need: Need, packages: tuple[Package, ...], expected: list[str]) -> None:
    assert levels(judge_machine.software(need, Software("3.11.9", ">=3.11", packages))) == expected


def test_an_old_python() -> None:
    assert levels(judge_machine.software(NOTHING, Software("3.10.2", ">=3.11", (RAY,)))) == ["problem", "ok"]


@pytest.mark.parametrize(
    ("need", "cores", "flags", "expected"),
    [
        (NOTHING, 8, {"avx2", "amx_bf16"}, "ok"),
        (NOTHING, 8, {"bf16", "sve"}, "ok"),
        (NOTHING, 8, {"avx2"}, "warning"),
        (on_gpus(), 8, {"avx2"}, "ok"),
        (NOTHING, 1, {"amx_bf16"}, "warning"),
    ],
)
def test_cpu(need: Need, cores: int, flags: set[str], expected: str) -> None:
    assert levels(judge_machine.cpu(need, Cpu("a", cores, frozenset(flags)))) == [expected]


def usable(*cards: Card, cuda: str = "13.0") -> Gpus:
    return Gpus(cards, "", cuda, len(cards))


@pytest.mark.parametrize(
    ("need", "facts", "expected"),
    [
        (NOTHING, NONE, ["skipped"]),
        (ON_CPU, NONE, ["skipped"]),
        (on_gpus(), NONE, ["problem"]),
        (replace(on_gpus(), is_whole=False), NONE, ["skipped"]),
        (on_gpus(), usable(H100), ["ok"]),
        (on_gpus(num_replicas=2), usable(H100), ["problem"]),
        (replace(on_gpus(num_replicas=2), is_whole=False), usable(H100), ["ok"]),
        (on_gpus("fp8"), usable(H100), ["ok"]),
        (on_gpus("fp8"), usable(A100), ["problem"]),
        (on_gpus("wint8"), usable(A100), ["ok"]),
        (NOTHING, usable(V100), ["problem"]),
        (NOTHING, usable(H100, cuda=""), ["problem"]),
        (NOTHING, usable(replace(H100, driver="570.10")), ["problem"]),
        (NOTHING, usable(replace(H100, driver="570.10"), cuda="12.8"), ["ok"]),
        (NOTHING, replace(usable(H100, H100), num_usable=1), ["problem"]),
        (NOTHING, usable(H100, A100), ["warning"]),
    ],
)
def test_gpus(need: Need, facts: Gpus, expected: list[str]) -> None:
    assert levels(judge_machine.gpus(need, facts)) == expected


def test_nccl_is_named_by_its_version() -> None:
    (finding,) = judge_machine.nccl(NOTHING, Nccl("14.0.1", 22703), usable(H100))
    assert (finding.level, finding.seen) == ("ok", "cupy 14.0.1 with NCCL 2.27.3")
    assert levels(judge_machine.nccl(NOTHING, Nccl("14.0.1", 22703), NONE)) == ["skipped"]


@pytest.mark.parametrize(
    ("kind", "gpus", "expected"),
    [("auto", NONE, "skipped"), ("auto", usable(H100), "warning"), ("nccl", usable(H100), "problem")],
)
def test_without_cupy(kind: str, gpus: Gpus, expected: str) -> None:
    need = Need(replace(pocket_mixed(), transport=TransportConfig(kind=kind)))  # type: ignore[arg-type]
    assert levels([judge_machine.no_nccl(need, gpus, "cupy is not installed")]) == [expected]


@pytest.mark.parametrize(
    ("number", "holder", "expected"),
    [
        (8000, "", ["ok"]),
        (8000, "nginx (pid 7)", ["problem"]),
        (8000, "haproxy (pid 7)", ["ok"]),
        (6379, "redis-server (pid 7)", ["warning"]),
        (6379, "gcs_server (pid 7)", ["ok"]),
        (6379, "a process of another user", ["warning"]),
    ],
)
def test_ports(number: int, holder: str, expected: list[str]) -> None:
    assert levels(judge_machine.ports(NOTHING, (Port(number, "HTTP", holder),))) == expected


def test_the_remedy_names_the_key_of_the_port() -> None:
    need = Need(replace(pocket_mixed(), api=replace(pocket_mixed().api, port=8100, grpc_port=9100)))
    found = list(judge_machine.ports(need, (Port(8100, "HTTP", "x (pid 1)"), Port(9100, "gRPC", "x (pid 1)"))))
    assert ["api.port=" in found[0].remedy, "api.grpc_port=" in found[1].remedy] == [True, True]


@pytest.mark.parametrize(
    ("path", "version", "expected"),
    [("/usr/sbin/haproxy", "HAProxy version 2.8.25", "ok"), ("", "", "problem"), ("", "x cannot be run", "problem")],
)
def test_haproxy(path: str, version: str, expected: str) -> None:
    assert levels(judge_machine.haproxy(NOTHING, Program(path, version))) == [expected]


@pytest.mark.parametrize(
    ("total", "free", "expected"),
    [(64 << 20, 64 << 20, "problem"), (GIB, GIB, "warning"), (32 * GIB, 31 * GIB, "ok"), (32 * GIB, 0, "problem")],
)
def test_shm(total: int, free: int, expected: str) -> None:
    memory = Memory(64 * GIB, 60 * GIB)
    assert levels(judge_machine.shm(NOTHING, Space("/dev/shm", total, free), memory)) == [expected]


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [(1024, 1024, "warning"), (1024, 65_536, "ok"), (8192, 8192, "ok"), (1024, -1, "ok"), (1024, 8191, "warning")],
)
def test_open_files(soft: int, hard: int, expected: str) -> None:
    assert levels(judge_machine.open_files(NOTHING, OpenFiles(soft, hard))) == [expected]


@pytest.mark.parametrize(
    ("need", "total", "available", "expected"),
    [
        (NOTHING, GIB, GIB, "problem"),
        (NOTHING, 8 * GIB, GIB, "warning"),
        (NOTHING, 8 * GIB, 6 * GIB, "ok"),
        (replace(ON_CPU, shapes={ON_CPU.config.models[0].name: SHAPE}), 16 * GIB, 16 * GIB, "problem"),  # type: ignore[union-attr]
        (replace(ON_CPU, shapes={ON_CPU.config.models[0].name: SHAPE}, is_whole=False), 16 * GIB, 9 * GIB, "ok"),  # type: ignore[union-attr]
        (on_gpus(), 16 * GIB, 16 * GIB, "ok"),
    ],
)
def test_memory(need: Need, total: int, available: int, expected: str) -> None:
    assert levels(judge_machine.memory(need, Memory(total, available))) == [expected]


@pytest.mark.parametrize(
    ("ray_free", "models_free", "missing", "expected"),
    [
        (50, 50, (), ["ok", "ok"]),
        (4, 50, (), ["problem", "ok"]),
        (50, 10, (), ["ok", "ok"]),
        (50, 10, ("baidu/x",), ["ok", "warning"]),
        (50, 90, ("baidu/x",), ["ok", "ok"]),
    ],
)
def test_disks(ray_free: int, models_free: int, missing: tuple[str, ...], expected: list[str]) -> None:
    facts = Disks(Space("/models", 100 * GIB, models_free * GIB), Space("/tmp", 100 * GIB, ray_free * GIB), missing)
    assert levels(judge_machine.disks(NOTHING, facts)) == expected
