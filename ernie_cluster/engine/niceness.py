"""Which threads come first where all share a few cores."""

from __future__ import annotations

import os
import sys

import torch

_COMPUTING = 5
"""Niceness of threads that compute, on top of their process's: beside one that does not give way they get a quarter of a
core. Measured on two busy cores (BENCHMARKS.md)."""


def give_way(device: torch.device) -> None:
    """Let others go before the calling thread, and those that it starts, where it computes on a CPU.

    Threads that only pass messages on need little, and somebody waits for each of them: refusals, tokens on their way. One
    that feeds a GPU is such a thread itself. Only Linux has a niceness of threads; elsewhere nothing is done.
    """
    if device.type == "cpu" and sys.platform == "linux":
        os.nice(_COMPUTING)
