"""Counts requests while they run and measures them when they end. Owns the number in flight."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ernie_cluster.api.answer import Delta
from ernie_cluster.api.stages import record_stages
from ernie_cluster.api.status import status_of
from ernie_cluster.api.tracing import Journey, NoTracer, Tracer
from ernie_cluster.errors import Overloaded
from ernie_cluster.observe.metrics import Metrics
from ernie_cluster.observe.trace_context import bound_trace
from ernie_cluster.request import Span

SUCCESS = "success"
UNKNOWN_MODEL = "unknown"
"""Label of requests that end before their model is known, or ask only about tokens; a client's own word would be a
label without bound."""


@dataclass(slots=True)
class _ChoiceTimes:
    first_s: float
    last_s: float
    num_tokens: int


class Bodies:
    """Owns how many bytes of requests are here that nobody has made prompts of yet.

    Args:
        max_bytes: of all together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0

    def take(self, num_bytes: int) -> None:
        """Some have come; raises Overloaded when they are too many."""
        if self.num_bytes + num_bytes > self.max_bytes:
            raise Overloaded(
                f"requests of {self.num_bytes} bytes are being read, the limit of all together is {self.max_bytes}"
            )
        self.num_bytes += num_bytes


class Meter:
    """One request's measurements. Times are seconds of the clock that it is given."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float], in_flight: Counter[str], bodies: Bodies) -> None:
        self._bodies, self._num_body_bytes = bodies, 0
        self._metrics = metrics
        self._clock = clock
        self._in_flight = in_flight
        self._choices: dict[int, _ChoiceTimes] = {}
        self.start_s = clock()
        self.model = UNKNOWN_MODEL
        self.is_stream = False
        self.ttft_s: float | None = None
        """Until the first token of the first choice left; None before."""
        self.num_prompt_tokens = 0
        self.timeline: list[Span] = []
        """Of the answers that have ended."""
        self.num_unread: Callable[[], int] = lambda: 0
        """Tokens that have come and were not sent yet, as their client does not read."""

    def begin(self) -> None:
        """The request is here."""
        self._move(+1)

    def accept(self, model: str) -> None:
        """The request names a model that is served."""
        self._move(-1)
        self.model = model
        self._move(+1)

    def took(self, num_bytes: int) -> None:
        """Bytes of the request have come; they count until it is prepared, or ends. Raises as `Bodies.take`."""
        self._bodies.take(num_bytes)
        self._num_body_bytes += num_bytes

    def _drop_body(self) -> None:
        self._bodies.num_bytes -= self._num_body_bytes
        self._num_body_bytes = 0

    def prepared(self, num_prompt_tokens: int) -> None:
        """The request goes to the backend."""
        self._drop_body()
        self._observe("ernie_preprocess_seconds", self._clock() - self.start_s)
        self.num_prompt_tokens = num_prompt_tokens
        self._observe("ernie_request_prompt_tokens", num_prompt_tokens)
        self._inc("ernie_prompt_tokens_total", num_prompt_tokens)

    def tokens(self, deltas: Iterable[Delta]) -> None:
        """News of some choices that leave together."""
        now = self._clock()
        for delta in deltas:
            if delta.num_tokens:
                self._tokens(delta, now)

    def _tokens(self, delta: Delta, now: float) -> None:
        if not self._choices:
            self.ttft_s = now - self.start_s
            self._observe("ernie_time_to_first_token_seconds", self.ttft_s)
        self._inc("ernie_generation_tokens_total", delta.num_tokens)
        times = self._choices.get(delta.index)
        if times is None:
            self._choices[delta.index] = _ChoiceTimes(now, now, delta.num_tokens)
            return
        self._observe("ernie_inter_token_latency_seconds", (now - times.last_s) / delta.num_tokens)
        times.last_s = now
        times.num_tokens += delta.num_tokens

    def further(self, num_prompt_tokens: int) -> None:
        """Prompts of an answer's further rounds."""
        self._inc("ernie_prompt_tokens_total", num_prompt_tokens)

    def stages(self, spans: Iterable[Span]) -> None:
        """What an answer's timeline says of the way behind the API."""
        spans = list(spans)
        self.timeline += spans
        record_stages(self._metrics, self.model, spans)

    def cached(self, num_tokens: int) -> None:
        """Prompt tokens that the answer's end reports as found in a cache."""
        self._inc("ernie_cached_prompt_tokens_total", num_tokens)

    def journey(self, outcome: str, now_s: float) -> Journey:
        """What a trace tells of the request.

        Args:
            outcome: how it ended.
            now_s: wall clock.
        """
        attributes: dict[str, str | int | float | bool] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": self.model,
            "gen_ai.usage.input_tokens": self.num_prompt_tokens,
            "gen_ai.usage.output_tokens": sum(c.num_tokens for c in self._choices.values()),
            "ernie.outcome": outcome,
        }
        if self.ttft_s is not None:
            attributes["ernie.time_to_first_token_s"] = self.ttft_s
        start_s = now_s - (self._clock() - self.start_s)
        error = "" if outcome == SUCCESS else outcome
        return Journey(f"chat {self.model}", start_s, now_s, attributes, tuple(self.timeline), error)

    def end(self, outcome: str) -> None:
        """The request has ended in this one way."""
        self._drop_body()
        self._move(-1)
        self._metrics.inc("ernie_request_total", model=self.model, outcome=outcome)
        self._observe("ernie_e2e_request_latency_seconds", self._clock() - self.start_s)
        if self._choices:
            self._observe("ernie_request_generation_tokens", sum(c.num_tokens for c in self._choices.values()))
        for c in self._choices.values():
            if c.num_tokens > 1:
                self._observe("ernie_time_per_output_token_seconds", (c.last_s - c.first_s) / (c.num_tokens - 1))

    def _move(self, by: int) -> None:
        self._in_flight[self.model] += by
        self._metrics.set("ernie_requests_in_flight", self._in_flight[self.model], model=self.model)

    def _inc(self, name: str, value: float) -> None:
        self._metrics.inc(name, value, model=self.model)

    def _observe(self, name: str, value: float) -> None:
        self._metrics.observe(name, value, model=self.model)


