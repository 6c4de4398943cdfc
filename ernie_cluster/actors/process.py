"""Set-up of one process of ours, done once: threads and device."""

from __future__ import annotations

import torch

from ernie_cluster.config.cluster import Device
from ernie_cluster.errors import ConfigError


def set_threads(count: int) -> None:
    """Threads of all numeric work in this process."""
    torch.set_num_threads(count)


def choose_device(wish: Device) -> torch.device:
    """The device that Ray gave to this process; ConfigError when a GPU is wanted and there is none."""
    if wish == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if wish == "cuda":
        raise ConfigError("device: cuda, but this replica sees no GPU; give its pool num_gpus or use device: cpu")
    return torch.device("cpu")
