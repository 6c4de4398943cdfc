"""Direct connections between machines that lose each other without a word. No Ray here."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ernie_cluster.transport.keepalive import SILENCE_S
from tests.e2e.application import eventually
from tests.multinode.namespaces import Namespaces, obstacle

ROOT = Path(__file__).parents[2]


class Peer:
    """A run of `peer`; ends with its machine."""

    def __init__(self, spaces: Namespaces, machine: str, *args: str) -> None:
        command = spaces.command(machine, sys.executable, "-m", "tests.multinode.peer", *args)
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, words: str, timeout_s: float) -> None:
        eventually(lambda: "" if words in self.said else f"no {words!r} in {self.said}", timeout_s)

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self.said.append(line.strip())


@pytest.fixture
def spaces() -> Iterator[Namespaces]:
    if why := obstacle():
        pytest.skip(why)
    with Namespaces(["one", "other"]) as spaces:
        yield spaces


def test_both_ends_notice_that_the_other_is_out_of_reach(spaces: Namespaces) -> None:
    """Of a connection that rests, and of one with bytes on their way. Without keep-alive the one would never end."""
    server = Peer(spaces, "other", "serve", spaces.address("other"))
    eventually(lambda: "" if server.said else "the server has no address", 60)
    clients = [Peer(spaces, "one", "call", server.said[0], *talks) for talks in ((), ("talk",))]
    for client in clients:
        client.wait_for("connected", 60)
    with spaces.parted("one", "other"):
        start = time.monotonic()
        for end, words in ((clients[0], "lost"), (clients[1], "lost"), (server, "without peers")):
            end.wait_for(words, 4 * SILENCE_S)
            print(f"{words!r} after {time.monotonic() - start:.1f} s")


def test_a_machine_that_is_out_of_reach_for_a_moment_loses_no_connection(spaces: Namespaces) -> None:
    server = Peer(spaces, "other", "serve", spaces.address("other"))
    eventually(lambda: "" if server.said else "the server has no address", 60)
    client = Peer(spaces, "one", "call", server.said[0], "talk")
    client.wait_for("connected", 60)
    with spaces.parted("one", "other"):
        time.sleep(SILENCE_S / 5)  # the length of the partition, which is what is tested
    again = Peer(spaces, "one", "call", server.said[0])
    again.wait_for("connected", 60)
    assert "lost" not in client.said
    assert "without peers" not in server.said
