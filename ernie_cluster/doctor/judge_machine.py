"""What to think of a machine's facts: pure, one function per check; each says what it saw even where all is well."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from ernie_cluster.config.quantization import FIRST_WITH_FP8
from ernie_cluster.config.units import GIB
from ernie_cluster.doctor.facts import (
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
from ernie_cluster.policy.sizing.pools import gigabytes

FIRST_WITH_BF16 = (8, 0)
"""Compute capability of Ampere."""
DRIVERS = {12: 525, 13: 580}
"""CUDA -> the first driver that runs it. Source: NVIDIA, CUDA compatibility, table of minor versions."""
STORE_SHARE = 0.3
"""Of a node's memory that Ray's object store wants in /dev/shm. Source: `ray start --help`, --object-store-memory."""
LEAST_STORE_BYTES = 512 << 20
"""For prompts' pictures and KV that travel by it, in a cluster of small models."""
OPEN_FILES = 8192
"""Source: Ray's own warning, which asks for as many."""
LEAST_CORES = 2
RAY_BYTES = 2 * GIB
"""Of Ray's and Serve's own processes on one machine."""
FULL_DISK = 0.95
"""Ray makes no objects on a disk that is fuller. Source: its option local_fs_capacity_threshold."""
MODELS_BYTES = 20 * GIB
"""Free space below which a model that is not there yet will hardly fit."""


def software(need: Need, facts: Software) -> Iterator[Finding]:
    name, wanted = "software", facts.wanted_python
    if not SpecifierSet(wanted).contains(facts.python, prereleases=True):
        yield Finding(
            name, "problem", f"Python {facts.python}", wanted, f"make a virtual environment of Python {wanted}"
        )
    bad = [p for p in facts.packages if _is_needed(p, need) and not _fits(p)]
    for package in bad:
        what = f'"ernie-cluster[{package.extra}]"' if package.extra else "ernie-cluster"
        seen = f"{package.name} {package.found or 'is not installed'}"
        yield Finding(name, "problem", seen, package.wanted or "any", f"pip install --upgrade {what}")
    for package in facts.packages:
        if package.extra and package not in bad and package.found is not None and not _fits(package):
            remedy = f'pip install --upgrade "ernie-cluster[{package.extra}]", or remove it'
            yield Finding(name, "warning", f"{package.name} {package.found}", package.wanted, remedy)
    if not bad:
        shown = {p.name: p.found for p in facts.packages if p.found}
        versions = ", ".join(f"{n} {shown[n]}" for n in ("ray", "torch", "transformers", "grpcio") if n in shown)
        yield Finding(name, "ok", f"Python {facts.python}, {versions}")


def _is_needed(package: Package, need: Need) -> bool:
    if package.extra == "nixl":
        return need.config is not None and need.config.transport.kind == "nixl"
    return not package.extra  # what GPUs need is judged beside them


def _fits(package: Package) -> bool:
    return package.found is not None and SpecifierSet(package.wanted).contains(package.found, prereleases=True)


def cpu(need: Need, facts: Cpu) -> Iterator[Finding]:
    fast = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in facts.flags]
    seen = f"{facts.name}, {facts.num_cores} cores, {', '.join(fast) or 'no bfloat16 instructions'}"
    if facts.num_cores < LEAST_CORES:
        remedy = "give the container more cores: an engine, the router, the API and Ray share them"
        yield Finding("cpu", "warning", seen, f"at least {LEAST_CORES} cores", remedy)
    elif need.uses_cpu and not fast:
        remedy = "replicas on CPU will be several times slower; take a Sapphire Rapids or Zen 4, or newer, or GPUs"
        yield Finding("cpu", "warning", seen, "amx_bf16, avx512_bf16 or bf16", remedy)
    else:
        yield Finding("cpu", "ok", seen)


def gpus(need: Need, facts: Gpus) -> Iterator[Finding]:
    if not facts.cards:
        if need.num_gpus and need.is_whole:
            remedy = "run this on the machines with GPUs, or with --cluster; or set num_gpus to 0"
            yield Finding("gpus", "problem", f"none: {facts.note}", f"{need.num_gpus:g} GPUs", remedy)
        else:
            yield Finding("gpus", "skipped", facts.note)
        return
    first = facts.cards[0]
    seen = f"{len(facts.cards)} x {first.name}, {gigabytes(first.memory_bytes)}, driver {first.driver}"
    found = list(_gpu_faults(need, facts))
    yield from found or [Finding("gpus", "ok", f"{seen}, CUDA {facts.cuda}")]


