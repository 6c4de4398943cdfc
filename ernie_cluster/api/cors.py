"""Which web pages may call the API from a browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ernie_cluster.config.keys import Limited

_READABLE = (
    "x-request-id",
    "retry-after",
    *(f"x-ratelimit-{name}-{what}" for what in get_args(Limited) for name in ("limit", "remaining", "reset")),
)
"""Response headers that a page may read, beside the harmless ones."""


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins call the app; "*" stands for all. To be called last.

    It goes outside of everything else: a browser's question, which bears no key, is answered before the door, and a
    page can read refusals, too. Cookies play no part, so a page can use only a key that its user has given it.
    """
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=_READABLE,
    )
