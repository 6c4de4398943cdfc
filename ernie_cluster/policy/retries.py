"""When a request that has lost a replica goes on. Time and chance come in.

Its first retry goes on almost at once, whatever happens: one loss shall be a short pause. Further ones are paid from a
budget, so that a cluster in which everything fails is not asked for several times as much as its clients ask for.
"""

from __future__ import annotations

from ernie_cluster.config.router import RouterConfig

_MAX_PAUSE_S = 5.0
_BURST_S = 5.0
"""The budget saves up, and first retries may overdraw it by, what the floor brings in this time."""


def backoff_s(num_losses: int, chance: float, limits: RouterConfig) -> float:
    """Pause before a request goes on: at random between nothing and a bound that doubles with each loss.

    Args:
        num_losses: of this request so far, at least 1.
        chance: in [0, 1).
    """
    return chance * min(limits.retry_pause_s * 2.0 ** min(num_losses - 1, 16), _MAX_PAUSE_S)


class RetryBudget:
    """What retries one process of the API may still make.

    Args:
        limits: what part of the requests, and how many a second on top.
    """

    def __init__(self, limits: RouterConfig) -> None:
        self._share, self._floor_per_s = limits.retry_share, limits.retry_floor_per_s
        self._burst = max(1.0, limits.retry_floor_per_s * _BURST_S)
        self._tokens = self._burst
        self._at_s: float | None = None

    def arrived(self) -> None:
        """A request has come, which earns a part of a retry."""
        self._tokens = min(self._tokens + self._share, self._burst)

    def wait_s(self, num_losses: int, now_s: float) -> float:
        """Take a retry out; how long it has to wait until it is paid for.

        Args:
            num_losses: of its request so far, at least 1.
            now_s: monotonic.
        """
        if self._at_s is not None:
            self._tokens = min(self._tokens + (now_s - self._at_s) * self._floor_per_s, self._burst)
        self._at_s = now_s
        self._tokens -= 1
        if num_losses > 1:
            return max(0.0, -self._tokens / self._floor_per_s)
        self._tokens = max(self._tokens, -self._burst)
        return 0.0
