"""Answers of several rounds: the model calls tools that the server itself runs, sees what came of it, and goes on.

Each round is a request of its own, and goes the way of all requests; the prefix cache knows most of its prompt. What
goes wrong in a tool the model is told, not the client. Calls of the client's own functions end an answer as ever.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ernie_cluster.api.answer import TOOL_CALLS, ChoiceText, Delta
from ernie_cluster.api.backend import Backend
from ernie_cluster.api.constraints import grammar_of
from ernie_cluster.api.deadline import Deadline
from ernie_cluster.api.dialect import Asked
from ernie_cluster.api.image_search import ImageSearcher, Run
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.markup import CallPiece, OwnCall, Pieces
from ernie_cluster.api.media import Fetched
from ernie_cluster.api.prepare import Job, chat_prompt
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.salt import salted
from ernie_cluster.api.schemas import ChatBody, GenerationBody
from ernie_cluster.api.service import Service
from ernie_cluster.api.sieve import Sieve
from ernie_cluster.api.tool_schemas import OwnTool
from ernie_cluster.api.turns import SINGLE_ROUND, Rounds, Step, Turns
from ernie_cluster.builtin.base import BuiltinTool, Search, ToolResult, failed
from ernie_cluster.builtin.pictures import Gallery, gallery_of
from ernie_cluster.builtin.registry import TOOLS
from ernie_cluster.builtin.turns import Called, turn_of
from ernie_cluster.errors import ContextTooLong, InvalidRequest
from ernie_cluster.request import FinishReason, GenerationRequest, MediaInput, Span


def own_tools_of(body: GenerationBody) -> Mapping[str, BuiltinTool]:
    """The tools of our own that a request offers to the model, by name."""
    offered = body.offered_tools if isinstance(body, ChatBody) else ()
    return {tool.type: TOOLS[tool.type] for tool in offered if isinstance(tool, OwnTool)}


def rounds_of(
    body: GenerationBody,
    job: Job,
    processor: Processor,
    service: Service,
    fetched: Fetched,
    deadline: Deadline,
    backend: Backend,
) -> Rounds:
    """Several, if tools of our own are offered; all of them until the deadline."""
    if not isinstance(body, ChatBody) or not own_tools_of(body):
        return SINGLE_ROUND
    run, searcher = partial(service.workers.run, has_media=bool(job.requests[0].media)), service.searcher
    return ToolRounds(body, job, processor, service.limits, fetched, run, deadline, backend, searcher)


def with_default_tools(asked: Asked, names: Sequence[str]) -> Asked:
    """The request, with the operator's choice of our own tools where a chat says nothing of tools."""
    if not names or not isinstance(asked.body, ChatBody) or asked.body.tools is not None:
        return asked
    tools = [OwnTool(type=name) for name in names]
    return replace(asked, body=asked.body.model_copy(update={"tools": tools}))