class Traffic:
    """All requests that are being read, prepared or answered."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float],
        max_in_flight: int,
        bodies: Bodies | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._bodies = bodies or Bodies(2**63)
        self._tracer: Tracer = tracer or NoTracer()
        self._metrics = metrics
        self._clock = clock
        self._max_in_flight = max_in_flight
        self._in_flight: Counter[str] = Counter()
        self._live: set[Meter] = set()

    @property
    def num_streams(self) -> int:
        """Answers that are being streamed."""
        return sum(meter.is_stream for meter in self._live)

    def refresh(self) -> None:
        """Bring the gauge of unread tokens up to date, which nobody tells of its changes."""
        unread = Counter[str]()
        for meter in self._live:
            unread[meter.model] += meter.num_unread()
        for model in self._in_flight:
            self._metrics.set("ernie_unread_tokens", unread[model], model=model)

    @contextmanager
    def request(self) -> Iterator[Meter]:
        """Count one request in, and out again however it ends.

        Raises:
            Overloaded: too many are in flight.
        """
        meter = Meter(self._metrics, self._clock, self._in_flight, self._bodies)
        meter.begin()
        outcome = SUCCESS
        try:
            if len(self._live) >= self._max_in_flight:
                raise Overloaded(f"{len(self._live)} requests are in flight, the limit is {self._max_in_flight}")
            self._live.add(meter)
            yield meter
        except asyncio.CancelledError:
            outcome = "aborted"
            raise
        except Exception as e:
            outcome = status_of(e).outcome
            raise
        finally:
            self._live.discard(meter)
            meter.end(outcome)
            if (trace := bound_trace()) is not None and trace.is_sampled:
                self._tracer.record(trace, meter.journey(outcome, time.time()))
