"""Payloads wherever they are: numpy arrays in host memory, or tensors on a GPU. Loads torch for a GPU only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.transport.base import Payload


def fill(out: Payload, data: NDArray[np.uint8]) -> None:
    """Fill a payload from host memory; uint8 of equal length. For use inside a `Pack`."""
    if isinstance(out, np.ndarray):
        np.copyto(out, data)
    else:
        import torch

        torch.as_tensor(out).copy_(torch.from_numpy(data))