@dataclass(frozen=True, slots=True)
class ToolRounds:
    """All that further rounds of a job's choices are made from."""

    body: ChatBody
    job: Job
    processor: Processor
    limits: ApiLimits
    fetched: Fetched
    run: Run
    deadline: Deadline
    backend: Backend
    """For what tools ask of it."""
    searcher: ImageSearcher | None
    """Of the tool that searches; None = it is not on offer."""

    def begin(self, text: ChoiceText) -> Turns:
        return _Conversation(self, text)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why calls are not run, and how the answer ends therefore."""

    why: str
    finish_reason: str


@dataclass(slots=True)
class _Conversation:
    """One choice."""

    rounds: ToolRounds
    begun: ChoiceText
    """Its first round."""
    tools: Mapping[str, BuiltinTool] = field(init=False)
    sieve: Sieve = field(init=False)
    messages: list[dict[str, Any]] = field(init=False)
    files: Fetched = field(init=False)
    """Of pictures that were fetched, or found by tools."""
    num_rounds: int = 0
    """Of tools."""
    num_tokens: int = 0
    """That the model has written."""
    num_own_calls: int = 0

    def __post_init__(self) -> None:
        self.tools = own_tools_of(self.rounds.body)
        self.sieve = Sieve(self.tools)
        self.messages = self.rounds.body.dumped_messages
        self.files = self.rounds.fetched

    def shown(self, delta: Delta) -> Delta:
        """Without what only `follow` can tell: our own calls, and whether the answer is over."""
        return replace(delta, pieces=self.sieve.push(delta.pieces), finish_reason=None)

    async def follow(self, text: ChoiceText) -> Step:
        said, own = self.sieve.end_round()
        self.num_tokens += text.num_tokens
        if not own:
            return self._step([], text.finish_reason)
        calls = [Called(f"call_{text.request.request_id}_{c.index}", c.name or "", _legible(c.arguments)) for c in own]
        refusal = self._refusal(text, is_shared=len(own) < len(said.calls))
        if refusal is not None:
            return self._step(self._told(calls, own, [{"error": refusal.why}] * len(own)), refusal.finish_reason)
        self.num_rounds += 1
        start_s = time.time()
        begun = await self.rounds.run(partial(self._run_tools, calls))
        results = [await self._looked_up(r) if isinstance(r, Search) else r for r in begun]
        told, request = await self.rounds.run(partial(self._go_on, said, calls, results, text.request))
        names = tuple(("tool", call.name) for call in calls)
        text.spans.append(Span("tools", start_s, time.time() - start_s, names))
        return self._step(self._told(calls, own, told), None if request else FinishReason.LENGTH, request)

    def _refusal(self, text: ChoiceText, *, is_shared: bool) -> _Refusal | None:
        most = self.rounds.limits.max_tool_rounds
        if text.finish_reason != TOOL_CALLS:
            return _Refusal("not run: the answer was cut off", str(text.finish_reason))
        if is_shared:
            return _Refusal("not run: the answer ended with calls of the client's own functions", TOOL_CALLS)
        if text.parser.stop_string is not None:
            return _Refusal("not run: a stop string ended the answer", FinishReason.STOP)
        if self.num_rounds == most:
            return _Refusal(f"not run: an answer has at most {most} rounds of tools", FinishReason.LENGTH)
        if self.num_tokens >= self.begun.request.sampling.max_tokens:
            return _Refusal("not run: the answer has no tokens left", FinishReason.LENGTH)
        return None

    def _step(
        self, own_calls: list[OwnCall], finish_reason: str | None, request: GenerationRequest | None = None
    ) -> Step:
        return Step(Delta(self.begun.index, Pieces(own_calls=own_calls), finish_reason=finish_reason), request)

    def _told(
        self, calls: Sequence[Called], own: Sequence[CallPiece], results: Sequence[Mapping[str, Any]]
    ) -> list[OwnCall]:
        first, self.num_own_calls = self.num_own_calls, self.num_own_calls + len(calls)
        return [
            OwnCall(first + i, call.call_id, call.name, piece.arguments, result)
            for i, (call, piece, result) in enumerate(zip(calls, own, results, strict=True))
        ]

    async def _looked_up(self, wanted: Search) -> ToolResult:
        """Raises DeadlineExceeded."""
        rounds, salt = self.rounds, self.begun.request.cache_salt
        assert rounds.searcher is not None, "a tool that was not on offer"
        found = await rounds.searcher.find(
            wanted, self.files, salt, backend=rounds.backend, run=rounds.run, timeout_s=rounds.deadline.left_s
        )
        files, most = {**self.files, **found.content}, rounds.limits.max_body_bytes
        if found.content and sum(map(len, files.values())) > most:
            return failed(f"the files of this conversation's pictures would have more than {most} bytes together")
        self.files = files
        return found.result

    # In a worker thread

    def _run_tools(self, calls: Sequence[Called]) -> list[ToolResult | Search]:
        gallery = gallery_of(self.messages)
        return [self._result(call, gallery) for call in calls]

    def _go_on(
        self, said: Pieces, calls: Sequence[Called], results: Sequence[ToolResult], previous: GenerationRequest
    ) -> tuple[list[dict[str, Any]], GenerationRequest | None]:
        """What the client is told of each result, and the request of the next round; None when it does not fit."""
        try:
            return self._prepared(said, calls, results, previous)
        except InvalidRequest as e:  # for example pictures too many, or too large for the context
            results = [failed(e.message)] * len(calls)
        try:
            return self._prepared(said, calls, results, previous)
        except InvalidRequest:  # there is no room even for words
            return [_result_for_client(result, []) for result in results], None

    def _result(self, call: Called, gallery: Gallery) -> ToolResult | Search:
        try:
            arguments = json.loads(call.arguments)
            if not isinstance(arguments, dict):
                raise ValueError("the arguments must be a JSON object")
            return self.tools[call.name].run(arguments, gallery)
        except (ValueError, RecursionError) as e:
            return failed(str(e))

    def _prepared(
        self, said: Pieces, calls: Sequence[Called], results: Sequence[ToolResult], previous: GenerationRequest
    ) -> tuple[list[dict[str, Any]], GenerationRequest]:
        turn = turn_of(calls, [r.content for r in results], text=said.content, reasoning=said.reasoning)
        messages = [*self.messages, *turn]
        request = self._request(messages)
        self.messages = messages
        pictures = iter(
            request.media[len(previous.media) :]
        )  # a conversation only grows, and pictures keep their order
        told = [[self._picture(next(pictures)) for _ in result.pictures] for result in results]
        return [_result_for_client(*pair) for pair in zip(results, told, strict=True)], request

    def _request(self, messages: list[dict[str, Any]]) -> GenerationRequest:
        """Of the next round. Raises InvalidRequest."""
        rounds, first = self.rounds, self.begun.request
        stem, _, choice = first.request_id.rpartition("-")
        prompt = chat_prompt(
            rounds.body,
            rounds.processor,
            request_id=f"{stem}.{self.num_rounds}-{choice}",
            sampling=replace(first.sampling, max_tokens=1, min_tokens=0),
            timeout_s=rounds.deadline.left_s,
            salt=first.cache_salt,
            fetched=self.files,
            messages=messages,
        )
        self._check_pixels(prompt)
        room = rounds.processor.max_model_len - prompt.num_prompt_tokens
        if room < 1:
            raise ContextTooLong("the result does not fit into the context")
        sampling = replace(
            first.sampling,
            max_tokens=min(room, first.sampling.max_tokens - self.num_tokens),
            min_tokens=min(room, max(0, first.sampling.min_tokens - self.num_tokens)),
            grammar=self._grammar(),
        )
        return salted(replace(prompt, sampling=sampling), first.cache_salt)

    def _check_pixels(self, prompt: GenerationRequest) -> None:
        most = self.rounds.limits.max_tool_pixels
        num_pixels = sum(m.num_pixels for m in prompt.media) - sum(m.num_pixels for m in self.begun.request.media)
        if num_pixels > most:
            raise InvalidRequest(f"the pictures of tools would have {num_pixels} pixels together; the limit is {most}")

    def _grammar(self) -> str:
        """A call that was asked for has been made; from then on the model may answer."""
        body, job = self.rounds.body, self.rounds.job
        if not body.must_call:
            return self.begun.request.sampling.grammar
        free = body.model_copy(update={"tool_choice": "auto"})
        return grammar_of(free, self.rounds.limits.max_grammar_bytes, opens_reasoning=job.markup.reasoning == "open")

    def _picture(self, media: MediaInput) -> dict[str, Any]:
        """A picture that the model got, as a client is told of it."""
        _, height, width = media.grid_thw
        told: dict[str, Any] = {"width": 14 * width, "height": 14 * height}
        return told | {"url": self.rounds.processor.thumbnail(media)} if self.rounds.body.include_tool_results else told


def _legible(arguments: str) -> str:
    """Arguments as a template can print them: JSON as Python spells it; what is none stays as it is."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return json.dumps(parsed, ensure_ascii=False).encode("utf-8", "replace").decode()  # half surrogates become "?"


def _result_for_client(result: ToolResult, pictures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told = {"text": result.text} if result.text and "error" not in result.details else {}
    return {**told, **result.details, **({"images": list(pictures)} if pictures else {})}
