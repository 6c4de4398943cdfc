"""Where traces of requests go."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TracingConfig:
    """Spans of requests for a collector that speaks OTLP over HTTP; needs the extra `tracing`."""

    endpoint: str
    """Where spans are posted to, for example `http://collector:4318/v1/traces`."""
    sample_ratio: float = 1.0
    """Share of the requests that bring no `traceparent` which is recorded, 0 to 1; of those that do, their caller decides."""

    def __post_init__(self) -> None:
        if not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"endpoint = {self.endpoint!r} must be an http(s) URL, such as http://collector:4318/v1/traces"
            )
        if not 0 <= self.sample_ratio <= 1:
            raise ConfigError(f"sample_ratio = {self.sample_ratio:g} must be from 0 to 1")
