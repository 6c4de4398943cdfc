"""Size and timing of an animated GIF, WebP or PNG, read from the container; no pixel is decoded.

A decoder tells a frame's duration only once it has decoded all frames before it. Which frames of a video are wanted
depends on the durations of all of them, and a file must be refused before it is decoded, so they are read here first.
Sources: the GIF89a specification, Google's "WebP Container Specification", the PNG specification (third edition).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

DEFAULT_DURATION_S = 0.1
"""Of a frame that names no duration, as browsers show it."""

_PNG = b"\x89PNG\r\n\x1a\n"


def is_animation(data: bytes) -> bool:
    """Whether the file begins as one of the three formats do."""
    return _is_gif(data) or _is_webp(data) or data.startswith(_PNG)


def canvas_size(data: bytes) -> tuple[int, int]:
    """Width and height of all frames, by the file's header.

    Raises:
        ValueError: not one of the three formats, not animated (WebP), or cut off.
    """
    try:
        if _is_gif(data):
            width, height = struct.unpack_from("<HH", data, 6)
        elif _is_webp(data) and data[12:16] == b"VP8X":
            width, height = _int24(data, 24) + 1, _int24(data, 27) + 1
        elif data.startswith(_PNG):
            width, height = struct.unpack_from(">II", data, 16)
        else:
            raise ValueError("no animated GIF, WebP or PNG")
    except (struct.error, IndexError):
        raise ValueError("cut off") from None
    return width, height


def frame_durations(data: bytes) -> Iterator[float]:
    """Seconds for which each frame is shown, in order; lazily, so that a reader may stop at the frame that is too many.

    Raises:
        ValueError: not one of the three formats, cut off, or a frame that reaches beyond the canvas.
    """
    try:
        if _is_gif(data):
            durations = _gif_durations(data)
        elif _is_webp(data):
            durations = _webp_durations(data)
        elif data.startswith(_PNG):
            durations = _png_durations(data)
        else:
            raise ValueError("no animated GIF, WebP or PNG")
        for duration_s in durations:
            yield duration_s or DEFAULT_DURATION_S
    except (struct.error, IndexError):
        raise ValueError("cut off") from None


def _gif_durations(data: bytes) -> Iterator[float]:
    size = canvas_size(data)
    at = 13 + _palette_bytes(data[10])
    hundredths = 0
    while data[at] != 0x3B:  # the trailer
        if data[at] == 0x21:  # an extension; 0xF9 is the one that holds the next frame's delay
            if data[at + 1] == 0xF9:
                (hundredths,) = struct.unpack_from("<H", data, at + 4)
            at = _after_blocks(data, at + 2)
        elif data[at] == 0x2C:
            left, top, width, height, flags = struct.unpack_from("<HHHHB", data, at + 1)
            if left + width > size[0] or top + height > size[1]:
                raise ValueError("a frame reaches beyond the canvas")
            at = _after_blocks(data, at + 11 + _palette_bytes(flags))
            yield hundredths / 100
            hundredths = 0
        else:
            raise ValueError("a block of no known kind")


def _webp_durations(data: bytes) -> Iterator[float]:
    at = 12
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise ValueError("cut off")
    while at < end:
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"ANMF":
            yield _int24(data, at + 20) / 1000
        at += 8 + length + length % 2


def _png_durations(data: bytes) -> Iterator[float]:
    at, kind = len(_PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + length > len(data):
            raise ValueError("cut off")
        if kind == b"fcTL":
            numerator, denominator = struct.unpack_from(">HH", data, at + 28)
            yield numerator / (denominator or 100)
        at += 12 + length


def _is_gif(data: bytes) -> bool:
    return data[:6] in (b"GIF87a", b"GIF89a")


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _int24(data: bytes, at: int) -> int:
    return data[at] | data[at + 1] << 8 | data[at + 2] << 16


def _palette_bytes(flags: int) -> int:
    return 6 << (flags & 7) if flags & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    """Where a run of GIF's data blocks, each behind its own length, has ended with an empty one."""
    while data[at]:
        at += 1 + data[at]
    return at + 1
