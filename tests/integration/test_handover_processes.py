"""Vision, prefill and decode as three processes joined by shared memory: the tokens of one engine, and a violent death."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection

import pytest
import torch

from ernie_cluster.engine.snapshot import WorkerSnapshot
from ernie_cluster.model.build import Role
from ernie_cluster.request import GenerationRequest
from ernie_cluster.transport.base import Message, Pack, PieceHeader
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver
from tests.tiny import make_request, make_worker
from tests.unit.engine.handover_path import show
from tests.unit.engine.test_laws import answers, requests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd and abstract sockets are Linux's")

TIMEOUT_S = 120.0


# ---- in the children


class EngineProcess:
    """What a child answers: each method is called by its name, with what came through the pipe."""

    def __init__(self, role: Role) -> None:
        torch.set_num_threads(1)
        self.worker, self.outcomes = make_worker(role, piece_bytes=4096, max_batch_tokens=16, lease_timeout_s=TIMEOUT_S)
        self.receiver = SharedMemoryReceiver(self.worker.inbox, 1 << 20)
        self.stack = ExitStack()
        self.has_stalled = threading.Event()
        self.worker.start()

    def address(self) -> str:
        return self.receiver.address

    def open_decode(self, request: GenerationRequest, epoch: int) -> None:
        self.outcomes.errors.pop(request.request_id, None)
        self.outcomes.tokens[request.request_id] = [-1]  # the first token comes from prefill
        self.worker.open_decode(request, epoch)

    def open_prefill(self, request: GenerationRequest, epoch: int, address: str, stall_at: int | None = None) -> None:
        channel = self.stack.enter_context(closing(SharedMemoryChannel(address, "prefill")))
        chosen = channel if stall_at is None else StallingChannel(channel, stall_at, self.has_stalled)
        self.worker.open_prefill(request, epoch, chosen)

    def wait_for_stall(self) -> bool:
        return self.has_stalled.wait(TIMEOUT_S)

    def let_time_pass(self, seconds: float) -> None:
        clock = self.worker.engine.clock
        self.worker.engine.clock = lambda: clock() + seconds

    def finish(self, request_ids: list[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
        """Wait for the end of requests; all tokens and errors so far."""
        self.outcomes.wait_for(request_ids, TIMEOUT_S)
        self.outcomes.drain()
        return self.outcomes.tokens, {key: str(error) for key, error in self.outcomes.errors.items()}

    def snapshot(self) -> WorkerSnapshot:
        assert self.worker.check()
        return self.worker.snapshot()


class StallingChannel:
    """Stands still for ever before a certain piece, once all before it have arrived."""

    def __init__(self, channel: SharedMemoryChannel, stall_at: int, has_stalled: threading.Event) -> None:
        self._channel, self._stall_at, self._has_stalled = channel, stall_at, has_stalled
        self._pushes: list[Future[None]] = []
        self.max_piece_bytes = channel.max_piece_bytes

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        if len(self._pushes) == self._stall_at:
            for push in self._pushes:
                push.result(TIMEOUT_S)
            self._has_stalled.set()
            threading.Event().wait()
        self._pushes.append(self._channel.push(header, pack))
        return self._pushes[-1]

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        return self._channel.call(message, timeout_s)

    def close(self) -> None:
        self._channel.close()


class VisionProcess:
    """A child that encodes."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def show(self, address: str, request: GenerationRequest, epoch: int) -> None:
        with closing(SharedMemoryChannel(address, "vision")) as channel:
            show(channel, request, epoch)


def serve(pipe: Connection, role: Role) -> None:
    """Answer calls until the parent closes the pipe."""
    process = VisionProcess() if role == "vision" else EngineProcess(role)
    with suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            try:
                pipe.send((True, getattr(process, name)(*arguments)))
            except Exception as e:
                pipe.send((False, repr(e)))


# ---- in the parent


class Child:
    """One replica's process."""

    def __init__(self, role: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, role), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, name: str, *arguments: object) -> object:
        """Call a method over there; raises AssertionError with its exception."""
        self._pipe.send((name, arguments))
        assert self._pipe.poll(TIMEOUT_S), f"{name} takes too long"
        is_good, result = self._pipe.recv()
        assert is_good, result
        return result

    def finish(self, request_ids: list[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
        result = self.call("finish", request_ids)
        assert isinstance(result, tuple)
        return result

    def snapshot(self) -> WorkerSnapshot:
        result = self.call("snapshot")
        assert isinstance(result, WorkerSnapshot)
        return result

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join(TIMEOUT_S)

    def close(self) -> None:
        self._pipe.close()
        self.kill()
        self._process.close()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On so small matrices more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vision() -> Iterator[Child]:
    with closing(Child("vision")) as child:
        yield child


@pytest.fixture(scope="module")
def prefill() -> Iterator[Child]:
    with closing(Child("prefill")) as child:
        yield child


@pytest.fixture(scope="module")
def decode() -> Iterator[Child]:
    with closing(Child("decode")) as child:
        yield child


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """One engine does it all."""
    return answers(*make_worker(max_batch_tokens=1024), requests())


def test_three_processes_give_what_one_engine_gives(
    vision: Child, prefill: Child, decode: Child, expected: dict[str, list[int]]
) -> None:
    """Text, one picture, two pictures and a video, greedy and by chance, all at the same time."""
    to_prefill, to_decode = prefill.call("address"), decode.call("address")
    for request in requests():
        decode.call("open_decode", request, 0)
        prefill.call("open_prefill", request, 0, to_decode)
    for request in requests():
        vision.call("show", to_prefill, request, 0)
    decoded, decode_errors = decode.finish(list(expected))
    prefilled, prefill_errors = prefill.finish([])
    assert not {**prefill_errors, **decode_errors}
    assert {key: prefilled[key] + decoded[key][1:] for key in expected} == expected
    sent, received = prefill.snapshot(), decode.snapshot()
    assert received.kv_bytes_received == sent.kv_bytes_sent > 0
    assert received.free_blocks == received.total_blocks


def test_a_prefill_killed_between_pieces_leaves_nothing_and_another_takes_over(prefill: Child, decode: Child) -> None:
    request = make_request(range(200, 240), "doomed", max_tokens=10)
    expected = answers(*make_worker(), [request])
    to_decode = decode.call("address")
    with closing(Child("prefill")) as doomed:
        before = decode.snapshot()
        decode.call("open_decode", request, 0)
        doomed.call("open_prefill", request, 0, to_decode, 3)
        assert doomed.call("wait_for_stall")
        half_way = decode.snapshot()
        assert half_way.num_leases == 1
        assert 0 < half_way.kv_bytes_received - before.kv_bytes_received <= 3 * 4096
        doomed.kill()
    decode.call("let_time_pass", TIMEOUT_S)
    _, errors = decode.finish(["doomed"])
    assert errors == {"doomed": "request doomed: its lease ran out"}
    after = decode.snapshot()
    assert (after.num_leases, after.free_blocks) == (0, after.total_blocks)
    decode.call("open_decode", request, 1)
    prefill.call("open_prefill", request, 1, to_decode)
    decoded, _ = decode.finish(["doomed"])
    prefilled, _ = prefill.finish([])
    assert prefilled["doomed"] + decoded["doomed"][1:] == expected["doomed"]
