"""What a process wrote on `/metrics`, read back: counters and histograms as numbers, and what came to them in between.

Prometheus' text format, version 0.0.4. Each process counts for itself and from its own start, so only readings of the same
process may be held against each other; `Reading.process` tells them apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, frozenset[tuple[str, str]]]
"""(name of a sample, its labels)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """All samples of one process, or what came to them."""

    values: Mapping[Key, float]
    process: float = 0.0
    """When the process began to count, in its own Unix time, so another one for each; 0 = it has counted nothing yet."""

    def sums(self, name: str, by: str) -> dict[str, float]:
        """Samples of one name, added up by the value of the label `by`; those without that label are left out."""
        found: dict[str, float] = defaultdict(float)
        for (sample, labels), value in self.values.items():
            if sample == name and (group := dict(labels).get(by)) is not None:
                found[group] += value
        return dict(found)

    def only(self, label: str, *values: str) -> Reading:
        """The samples whose `label` is one of these."""
        wanted = {(label, value) for value in values}
        return Reading({key: value for key, value in self.values.items() if wanted & key[1]}, self.process)

    def since(self, before: Reading) -> Reading:
        """What came to each counter after an earlier reading of the same process; gauges mean nothing here."""
        return Reading({key: max(0.0, v - before.values.get(key, 0.0)) for key, v in self.values.items()}, self.process)

    def times(self, factor: float) -> Reading:
        """Each sample so many times as large."""
        return Reading({key: value * factor for key, value in self.values.items()}, self.process)


def read(text: str) -> Reading:
    """Raises ValueError: it is no such text."""
    values: dict[Key, float] = {}
    process = math.inf
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_created"):
                process = min(process, sample.value)
            else:
                values[sample.name, frozenset(sample.labels.items())] = sample.value
    return Reading(values, process if math.isfinite(process) else 0.0)


def total(readings: Iterable[Reading]) -> Reading:
    """Several processes as if they were one."""
    values: dict[Key, float] = defaultdict(float)
    for reading in readings:
        for key, value in reading.values.items():
            values[key] += value
    return Reading(dict(values))


def quantile(counts: Mapping[float, float], share: float) -> float | None:
    """The value that `share` of a histogram's observations do not exceed, as Prometheus' `histogram_quantile` guesses it.

    Args:
        counts: upper bound of a bucket -> observations up to it, +Inf among them.
        share: above 0, at most 1.

    Returns:
        On a straight line through the bucket, which begins at 0 or the bound below; the last finite bound for what
        lies above it. None of nothing. Of {1: 0, 2: 8, inf: 8}, share 0.5 gives 1.5.
    """
    bounds = sorted(counts)
    if not bounds or counts[bounds[-1]] <= 0:
        return None
    rank, low, below = share * counts[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= rank and counts[bound] > below:
            return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (counts[bound] - below)
        low, below = bound, counts[bound]
    return low