def _gpu_faults(need: Need, facts: Gpus) -> Iterator[Finding]:
    def problem(seen: str, bound: str, remedy: str) -> Finding:
        return Finding("gpus", "problem", seen, bound, remedy)

    num, card = len(facts.cards), min(facts.cards, key=lambda c: c.capability)
    if not facts.cuda:
        yield problem("torch is built for CPU only", "CUDA", "pip install torch from PyPI or PyTorch's index for CUDA")
    elif (driver := _major(card.driver)) < (least := DRIVERS.get(_major(facts.cuda), 0)):
        yield problem(f"driver {driver} with CUDA {facts.cuda}", f"at least {least}", "install a newer NVIDIA driver")
    elif facts.num_usable < num:
        remedy = "check CUDA_VISIBLE_DEVICES, MIG and the container's access to /dev/nvidia*"
        yield problem(f"torch sees {facts.num_usable} of {num} GPUs", f"{num}", remedy)
    if need.is_whole and need.num_gpus > num:
        remedy = "lower num_replicas, tp or dp, or serve on a Ray cluster of several machines (--cluster checks one)"
        yield problem(f"{num} GPUs", f"{need.num_gpus:g} GPUs", remedy)
    capability = f"{card.name} has compute capability {_dotted(card.capability)}"
    if card.capability < FIRST_WITH_BF16:
        yield problem(capability, f"at least {_dotted(FIRST_WITH_BF16)} for bfloat16", "take an A100 or newer")
    elif "fp8" in need.quantizations and card.capability < FIRST_WITH_FP8:
        yield problem(capability, f"at least {_dotted(FIRST_WITH_FP8)} for fp8", "set quantization to wint8")
    if len({(c.name, c.memory_bytes) for c in facts.cards}) > 1:
        kinds = ", ".join(sorted({c.name for c in facts.cards}))
        remedy = "give pools node_labels or separate machines: a gang is as slow and small as its least GPU"
        yield Finding("gpus", "warning", f"different kinds: {kinds}", "one kind per machine", remedy)


def _major(version: str) -> int:
    digits = version.partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def nccl(need: Need, facts: Nccl, gpus: Gpus) -> Iterator[Finding]:
    if not gpus.cards:
        yield Finding("nccl", "skipped", f"cupy {facts.cupy}, but no GPU: {gpus.note}")
        return
    major, minor, patch = facts.version // 10_000, facts.version // 100 % 100, facts.version % 100
    yield Finding("nccl", "ok", f"cupy {facts.cupy} with NCCL {major}.{minor}.{patch}")


def no_nccl(need: Need, gpus: Gpus, reason: str) -> Finding:
    """Where cupy, or its NCCL, cannot be had."""
    if not gpus.cards:
        return Finding("nccl", "skipped", f"no GPU: {gpus.note}")
    wished = need.config is not None and need.config.transport.kind in ("ipc", "nccl")
    return Finding(
        "nccl",
        "problem" if wished else "warning",
        reason,
        "cupy, for KV that goes from GPU to GPU",
        'pip install "ernie-cluster[gpu]"; without it KV goes through host memory',
    )


def ports(need: Need, facts: tuple[Port, ...]) -> Iterator[Finding]:
    for port in facts:
        seen = f"{port.number} ({port.what})"
        is_api = port.number in need.ports
        if not port.holder:
            continue
        if port.is_ray:
            yield Finding("ports", "ok", f"{seen} is held by {port.holder}: Ray runs here")
        elif is_api:
            key = "port" if port.what == "HTTP" else "grpc_port"
            remedy = f"end it, or choose another: --set api.{key}=PORT"
            yield Finding("ports", "problem", f"{seen} is held by {port.holder}", "free", remedy)
        else:
            remedy = "only `ray start` wants it, and can be told another one; `serve` without --address does not"
            yield Finding("ports", "warning", f"{seen} is held by {port.holder}", "free", remedy)
    free = [f"{p.number} ({p.what})" for p in facts if not p.holder]
    if free:
        yield Finding("ports", "ok", f"free: {', '.join(free)}")


