"""Facts of this machine: what is parsed, what is really found, and tools that are missing, broken or late."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ernie_cluster.cli.quantize_run import quantise
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.presets import pocket_mixed
from ernie_cluster.config.quantization import METHODS
from ernie_cluster.doctor import gpu_pair, machine, tcp
from ernie_cluster.doctor.checkpoints import MAX_FAULTS, inspect
from ernie_cluster.doctor.facts import Card, Memory, Missing
from ernie_cluster.doctor.gather import gather
from ernie_cluster.doctor.need import Need
from ernie_cluster.doctor.ports import ports, sockets_of
from ernie_cluster.errors import ConfigError, TransferFailed
from tests import synthetic
from tests.shapes import SMALL
from tests.unit.model.test_checkpoint import GATE, NORM, change, change_header, change_index, file_of
from tests.unit.transport.gpu_twin import TwinGpu

# Parsing


def test_cpus_of_two_makers() -> None:
    intel = "processor\t: 0\nmodel name\t: Xeon 8481C\nflags\t\t: fpu avx512_bf16 amx_bf16\n\nprocessor\t: 1\n"
    arm = "processor\t: 0\nFeatures\t: fp asimd bf16\n"
    assert machine.cpu_of(intel, 4).flags == {"fpu", "avx512_bf16", "amx_bf16"}
    assert machine.cpu_of(intel, 4).name == "Xeon 8481C"
    assert machine.cpu_of(arm, 4).flags == {"fp", "asimd", "bf16"}
    assert machine.cpu_of("", 1).flags == frozenset()


def test_cards() -> None:
    text = "NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0\n\nNVIDIA A100, SXM, 40960, 535.1, 8.0\n"
    assert machine.cards_of(text) == (
        Card("NVIDIA H100 80GB HBM3", 81_559 << 20, "580.65.06", (9, 0)),
        Card("NVIDIA A100, SXM", 40_960 << 20, "535.1", (8, 0)),
    )
    with pytest.raises(ValueError, match="N/A"):
        machine.cards_of("NVIDIA H100, [N/A], 580, 9.0")


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (None, 0, Memory(16 << 20, 8 << 20)),
        (4 << 20, 1 << 20, Memory(4 << 20, 3 << 20)),
        (12 << 20, 1 << 20, Memory(12 << 20, 8 << 20)),
        (2**63, 0, Memory(16 << 20, 8 << 20)),
    ],
)
def test_a_container_has_what_its_limit_leaves(limit: int | None, used: int, expected: Memory) -> None:
    text = "MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\nHugePages_Total:  0\n"
    assert machine.memory_of(text, limit, used) == expected


def test_only_sockets_that_listen_count() -> None:
    text = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0\n"
        "   1: 0100007F:18EB 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 12346 1 0\n"
        "   2: 00000000000000000000000000000000:2380 0:0 0A 0:0 00:0 0     0        0 777 1 0\n"
    )
    assert sockets_of(text) == [(8000, "12345"), (9088, "777")]


# What there really is


def test_a_port_names_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        number = held.getsockname()[1]
        need = Need(_with_port(number))
        (port,) = [port for port in ports(need) if port.number == number]
    assert port.what == "HTTP"
    assert port.holder.endswith(f"(pid {os.getpid()})")
    (port,) = [port for port in ports(need) if port.number == number]
    assert port.holder == ""


def test_this_machine_tells_of_itself() -> None:
    names = ("software", "cpu", "haproxy", "shm", "open_files", "memory", "disks")
    facts = gather(names, Need(pocket_mixed()))
    assert {name: fact for name, fact in facts.items() if isinstance(fact, Missing)} == {}
    assert {"ray", "torch", "grpcio"} <= {package.name for package in facts["software"].packages}
    assert not {"pytest", "ruff"} & {package.name for package in facts["software"].packages}
    assert 0 < facts["memory"].available_bytes <= facts["memory"].total_bytes
    assert facts["disks"].missing_models == ()


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not installed" in machine.gpus(Need()).note
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    tool.chmod(0o755)
    assert machine.gpus(Need()).note == "nvidia-smi: NVIDIA-SMI has failed"


def test_a_repository_that_was_never_fetched_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    need = Need(_with_path("baidu/ernie@v1"))
    assert machine.disks(need).missing_models == ("baidu/ernie@v1",)
    (tmp_path / "models--baidu--ernie" / "snapshots").mkdir(parents=True)
    assert machine.disks(need).missing_models == ()


# Deadlines


def test_what_raises_or_is_late_is_missing_and_the_rest_is_there() -> None:
    late = threading.Event()

    def fail(need: Need) -> object:
        raise OSError("no such device")

    def refuse(need: Need) -> object:
        raise ConfigError("cupy is not installed")

    gatherers: dict[str, Callable[[Need], object]] = {
        "good": lambda need: 1,
        "failing": fail,
        "refusing": refuse,
        "late": lambda need: late.wait(),
    }
    try:
        assert gather(gatherers, Need(), lambda name: 0.2 if name == "late" else 20.0, gatherers) == {
            "good": 1,
            "failing": Missing("OSError: no such device"),
            "refusing": Missing("cupy is not installed"),
            "late": Missing("no answer within 0.2 s"),
        }
    finally:
        late.set()


# Checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole small checkpoint in several files."""
    synthetic.write_checkpoint(tmp_path / "m", SMALL, max_file_bytes=20_000)
    return tmp_path / "m"


