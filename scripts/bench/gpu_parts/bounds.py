"""What the device can do at best, measured: reading memory, copying it, multiplying."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int, warm_ups: int = 2) -> float:
    """Median over `repeats`, by the wall, each until the device is done."""
    times = []
    for i in range(warm_ups + repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if i >= warm_ups:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Per second."""

    read_bytes: float
    """The best of summing and of copying, where a copied byte is read and written."""
    copy_bytes: float
    """Bytes copied from one place to another of the device, each counted once."""
    flops: float
    """bfloat16, of a square product."""


def measure(device: torch.device, *, memory_bytes: int = 4 << 30, side: int = 8192, repeats: int = 20) -> Bounds:
    """Takes two buffers of `memory_bytes`, and gives them back."""
    copy_s, sum_s = _memory_s(device, memory_bytes, repeats)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_s = seconds_of(lambda: a @ b, device, repeats)
    return Bounds(max(memory_bytes / sum_s, 2 * memory_bytes / copy_s), memory_bytes / copy_s, 2 * side**3 / product_s)


def _memory_s(device: torch.device, num_bytes: int, repeats: int) -> tuple[float, float]:
    """Seconds of copying a buffer, and of adding it up."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device, repeats), seconds_of(source.sum, device, repeats)
