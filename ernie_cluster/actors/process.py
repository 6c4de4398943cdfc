"""Set-up of one process of ours, done once: threads and device. Imports torch only where it is used."""

from __future__ import annotations

import gc
import logging
import os
import sys
from typing import TYPE_CHECKING

from ernie_cluster.config.engine import Device
from ernie_cluster.errors import ConfigError
from ernie_cluster.observe.log import ENV_FORMAT, ENV_LEVEL, setup_logging

if TYPE_CHECKING:
    import torch

_SWITCH_S = 0.0005
_GIVEN_UP = 70
"""Exit status."""

log = logging.getLogger(__name__)


def share_interpreter() -> None:
    """Let threads take the interpreter from each other sooner than after Python's 5 ms.

    An event loop that waits for the engine's thread, or Serve's loops for ours, would else lose 5 ms per hop.
    """
    sys.setswitchinterval(_SWITCH_S)


def started() -> None:
    """What is there now stays: the collector of cycles looks at nothing of it from now on.

    Modules and weights are a million objects, and to go through them holds up every thread for some tenths of a second,
    which is many times what a request waits for anything else here.
    """
    gc.collect()
    gc.freeze()


def log_lines() -> None:
    """What is logged here goes to standard error, which Ray keeps; ERNIE_LOG_LEVEL and ERNIE_LOG_FORMAT say how."""
    setup_logging(os.environ.get(ENV_LEVEL, "INFO"), form=os.environ.get(ENV_FORMAT, "text"))


def set_threads(count: int) -> None:
    """Threads of all numeric work in this process."""
    import torch

    torch.set_num_threads(count)


def choose_device(wish: Device) -> torch.device:
    """The device that Ray gave to this process; ConfigError when a GPU is wanted and there is none."""
    import torch

    if wish == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if wish == "cuda":
        raise ConfigError("device: cuda, but this replica sees no GPU; give its pool num_gpus or use device: cpu")
    return torch.device("cpu")


def give_up(reason: str) -> None:
    """End this process at once: a kernel holds its GPU for ever, so whoever watches it must start another."""
    log.critical("this process gives up: %s", reason)
    logging.shutdown()
    os._exit(_GIVEN_UP)