def test_a_whole_checkpoint(folder: Path) -> None:
    found = inspect("m", folder)
    assert found.faults == ()
    assert found.num_files == len(list(folder.glob("*.safetensors")))
    assert 0 < found.num_bytes < sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("method", ["wint8", "wint4"])
def test_a_quantised_checkpoint(folder: Path, tmp_path: Path, method: str) -> None:
    quantise(folder, tmp_path / "q", METHODS[method])
    assert inspect("m", tmp_path / "q").faults == ()
    change_header(tmp_path / "q", NORM, lambda fields: fields.update(shape=[1, *fields["shape"]]))
    assert NORM in inspect("m", tmp_path / "q").faults[0]


def _cut(folder: Path) -> None:
    path = file_of(folder, NORM)
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: change(folder, NORM, lambda tensors: tensors.pop(NORM)), "is not in it"),
        (lambda folder: change_index(folder, lambda index: index.pop(NORM)), "is missing"),
        (lambda folder: change(folder, GATE, lambda t: t.update({GATE: t[GATE][:-1].clone()})), "has shape"),
        (lambda folder: change_index(folder, lambda index: index.update(strange=index[NORM])), "has no place"),
        (lambda folder: file_of(folder, NORM).unlink(), "not there"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: not found"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (_cut, "truncated"),
    ],
    ids=["lacking", "unlisted", "shape", "strange", "file", "config", "json", "cut"],
)
def test_a_damaged_checkpoint_tells_its_faults(folder: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(folder)
    faults = inspect("m", folder).faults
    assert any(words in fault for fault in faults)
    assert len(set(faults)) == len(faults) <= MAX_FAULTS


def test_several_faults_are_told_together(folder: Path) -> None:
    change_index(folder, lambda index: [index.pop(name) for name in (NORM, GATE)])
    assert [name for name in (NORM, GATE) if any(name in fault for fault in inspect("m", folder).faults)] == [
        NORM,
        GATE,
    ]


# Between machines


def test_a_round_trip_and_a_throughput_over_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "BULK_BYTES", 2 << 20)
    trip_s, rate = tcp.measure("127.0.0.1", tcp.offer("127.0.0.1"))
    assert 0 < trip_s < tcp.TIMEOUT_S
    assert rate > 0


def test_where_nobody_listens_or_the_other_end_leaves_it_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(OSError, match=r"."):
            tcp.measure("127.0.0.1", port)
    with pytest.raises(OSError, match=r"."):
        tcp.measure("127.0.0.1", port)


class _Meeting:
    """`cupy.cuda.nccl` of two threads that share tensors by their addresses."""

    NCCL_INT32, NCCL_SUM, NCCL_UINT8 = "int32", "sum", "uint8"

    def __init__(self, *, spoilt: bool) -> None:
        self.barrier, self.spoilt, self.num_aborted = threading.Barrier(2, timeout=10), spoilt, 0
        self.values: dict[int, torch.Tensor] = {}

    def NcclCommunicator(self, num: int, uid: object, rank: int) -> SimpleNamespace:
        def all_reduce(send: int, receive: int, count: int, kind: str, op: str, stream: int) -> None:
            self.barrier.wait()
            total = sum(self.values.values())
            self.barrier.wait()
            self.values[rank].copy_(total + int(self.spoilt))  # type: ignore[arg-type]

        def move(pointer: int, count: int, kind: str, peer: int, stream: int) -> None:
            assert peer == 1 - rank
            self.barrier.wait()

        def abort() -> None:
            self.num_aborted += 1

        return SimpleNamespace(allReduce=all_reduce, send=move, recv=move, abort=abort)


class _Gpu(TwinGpu):
    """Tells the meeting what it sums."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        super().__init__()
        self.nccl, self._meeting, self._rank = meeting, meeting, rank

    def allocate(self, nbytes: int) -> torch.Tensor:
        data = super().allocate(nbytes)
        self._meeting.values.setdefault(self._rank, data.view(torch.int32))
        return data

    def pointer(self, stream: object) -> int:
        return 0


def met(spoilt: bool) -> tuple[list[object], _Meeting]:
    """What each rank got, or raised."""
    meeting, results = _Meeting(spoilt=spoilt), [None, None]

    def run(rank: int) -> None:
        try:
            results[rank] = gpu_pair.meet(_Gpu(meeting, rank), b"", rank)  # type: ignore[call-overload]
        except TransferFailed as e:
            results[rank] = e  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return list(results), meeting


def test_two_gpus_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pair, "BULK_BYTES", 1 << 16)
    rates, meeting = met(spoilt=False)
    assert all(isinstance(rate, float) and rate > 0 for rate in rates)
    assert meeting.num_aborted == 2


def test_a_wrong_sum_is_an_error_and_the_communicator_ends() -> None:
    errors, meeting = met(spoilt=True)
    assert all("does not give 3" in str(error) for error in errors)
    assert meeting.num_aborted == 2


def _with_port(number: int) -> ClusterConfig:
    return replace(pocket_mixed(), api=replace(pocket_mixed().api, port=number))


def _with_path(path: str) -> ClusterConfig:
    config = pocket_mixed()
    return replace(config, models=(replace(config.models[0], path=path),))
