"""When pictures that do not come are asked of another vision replica as well."""

from __future__ import annotations

from ernie_cluster.config.router import RouterConfig

_LEAST_S = 1.0
"""Nobody is late before: short times are foretold badly, and a second encoding costs more than the rest of such a wait."""


def hedge_after_s(expected_s: float, limits: RouterConfig) -> float | None:
    """How long one vision replica is waited for; None = to the end.

    Args:
        expected_s: until it has encoded the last picture, as was foretold.
    """
    return max(_LEAST_S, limits.hedge_encode * expected_s) if limits.hedge_encode else None
