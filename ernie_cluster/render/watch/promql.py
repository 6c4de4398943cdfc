"""Words of PromQL that rules and panels have in common."""

from __future__ import annotations

RATE = "$__rate_interval"
"""Grafana's own window: the least in which a rate makes sense, and more when much time is shown."""


def series(name: str, *matchers: str) -> str:
    """A metric of the chosen models: `ernie_running_requests{model=~"$model"}`."""
    inside = ", ".join(('model=~"$model"', *matchers))
    return f"{name}{{{inside}}}"


def per_s(counter: str, by: str = "", *matchers: str) -> str:
    """Events per second of the chosen models, over all processes of the API."""
    return f"{_sum(by)} (rate({series(counter, *matchers)}[{RATE}]))"


def once(gauge: str, by: str) -> str:
    """A gauge of the cluster, by all of its labels: every process of the API shows the same, so the largest is taken."""
    return f"max by ({by}) ({gauge})"


def total(gauge: str, labels: str, by: str, *matchers: str) -> str:
    """Such a gauge, added up over those of its labels that are not in `by`."""
    return f"{_sum(by)} ({once(series(gauge, *matchers), labels)})"


def at_work() -> str:
    """Replicas that take new work, by model and role: whole gangs, as the autoscaler counts them."""
    return total("ernie_replicas", "model, phase, role", "model, role", 'phase=~"ready|switching"')


def quantile(part: float, histogram: str, by: str = "") -> str:
    """The value that this part of the observations did not exceed, as well as buckets can tell."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({part:g}, {per_s(f'{histogram}_bucket', labels)})"


def share(part: str, whole: str) -> str:
    """A part of 1; none where there is nothing to divide."""
    return f"{part} / {whole}"


def _sum(by: str) -> str:
    return f"sum by ({by})" if by else "sum"
