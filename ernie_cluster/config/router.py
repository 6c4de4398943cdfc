"""Limits of admission and routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.checks import check_positive, check_range
from ernie_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Limits of admission and routing."""

    policy: Literal["cost", "round_robin", "two_choices"] = "cost"
    """How a path is chosen. To compare with, not to serve with: replicas of each pool in turn, or the one of two by chance that
    has fewer requests, as Ray Serve does; neither knows of prefixes or pictures."""
    reserve_output_tokens: int = 256
    """Output tokens (or `max_tokens` if fewer) for which decode blocks are reserved at the start; at least 1."""
    lease_timeout_s: float = 30.0
    """A lease without a sign of life for this long is taken back; more than `heartbeat_timeout_s`."""
    snapshot_interval_s: float = 0.1
    """A replica whose load changes tells so this often, more than 0; one at rest tells four times within
    `heartbeat_timeout_s` that it lives, at least once a second. Of more than 133 replicas each tells less often, all
    together 1,333 times a second."""
    heartbeat_timeout_s: float = 2.0
    """Who shows no sign of life for this long hangs: its streams go on elsewhere, and it gets new work only where nobody
    else is; more than `snapshot_interval_s`. The end of a process is noticed at once. Where replicas share few cores this
    should be longer than their pauses, for each false alarm costs a replay."""
    max_queued_tokens: int = 131_072
    """A replica with this many prompt (vision: media) tokens waiting takes no more; at least 1."""
    retry_after_s: float = 1.0
    """What a refused client is told to wait at least, more than 0; longer where the queues say so."""
    max_waiting: int = 1000
    """Requests that may wait for a place when there is none; 0 = all are refused at once."""
    max_wait_s: float = 30.0
    """How long batch work, of a priority above 0, waits for a place; at least 0."""
    interactive_wait_s: float = 0.0
    """The same for all other requests; 0 = they are told at once when to come back."""
    batch_turn: int = 16
    """Batch work that waits for a place gets the next one after so many requests that were more urgent got theirs, so that it
    moves on under any load; until that place is there, they wait or are refused. 0 = it always comes last."""
    local_decode_tokens: int = 0
    """Prompts of up to this many tokens may be answered by the prefill replica that computes them, where that is cheaper
    than a hand-over; 0 = none are."""
    fetch_prefixes: bool = True
    """What another replica's prefix cache holds of a prompt is fetched from there, where that is faster than to compute it."""
    drain_timeout_s: float = 600.0
    """A replica that an operator drains has so long for what it is at, at least 0; others go on with what is left then."""
    notice_s: float = 20.0
    """A rank that gets SIGTERM moves its requests to others at once, and ends when they are gone, or after so long; more than
    0, and less than what the machine is given before it is taken away."""
    max_attempts: int = 4
    """Tries per request, the first included, when replicas are lost; at least 1. One of each pool may be lost in turn."""
    retry_pause_s: float = 0.1
    """A request that has lost a replica goes on after a random time of at most this, twice that after the next loss, and so
    on; at least 0."""
    retry_share: float = 0.1
    """Retries after the first of a request may be this part of all requests, and `retry_floor_per_s` a second on top; what
    is more waits. At least 0."""
    retry_floor_per_s: float = 2.0
    """See `retry_share`; of each process of the API, more than 0."""
    breaker_failures: int = 3
    """A replica that fails so often in a row, with signs of life between, gets no work for a while; at least 1."""
    breaker_open_s: float = 1.0
    """How long at first, more than 0; each further time twice as long, up to half a minute."""
    hedge_encode: float = 4.0
    """Pictures that are not encoded after this many times as long as was expected, or that a vision replica has failed to
    encode, are asked of another one as well; 0 = never."""

    @property
    def sign_of_life_s(self) -> float:
        """Who has nothing to say says so this often; of three signs two may be late."""
        return min(2.0, self.heartbeat_timeout_s / 3)

    def __post_init__(self) -> None:
        check_range(self, 1, "reserve_output_tokens", "max_queued_tokens", "max_attempts", "breaker_failures")
        check_range(self, 0, "batch_turn", "local_decode_tokens", "max_waiting", "max_wait_s", "interactive_wait_s")
        check_range(self, 0, "retry_pause_s", "retry_share", "hedge_encode", "drain_timeout_s")
        check_positive(self, "notice_s")
        check_positive(self, "snapshot_interval_s", "heartbeat_timeout_s", "lease_timeout_s", "retry_after_s")
        check_positive(self, "retry_floor_per_s", "breaker_open_s")
        for longer, shorter in (
            ("heartbeat_timeout_s", "snapshot_interval_s"),
            ("lease_timeout_s", "heartbeat_timeout_s"),
        ):
            if getattr(self, longer) <= getattr(self, shorter):
                raise ConfigError(
                    f"{longer} = {getattr(self, longer)} must be more than {shorter} = {getattr(self, shorter)}"
                )
