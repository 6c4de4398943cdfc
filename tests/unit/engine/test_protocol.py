"""What replicas lend each other is never seen by another, comes back by itself, and serves every request, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.unit.engine.protocol import Protocol

# an example is told by its steps, of which it has twenty at most: making it shorter would take longer than to read it
FEW = settings(
    max_examples=200,
    stateful_step_count=20,
    suppress_health_check=[HealthCheck.too_slow],
    deadline=None,
    phases=(Phase.generate,),
    print_blob=False,
)


class TestProtocol(Protocol.TestCase):  # type: ignore[misc]
    settings = FEW


@pytest.mark.slow
class TestProtocolAtLength(Protocol.TestCase):  # type: ignore[misc]
    """About ten thousand histories."""

    settings = settings(FEW, max_examples=10_000)
