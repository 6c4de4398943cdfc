"""The choices of one client request while they run: tokens in, merged pieces of the answer out.

Knows neither OpenAI's objects nor HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

from ernie_cluster.api.backend import Backend
from ernie_cluster.api.limits import MAX_UNREAD_TOKENS
from ernie_cluster.api.logprobs import ShownToken, ShownTokens
from ernie_cluster.api.markup import AnswerParser, Pieces
from ernie_cluster.api.prepare import Job
from ernie_cluster.api.processor import Detokenizer, Processor
from ernie_cluster.api.stops import StopStringFilter
from ernie_cluster.api.turns import SINGLE_ROUND, Choice, Rounds, Turns
from ernie_cluster.errors import Aborted, ErnieClusterError, ReplicaError, SlowClient
from ernie_cluster.request import FinishReason, GenerationRequest, MediaKind, Span, TokenEvent

TOOL_CALLS = "tool_calls"
"""OpenAI's finish reason of an answer that stops after it has called tools; engines know no tools."""


@dataclass(slots=True)
class Delta:
    """What is new in one choice."""

    index: int
    """Of the choice."""
    pieces: Pieces
    token_ids: list[int] = field(default_factory=list)
    """All that the model generated, end tokens too."""
    finish_reason: str | None = None
    """A `FinishReason` or `TOOL_CALLS`."""
    tokens: list[ShownToken] | None = None
    """Behind the content, with log-probabilities; None when nobody asked for them."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def add(self, later: Delta) -> None:
        """Append what came later, whose calls and tokens are taken over."""
        self.pieces.add(later.pieces)
        self.token_ids += later.token_ids
        self.finish_reason = later.finish_reason
        if self.tokens is None:
            self.tokens = later.tokens
        else:
            self.tokens += later.tokens or ()


@dataclass(slots=True)
class ChoiceText:
    """Text of one round of a choice. Takes its token events in order; holds back halves of characters, marks and stop strings."""

    index: int
    request: GenerationRequest
    detokenizer: Detokenizer
    parser: AnswerParser
    shown: ShownTokens | None = None
    """Where log-probabilities were asked for."""
    num_tokens: int = 0
    num_reasoning_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    """See `Delta`."""
    spans: list[Span] = field(default_factory=list)

    def push(self, event: TokenEvent) -> Delta:
        """Text that the event completes.

        Raises:
            ReplicaError: tokens are missing or came twice.
            Aborted: the backend gave the request up.
        """
        if event.index != self.num_tokens:
            raise ReplicaError(f"token {event.index} of the answer came where token {self.num_tokens} was due")
        if event.finish_reason is FinishReason.ABORT:
            raise Aborted("the request was aborted before it was finished")
        if self.shown is not None and len(event.logprobs) != len(event.token_ids):
            raise ReplicaError(f"{len(event.token_ids)} tokens came with {len(event.logprobs)} log-probabilities")
        pieces = Pieces()
        ids = event.token_ids[: -1 if self._ends_with_stop_token(event) else None]
        for i, token_id in enumerate(ids):
            text = self.detokenizer.push((token_id,))
            if self.shown is not None:
                self.shown.push(token_id, event.logprobs[i], len(text))
            pieces.add(self._push(event.index + i, text))
        self.num_tokens += len(event.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        self.spans += event.spans
        self.finish_reason = event.finish_reason
        if event.finish_reason is not None:
            pieces.add(self.parser.push(self._rest()))
        if event.finish_reason is not None or self.parser.is_stopped:
            pieces.add(self.parser.flush())
        if self.parser.is_stopped or event.finish_reason is FinishReason.STOP:
            self.finish_reason = TOOL_CALLS if self.parser.has_calls else FinishReason.STOP
        tokens = self.shown.take(self.parser, len(pieces.content)) if self.shown is not None else None
        return Delta(self.index, pieces, list(event.token_ids), self.finish_reason, tokens)

    def _push(self, position: int, text: str) -> Pieces:
        was_reasoning = self.parser.is_reasoning
        # no stop string may end the answer before min_tokens
        is_searched = position >= self.request.sampling.min_tokens
        pieces = self.parser.push(text, is_searched=is_searched)
        self.num_reasoning_tokens += was_reasoning or self.parser.is_reasoning
        return pieces

    def _rest(self) -> str:
        text = self.detokenizer.flush()
        if self.shown is not None:
            self.shown.extend(len(text))
        return text

    def _ends_with_stop_token(self, event: TokenEvent) -> bool:
        stop_tokens = self.request.eos_token_ids + self.request.sampling.stop_token_ids
        return (
            event.finish_reason is FinishReason.STOP
            and event.token_ids[-1:] != ()
            and event.token_ids[-1] in stop_tokens
        )


class Answer:
    """Runs all choices of a job side by side; an async context manager that owns their backend iterators.

    One task per choice reads the backend as fast as it delivers and merges the text; the owner takes what has
    gathered when it suits him. A slow client thus costs one string per choice, of `max_unread_tokens` all together; one
    that is slower fails with SlowClient.
    Leaving the context, however that happens, aborts what still runs and waits until the backend has let go.
    """

    def __init__(
        self,
        backend: Backend,
        job: Job,
        processor: Processor,
        rounds: Rounds = SINGLE_ROUND,
        *,
        max_unread_tokens: int = MAX_UNREAD_TOKENS,
    ) -> None:
        self._backend = backend
        self._job = job
        self._processor = processor
        self._rounds = rounds
        self._max_unread_tokens = max_unread_tokens
        self.choices: Sequence[Choice] = [Choice(i, [self._text(i, r)]) for i, r in enumerate(job.requests)]
        self._pending: dict[int, Delta] = {}
        self._num_running = len(self.choices)
        self._error: BaseException | None = None
        self._news = asyncio.Event()
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._readers = [asyncio.create_task(self._read(choice)) for choice in self.choices]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all rounds; in the first one a prompt counts once, however many answers it gets."""
        return self._job.num_prompt_tokens + sum(text.request.num_prompt_tokens for text in self._further)

    def num_media_tokens(self, kind: MediaKind) -> int:
        """Those of them that stand for pictures or videos."""
        further = (m for text in self._further for m in text.request.media)
        return self._job.num_media_tokens(kind) + sum(m.num_tokens for m in further if m.kind == kind)

    @property
    def num_tokens(self) -> int:
        """Output tokens of all choices."""
        return sum(c.num_tokens for c in self.choices)

    @property
    def num_reasoning_tokens(self) -> int:
        """Those of the output tokens that are reasoning, its end mark included."""
        return sum(c.num_reasoning_tokens for c in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Those of the prompt tokens that came from a cache."""
        num_answers, firsts = self._job.num_answers, [choice.rounds[0].num_cached_tokens for choice in self.choices]
        by_prompt = [max(firsts[i : i + num_answers]) for i in range(0, len(firsts), num_answers)]
        return sum(by_prompt) + sum(text.num_cached_tokens for text in self._further)

    @property
    def _further(self) -> list[ChoiceText]:
        """All rounds but the first."""
        return [text for choice in self.choices for text in choice.rounds[1:]]

    @property
    def num_unread_tokens(self) -> int:
        """Output tokens that have come and were not taken."""
        return sum(delta.num_tokens for delta in self._pending.values())

    @property
    def is_over(self) -> bool:
        """Every choice is finished, and all its text taken."""
        return not self._num_running and not self._pending and self._error is None

    async def take(self) -> list[Delta]:
        """All news since the last call, one delta per choice that has any; [] when every choice is finished.

        Raises:
            ErnieClusterError: a choice failed; raised after the text that came before has been taken.
        """
        while not self._pending and self._num_running and self._error is None:
            self._news.clear()
            await self._news.wait()
        if not self._pending and self._error is not None:
            raise self._error
        news = list(self._pending.values())
        self._pending.clear()
        return news

    def _text(self, index: int, request: GenerationRequest) -> ChoiceText:
        return ChoiceText(
            index,
            request,
            self._processor.detokenizer(),
            AnswerParser(self._job.markup, StopStringFilter(self._job.stop)),
            ShownTokens(self._processor.token_bytes) if request.sampling.num_logprobs is not None else None,
        )

    async def _read(self, choice: Choice) -> None:
        try:
            await self._read_rounds(choice)
        except Exception as e:
            self._error = self._error or e
        except asyncio.CancelledError:  # ours, and nobody listens any more; or the backend's, and that must be told
            self._error = self._error or ReplicaError("the answer was cancelled before it was finished")
            raise
        finally:
            self._num_running -= 1
            self._news.set()

    async def _read_rounds(self, choice: Choice) -> None:
        turns = self._rounds.begin(choice.last)
        while True:
            await self._read_events(choice.last, turns)
            step = await turns.follow(choice.last)
            if step is None:
                return
            self._publish(step.delta)
            if step.request is None:
                return
            choice.rounds.append(self._text(choice.index, step.request))

    async def _read_events(self, text: ChoiceText, turns: Turns) -> None:
        # "Closing the iterator early" is aclose(), which all async generators have.
        events = cast("AsyncGenerator[list[TokenEvent]]", self._backend.generate(text.request))
        async with aclosing(events):
            try:
                async for batch in events:
                    for event in batch:
                        self._publish(turns.shown(text.push(event)))
                        if text.finish_reason is not None:
                            return
            except ErnieClusterError as e:
                text.spans += e.journey
                raise
        raise ReplicaError(f"the answer broke off after {text.num_tokens} tokens without a reason")

    def _publish(self, delta: Delta) -> None:
        if self._error is not None:
            return  # what came before the failure is still delivered, nothing after it
        pending = self._pending.get(delta.index)
        if pending is None:
            self._pending[delta.index] = delta
        else:
            pending.add(delta)
        self._news.set()
        if self.num_unread_tokens > self._max_unread_tokens:
            raise SlowClient(f"{self.num_unread_tokens} tokens are unread, the limit is {self._max_unread_tokens}")