def haproxy(need: Need, facts: Program) -> Iterator[Finding]:
    if facts.path:
        yield Finding("haproxy", "ok", f"{facts.version.partition(' - ')[0]} at {facts.path}")
        return
    remedy = 'pip install "ray[serve]", which brings one, or the system\'s package haproxy'
    yield Finding("haproxy", "problem", facts.version or "not found", "an executable, for Serve's proxy", remedy)


def shm(need: Need, facts: Space, memory: Memory) -> Iterator[Finding]:
    """Pieces between replicas of a node lie in nameless memory files, which no mount bounds; the object store does not."""
    wanted = int(STORE_SHARE * memory.total_bytes)
    seen = f"{gigabytes(facts.free_bytes)} of {gigabytes(facts.total_bytes)} free in {facts.path}"
    remedy = "docker run --shm-size, or in Kubernetes an emptyDir of medium Memory at /dev/shm"
    if facts.free_bytes < LEAST_STORE_BYTES:
        yield Finding("shm", "problem", seen, f"at least {gigabytes(LEAST_STORE_BYTES)} for Ray's object store", remedy)
    elif facts.total_bytes < wanted:
        bound = f"{gigabytes(wanted)}, {STORE_SHARE:.0%} of memory: else Ray's object store is smaller, or on disk"
        yield Finding("shm", "warning", seen, bound, f"{remedy}; or `ray start --object-store-memory`")
    else:
        yield Finding("shm", "ok", seen, f"{gigabytes(wanted)} for Ray's object store")


def open_files(need: Need, facts: OpenFiles) -> Iterator[Finding]:
    hard = facts.hard if facts.hard >= 0 else 2**63
    seen, bound = f"ulimit -n {facts.soft}, up to {'any' if facts.hard < 0 else facts.hard}", f"at least {OPEN_FILES}"
    if hard < OPEN_FILES:
        remedy = f"raise the hard limit: LimitNOFILE of the service, or docker run --ulimit nofile={OPEN_FILES}"
        yield Finding("open_files", "warning", seen, bound, f"{remedy}; each connection takes two")
    else:
        yield Finding("open_files", "ok", seen, bound)


def memory(need: Need, facts: Memory) -> Iterator[Finding]:
    seen = f"{gigabytes(facts.available_bytes)} of {gigabytes(facts.total_bytes)} available"
    wanted = RAY_BYTES + ((need.host_bytes or 0) if need.is_whole else 0)
    bound = f"{gigabytes(wanted)} for Ray" + (" and the pools without GPUs" if wanted > RAY_BYTES else "")
    if facts.total_bytes < wanted:
        remedy = "lower engine.kv_cache_bytes, host_cache_bytes or num_replicas, or take a larger machine"
        yield Finding("memory", "problem", seen, bound, remedy)
    elif facts.available_bytes < wanted:
        yield Finding("memory", "warning", seen, bound, "end other programs first; what runs already counts, too")
    else:
        yield Finding("memory", "ok", seen, bound)


def disks(need: Need, facts: Disks) -> Iterator[Finding]:
    ray, models = facts.ray, facts.models
    seen = f"{gigabytes(ray.free_bytes)} of {gigabytes(ray.total_bytes)} free in {ray.path}"
    if ray.free_bytes < (1 - FULL_DISK) * ray.total_bytes:
        bound = f"at least {1 - FULL_DISK:.0%} free: on a fuller disk Ray makes no objects"
        yield Finding("disks", "problem", seen, bound, "make room, or name another folder: `ray start --temp-dir`")
    else:
        yield Finding("disks", "ok", f"{seen}, for Ray")
    seen = f"{gigabytes(models.free_bytes)} free for models in {models.path}"
    if facts.missing_models and models.free_bytes < MODELS_BYTES:
        bound = f"{gigabytes(MODELS_BYTES)} or more for {', '.join(facts.missing_models)}, to be fetched"
        yield Finding("disks", "warning", seen, bound, "make room, or set HF_HOME to a larger disk")
    else:
        yield Finding("disks", "ok", seen)
