"""Processes that decode pictures and videos, so that no file can take this one's memory, time or life.

They are started as fresh programs: a fork would copy an event loop and threads. A process that dies is replaced. The
price beside decoding is two copies through a socket, of the file and of the patches: 3 ms for those of a large picture.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ernie_cluster.errors import InvalidRequest, ReplicaLost
from ernie_cluster.inputs.decoder import READY, receive_answer, send_request
from ernie_cluster.inputs.images import PreparedMedia
from ernie_cluster.inputs.messages import Media, Settings

_log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
"""For a new process to load what it needs: half a second on an idle machine."""
GRACE_S = 5.0
"""What a process gets beyond its own alarm before it is killed from outside."""

_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT")
"""A decoder needs none of the secrets in the environment."""


@dataclass(frozen=True, slots=True)
class DecoderLimits:
    """What one picture or video may cost."""

    timeout_s: float = 30.0
    """Wall time from file to patches."""
    memory_bytes: int = 2 * 2**30
    """Address space of a process, of which 300 MB are its libraries."""


class Decoders:
    """Owns the processes, and a thread for each that talks to it.

    Args:
        num_processes: at least 1.
        limits: of each picture or video.
    """

    def __init__(self, num_processes: int, limits: DecoderLimits) -> None:
        self._num_processes = num_processes
        self._limits = limits
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="decoder")
        self._idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        for _ in range(num_processes):
            self._idle.put(_Decoder(limits))

    def map(self, settings: Settings, media: Iterable[Media]) -> Iterator[PreparedMedia]:
        """A `MapMedia`: what was made of each, in order.

        One call has at most as many under way as there are processes, so that a request with many pictures does not
        stand before all others.

        Raises:
            InvalidRequest, ContextTooLong: as without processes; also for what takes too long, or too much memory.
            ReplicaLost: the process died twice over the same file, for no reason that is the file's fault for sure.
        """
        under_way: deque[Future[PreparedMedia]] = deque()
        try:
            for item in media:
                under_way.append(self._threads.submit(self._prepare, settings, item))
                if len(under_way) == self._num_processes:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()

    def close(self) -> None:
        """End the processes, once what they are at is done."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().close()

    def _prepare(self, settings: Settings, media: Media) -> PreparedMedia:
        decoder = self._idle.get()  # there are as many threads as processes: this does not wait
        try:
            for _ in range(2):
                try:
                    return decoder.prepare(settings, media)
                except _Died as death:
                    decoder.close()
                    decoder = _Decoder(self._limits)
                    _log.warning("a decoder process died over %s: %s", media.param, death)
                    if death.is_overdue:
                        raise self._overdue(media) from None
            raise ReplicaLost(f"the process that decodes died twice over {media.param}")
        finally:
            self._idle.put(decoder)

    def _overdue(self, media: Media) -> InvalidRequest:
        return InvalidRequest(
            f"the {media.kind} takes longer to decode than {self._limits.timeout_s:g} s; send a smaller one",
            f"{media.param}.url",
            f"{media.kind}_too_large",
        )


class _Died(Exception):
    """A decoder is gone, or has to go.

    Args:
        reason: for the log.
        is_overdue: it took too long, which is the file's fault.
    """

    def __init__(self, reason: str, *, is_overdue: bool = False) -> None:
        super().__init__(reason)
        self.is_overdue = is_overdue


class _Decoder:
    """Owns one process and the socket to it; a copy of our end is nowhere else, so the process ends when we do."""

    def __init__(self, limits: DecoderLimits) -> None:
        self._limits = limits
        self._is_ready = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ernie_cluster.inputs.decoder", str(limits.memory_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )

    def prepare(self, settings: Settings, media: Media) -> PreparedMedia:
        """Raises InvalidRequest, and _Died, after which only `close` is left."""
        try:
            self._await_start()
            self._socket.settimeout(self._limits.timeout_s + GRACE_S)
            send_request(self._socket, settings, media, self._limits.timeout_s)
            return receive_answer(self._socket, settings, media, self._limits.memory_bytes)
        except TimeoutError:
            raise _Died("it does not answer", is_overdue=self._is_ready) from None
        except (EOFError, OSError):
            raise self._post_mortem() from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise _Died(f"it answers nonsense ({type(e).__name__})") from None

    def close(self) -> None:
        """Kill it, if it lives."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _await_start(self) -> None:
        if not self._is_ready:
            self._socket.settimeout(START_TIMEOUT_S)
            if self._socket.recv(1) != READY:
                raise EOFError
            self._is_ready = True

    def _post_mortem(self) -> _Died:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        code = self._process.returncode
        return _Died(f"exit status {code}", is_overdue=code == -signal.SIGALRM)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**kept, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
