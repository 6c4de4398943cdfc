"""Keeps one client's cached prompts and pictures apart from another's: what is salted differently never meets.

Without it the time to the first token tells a client what others have asked.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from ernie_cluster.request import GenerationRequest


def tenant_salt(name: str) -> bytes:
    """Salt of all requests under the key of this name; 32 bytes."""
    return hashlib.sha256(b"key:" + name.encode()).digest()


def salt_of(tenant: bytes, given: str | None) -> bytes:
    """Salt of one request, 32 bytes; b"" where it shares with all others.

    Args:
        tenant: `tenant_salt`, or b"" where tenants share.
        given: the request's own `cache_salt`, by which a client keeps its users apart; None where it has none.
    """
    if not tenant and given is None:
        return b""
    return hashlib.sha256(b"%d:%b%b" % (len(tenant), tenant, (given or "").encode())).digest()


def salted(request: GenerationRequest, salt: bytes) -> GenerationRequest:
    """The request, with its KV blocks and pictures under a salt of their own, see `salt_of`."""
    if not salt:
        return request
    media = tuple(replace(m, media_hash=hashlib.sha256(salt + m.media_hash).digest()) for m in request.media)
    return replace(request, media=media, cache_salt=salt)
