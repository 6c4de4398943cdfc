"""What a client saw of one request, and whether that was good enough. Knows no server and no wire."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One request that has ended. Durations count from `began_s` of the request, in seconds."""

    scenario: str
    began_s: float
    """When it was sent; in an open load when it was due, so that a client that lags hides nothing. Seconds of the epoch."""
    latency_s: float
    """To its end, whatever that was."""
    ttft_s: float | None = None
    """To the first piece of text, or of thought; None where none came."""
    gaps_s: tuple[float, ...] = ()
    """Between neighbouring pieces. A server may put several tokens into one: then ITL is of pieces, TPOT still of tokens."""
    num_tokens: int = 0
    """Of the answer, as the server counts them; where it does not, pieces."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt."""
    error: str = ""
    """Kind of what went wrong; "" where the answer is whole."""
    detail: str = ""
    """What the server said of it."""

    @property
    def is_whole(self) -> bool:
        return not self.error

    @property
    def ended_s(self) -> float:
        return self.began_s + self.latency_s

    @property
    def tpot_s(self) -> float | None:
        """(end - first piece) / (tokens - 1); None for answers of less than two tokens. The end, as the last tokens may bear no text."""
        if self.ttft_s is None or self.num_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Slo:
    """What users may expect of an answer; None where nothing is promised. Seconds."""

    ttft_s: float | None = 2.0
    tpot_s: float | None = 0.1
    latency_s: float | None = None

    def is_met(self, record: Record) -> bool:
        """Whole, and within all targets. What an answer does not have (a gap, for one) is not late."""
        pairs = (
            (record.ttft_s, self.ttft_s),
            (record.tpot_s, self.tpot_s),
            (record.latency_s, self.latency_s),
        )
        return record.is_whole and all(a is None or b is None or a <= b for a, b in pairs)

    def __str__(self) -> str:
        """`TTFT <= 2 s, TPOT <= 100 ms`."""
        named = (("TTFT", self.ttft_s, 1, "s"), ("TPOT", self.tpot_s, 1000, "ms"), ("E2E", self.latency_s, 1, "s"))
        told = [f"{name} <= {value * scale:g} {unit}" for name, value, scale, unit in named if value is not None]
        return ", ".join(told) or "a whole answer"
