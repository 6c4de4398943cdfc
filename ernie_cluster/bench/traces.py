"""When the requests of a real service came, and how long they were: `ernie_cluster/data/traces`, or a file of one's own."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ernie_cluster.bench.scenarios import Scenario
from ernie_cluster.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "data" / "traces"
PACKAGED = ("azure-chat", "azure-code")
COLUMNS = ("arrived_s", "prompt_tokens", "output_tokens")
_MOST_TOKENS = 10_000_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    arrived_s: float
    """Since the trace began."""
    prompt_tokens: int
    output_tokens: int

    def scenario(self) -> Scenario:
        """A request of these lengths; words count as tokens."""
        words, output = self.prompt_tokens, self.output_tokens
        return Scenario("trace", "a request of a trace", (words, words), (output, output))


@dataclass(frozen=True, slots=True)
class Trace:
    """A source of requests as long as those of a trace, in its order, and from its beginning again."""

    name: str
    arrivals: Sequence[Arrival]

    @property
    def most_tokens(self) -> int:
        return max(arrival.scenario().most_tokens for arrival in self.arrivals)

    def choose(self, seed: int, number: int) -> Scenario:
        return self.arrivals[number % len(self.arrivals)].scenario()

    def shrunk(self, divisor: float) -> Trace:
        def less(length: int) -> int:
            return max(1, round(length / divisor))

        small = [
            replace(a, prompt_tokens=less(a.prompt_tokens), output_tokens=less(a.output_tokens)) for a in self.arrivals
        ]
        return replace(self, arrivals=small)


def read(name: str) -> list[Arrival]:
    """Arrivals by time.

    Args:
        name: of a packaged trace, or path of a CSV file with `COLUMNS`.

    Raises:
        ConfigError: there is none, or it is something else.
    """
    path = FOLDER / f"{name}.csv" if name in PACKAGED else Path(name)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [_arrival(row, number) for number, row in enumerate(csv.DictReader(file), start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"trace {name!r} cannot be read ({e}); packaged ones: {', '.join(PACKAGED)}") from None
    except (ValueError, LookupError, TypeError) as e:
        raise ConfigError(f"trace {name!r}: {e}; columns are {','.join(COLUMNS)}") from None
    if not rows:
        raise ConfigError(f"trace {name!r} has no requests")
    return sorted(rows, key=lambda arrival: arrival.arrived_s)


def _arrival(row: dict[str, str], number: int) -> Arrival:
    found = Arrival(float(row["arrived_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
    lengths = (found.prompt_tokens, found.output_tokens)
    if not (math.isfinite(found.arrived_s) and found.arrived_s >= 0) or not all(0 < n <= _MOST_TOKENS for n in lengths):
        raise ValueError(f"line {number} has a time or a length out of range")
    return found


def rates(arrivals: Sequence[Arrival], window_s: float) -> list[float]:
    """Requests per second in each window of a trace, up to its last arrival."""
    counts = [0] * (int(arrivals[-1].arrived_s // window_s) + 1)
    for arrival in arrivals:
        counts[int(arrival.arrived_s // window_s)] += 1
    return [count / window_s for count in counts]
