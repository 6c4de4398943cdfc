"""Data URLs of strangers: pictures and videos travel inside their URL, the server fetches nothing."""

from __future__ import annotations

import base64
import binascii
import re

from ernie_cluster.errors import InvalidRequest
from ernie_cluster.request import MediaKind

_HEAD = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)


def parse_data_url(url: str, *, max_bytes: int | None = None) -> tuple[str, bytes]:
    """Media type (lower case) and content of `data:image/png;base64,...`.

    Raises:
        InvalidRequest: not such a URL, not strict base64, or more than `max_bytes`.
    """
    mime, encoded = split_data_url(url, "image", max_bytes)
    return mime, decode_base64(encoded, "image")


def split_data_url(url: str, kind: MediaKind, max_bytes: int | None = None) -> tuple[str, str]:
    """Media type (lower case) and base64 text of a data URL.

    Raises:
        InvalidRequest: not such a URL, or certainly more than `max_bytes`.
    """
    match = _HEAD.match(url)
    if match is None:
        example = "image/png" if kind == "image" else "image/gif"
        raise InvalidRequest(
            f"not a data URL with base64 content; send data:{example};base64,...", code=f"invalid_{kind}"
        )
    encoded = url[match.end() :]
    if max_bytes is not None and len(encoded) > 4 * -(-max_bytes // 3):
        raise InvalidRequest(
            f"the {kind} has more than {max_bytes} bytes; send a smaller file", code=f"{kind}_too_large"
        )
    return match.group(1).lower(), encoded


def decode_base64(encoded: str, kind: MediaKind) -> bytes:
    """Strictly; raises InvalidRequest."""
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("the data URL's content is not valid base64", code=f"invalid_{kind}") from None
