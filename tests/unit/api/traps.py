"""Pictures whose preparation goes wrong; a decoder process imports this file to find them."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from ernie_cluster.errors import InvalidRequest
from ernie_cluster.inputs.images import PreparedMedia
from ernie_cluster.inputs.messages import Picture, Settings


@dataclass(frozen=True, slots=True)
class Crash(Picture):
    """Takes its process down the first time, by the file `url` that it leaves; always where there is no `url`."""

    def prepare(self, settings: Settings) -> PreparedMedia:
        if not os.path.exists(self.url):
            if self.url:
                os.close(os.open(self.url, os.O_CREAT))
            os.kill(os.getpid(), signal.SIGSEGV)
        return Picture(self.param, self.url, self.content).prepare(settings)


@dataclass(frozen=True, slots=True)
class Endless(Picture):
    """Never comes to an end, and hears no exception."""

    def prepare(self, settings: Settings) -> PreparedMedia:
        while True:
            pass


@dataclass(frozen=True, slots=True)
class Greedy(Picture):
    """Takes all the memory there is."""

    def prepare(self, settings: Settings) -> PreparedMedia:
        raise InvalidRequest(f"took {len(bytearray(2**40))} bytes")


@dataclass(frozen=True, slots=True)
class Burglar(Picture):
    """Tells what it finds in the environment under the name `url`, and whether it can write the file of that name."""

    def prepare(self, settings: Settings) -> PreparedMedia:
        found = os.environ.get(self.url.rpartition("/")[2], "nothing")
        try:
            with open(self.url, "w") as file:
                file.write("loot")
        except OSError:
            raise InvalidRequest(f"found {found}, wrote nothing") from None
        raise InvalidRequest(f"found {found}, wrote a file")
