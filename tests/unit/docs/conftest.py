"""The same loop as the API's own tests."""

from __future__ import annotations

from tests.unit.api.conftest import anyio_backend, lasting_loop

__all__ = ["anyio_backend", "lasting_loop"]
