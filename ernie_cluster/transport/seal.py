"""Checksum of a piece that lies on a device, computed there and travelling behind it.

    frame   payload, padded to whole words of 8 bytes | seal, one word

The seal is sum(word[i] * odd(i)) + f(nbytes, number, salt) modulo 2^64. An odd factor has an inverse, so any change of
one word changes the sum, and words that change places do, too, but for one accident in 2^64. Sums modulo 2^64 do not
depend on the order of adding, so every device finds the same. It finds accidents, not attackers.

`number` and `salt` name the piece and its connection: bytes of an earlier piece that were never overwritten do not pass.
"""

from __future__ import annotations

import torch

_WORD = 8
_MIX = -7046029254386353131  # 2^64 / golden ratio, as a signed number: neighbours get unlike factors
_SIGNED = 1 << 63


def frame_bytes(nbytes: int) -> int:
    """Bytes of the frame of a payload of `nbytes`. 1 gives 16."""
    return -(-nbytes // _WORD) * _WORD + _WORD


def seal(frame: torch.Tensor, nbytes: int, number: int, salt: int) -> None:
    """Close a frame whose payload is in place.

    Args:
        frame: uint8 [frame_bytes(nbytes)], beginning at a multiple of 8 bytes.
    """
    frame[nbytes:-_WORD] = 0
    frame[-_WORD:].view(torch.int64).copy_(_sum(frame, nbytes, number, salt))


def damage(frame: torch.Tensor, nbytes: int, number: int, salt: int) -> torch.Tensor:
    """int64 [1] on the frame's device: 0 where the frame is what was sealed under these numbers."""
    return _sum(frame, nbytes, number, salt) ^ frame[-_WORD:].view(torch.int64)


def _sum(frame: torch.Tensor, nbytes: int, number: int, salt: int) -> torch.Tensor:
    words = frame[:-_WORD].view(torch.int64)
    factors = torch.arange(1, len(words) + 1, dtype=torch.int64, device=frame.device) * _MIX
    factors = factors ^ (factors >> 32) | 1
    total = (words * factors).sum().reshape(1)
    # added on the device too: Python's numbers have no end, and would not wrap
    return total + _wrap((nbytes + 1) * _MIX + number * 0x2545F4914F6CDD1D + salt)


def _wrap(value: int) -> int:
    return (value + _SIGNED) % (2 * _SIGNED) - _SIGNED
