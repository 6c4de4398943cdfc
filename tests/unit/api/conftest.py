"""Tests marked `anyio` run on asyncio, the only loop that the API is written for."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
