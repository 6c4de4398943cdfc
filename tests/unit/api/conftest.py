"""Tests marked `anyio` run on asyncio, the only loop that the API is written for."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def lasting_loop(anyio_backend: str) -> str:
    """One event loop from here on. gRPC has one queue for all loops of a process, and what is left in it by a test whose
    loop is closed would fail another."""
    return anyio_backend
