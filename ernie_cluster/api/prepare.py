"""From a checked body to the requests that answer it: one per choice. CPU work, for a worker thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ernie_cluster.api.constraints import grammar_of
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.markup import Markup
from ernie_cluster.api.media import Fetched, attach
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.salt import salt_of, salted
from ernie_cluster.api.schemas import ChatBody, CompletionBody, GenerationBody, prompts_of
from ernie_cluster.api.translate import renamed
from ernie_cluster.errors import ContextTooLong, InvalidRequest
from ernie_cluster.request import GenerationRequest, MediaKind, SamplingParams, ThinkingLimit

TEXT_MAX_TOKENS = 256
"""Of a text's continuation where neither client nor operator says."""


@dataclass(frozen=True, slots=True)
class Job:
    """All that answering one client request takes."""

    response_id: str
    requests: tuple[GenerationRequest, ...]
    """By choice index, `prompt * num_answers + answer`."""
    num_answers: int
    """Choices per prompt."""
    stop: tuple[str, ...]
    markup: Markup
    is_stream: bool
    has_usage: bool
    """A stream tells its usage at the end; an answer in one piece always does."""
    has_timeline: bool
    has_token_ids: bool = False
    """The answer tells the ids of its tokens, and the prompt's."""

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, however many answers it gets."""
        return sum(r.num_prompt_tokens for r in self.requests[:: self.num_answers])

    def num_media_tokens(self, kind: MediaKind) -> int:
        """Those of the prompt tokens that stand for pictures or videos."""
        media = (m for request in self.requests[:: self.num_answers] for m in request.media)
        return sum(m.num_tokens for m in media if m.kind == kind)


def prepare(
    body: GenerationBody,
    processor: Processor,
    limits: ApiLimits,
    *,
    response_id: str,
    seed: int,
    timeout_s: float,
    tenant_salt: bytes = b"",
    tenant: str = "",
    fetched: Fetched | None = None,
) -> Job:
    """Build the requests of all choices.

    Args:
        body: a `ChatBody` or a `CompletionBody`.
        processor: of the model that the body names.
        limits: bounds of the API.
        response_id: unique; the requests are called `<response_id>-<choice>`.
        seed: used where the client gives none; answer i of a prompt draws from seed + i.
        timeout_s: what is left of the request's time.
        tenant_salt: see `salt_of`.
        tenant: whose requests they are.
        fetched: what the chat names by URL.

    Raises:
        InvalidRequest: names the field; ContextTooLong: prompt or answer do not fit the model.
        Overloaded: the answer's format could not be checked in time.
    """
    _check_counts(body, limits)
    salt = salt_of(tenant_salt, body.cache_salt)
    sampling = sampling_of(body, processor, seed)
    num_answers = body.n or 1
    requests = [
        replace(
            request,
            request_id=f"{response_id}-{p * num_answers + i}",
            priority=body.priority or 0,
            tenant=tenant,
            sampling=replace(request.sampling, seed=(sampling.seed + i) % 2**64),
        )
        for p, prompt in enumerate(
            _prompts(body, processor, limits, response_id, sampling, timeout_s, salt, fetched or {})
        )
        for i, request in enumerate([salted(_fit(prompt, body, processor, limits), salt)] * num_answers)
    ]
    markup = _markup(body, processor, requests[0])
    form: dict[str, Any] = {
        "grammar": grammar_of(body, limits.max_grammar_bytes, opens_reasoning=markup.reasoning == "open"),
        "thinking": _thinking_limit(body, processor, markup),
    }
    if any(form.values()):
        requests = [replace(r, sampling=replace(r.sampling, **form)) for r in requests]
    return Job(
        response_id=response_id,
        requests=tuple(requests),
        num_answers=num_answers,
        stop=tuple(body.stop),
        markup=markup,
        is_stream=bool(body.stream),
        has_usage=body.stream_options is not None and body.stream_options.include_usage,
        has_timeline=bool(body.include_timeline),
        has_token_ids=bool(body.return_token_ids),
    )


def sampling_of(body: GenerationBody, processor: Processor, seed: int) -> SamplingParams:
    """Sampling parameters, token ids checked against the vocabulary; `max_tokens` is 1 until `_fit` settles it."""
    bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    _check_tokens([token for token, _ in bias], "logit_bias", processor)
    _check_tokens(body.stop_token_ids or [], "stop_token_ids", processor)
    given: dict[str, Any] = {
        "max_tokens": 1,
        "min_tokens": body.min_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "stop_token_ids": None if body.stop_token_ids is None else tuple(body.stop_token_ids),
        "ignore_eos": body.ignore_eos,
        "num_logprobs": body.num_logprobs,
    }
    return SamplingParams(
        seed=(seed if body.seed is None else body.seed) % 2**64,
        logit_bias=bias,
        **{name: value for name, value in given.items() if value is not None},
    )


def _prompts(
    body: GenerationBody,
    processor: Processor,
    limits: ApiLimits,
    response_id: str,
    sampling: SamplingParams,
    timeout_s: float,
    salt: bytes,
    fetched: Fetched,
) -> Iterator[GenerationRequest]:
    if isinstance(body, ChatBody):
        yield chat_prompt(
            body,
            processor,
            request_id=response_id,
            sampling=sampling,
            timeout_s=timeout_s,
            salt=salt,
            fetched=fetched,
        )
        return
    assert isinstance(body, CompletionBody)
    prompts = prompts_of(body.prompt)
    _check_at_most(len(prompts), limits.max_prompts, "prompt", "prompts")
    for i, prompt in enumerate(prompts):
        try:
            request = processor.completion(prompt, request_id=response_id, sampling=sampling, timeout_s=timeout_s)
        except InvalidRequest as e:
            raise renamed(e, {"prompt": f"prompt[{i}]"} if prompts is body.prompt else {}) from None
        yield request


def chat_prompt(
    body: ChatBody,
    processor: Processor,
    *,
    request_id: str,
    sampling: SamplingParams,
    timeout_s: float,
    add_generation_prompt: bool = True,
    salt: bytes = b"",
    fetched: Fetched | None = None,
    messages: list[dict[str, Any]] | None = None,
) -> GenerationRequest:
    """The request that a conversation makes; arguments and errors as of `Processor.chat` and `prepare`.

    Args:
        messages: the conversation, where it has grown beyond the body's.
    """
    return processor.chat(
        attach(body.dumped_messages if messages is None else messages, fetched or {}),
        request_id=request_id,
        sampling=sampling,
        enable_thinking=body.thinking,
        tools=[t.definition for t in body.offered_tools] or None,
        timeout_s=timeout_s,
        add_generation_prompt=add_generation_prompt,
        cache_salt=salt,
    )


def _markup(body: GenerationBody, processor: Processor, request: GenerationRequest) -> Markup:
    if not isinstance(body, ChatBody):
        return Markup()
    return Markup(
        "open" if processor.opens_reasoning(request) else "maybe",
        has_tools=bool(body.offered_tools),
        is_one_call=body.parallel_tool_calls is False,
    )


def _thinking_limit(body: GenerationBody, processor: Processor, markup: Markup) -> ThinkingLimit | None:
    """None when nothing bounds the thought, or the prompt does not open one."""
    if not isinstance(body, ChatBody) or body.max_thinking_tokens is None or markup.reasoning != "open":
        return None
    return processor.thinking_limit(body.max_thinking_tokens)


def _fit(
    request: GenerationRequest, body: GenerationBody, processor: Processor, limits: ApiLimits
) -> GenerationRequest:
    """Settle `max_tokens` now that the prompt's length is known."""
    num_prompt_tokens, most = request.num_prompt_tokens, processor.max_model_len
    room = most - num_prompt_tokens
    prompt_field = "messages" if isinstance(body, ChatBody) else "prompt"
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {num_prompt_tokens} tokens and the context {most}; no token is left for an answer",
            prompt_field,
        )
    name, asked = body.asked_max_tokens
    if asked is not None and asked > room:
        raise ContextTooLong(
            f"{num_prompt_tokens} prompt tokens and {name} {asked} exceed the context of {most}; ask for at most {room}",
            name,
        )
    max_tokens = min(_default_max_tokens(body, limits) or room, room) if asked is None else asked
    if request.sampling.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens {request.sampling.min_tokens} is above the answer's limit of {max_tokens} tokens", "min_tokens"
        )
    return replace(request, sampling=replace(request.sampling, max_tokens=max_tokens))


def _default_max_tokens(body: GenerationBody, limits: ApiLimits) -> int | None:
    """None where nothing but the context bounds the answer."""
    return limits.default_max_tokens or (None if isinstance(body, ChatBody) else TEXT_MAX_TOKENS)


def _check_counts(body: GenerationBody, limits: ApiLimits) -> None:
    _check_at_most(body.n or 1, limits.max_n, "n", "answers")
    _check_at_most(len(body.stop), limits.max_stop, "stop", "stop strings")
    if isinstance(body, ChatBody):
        _check_at_most(len(body.messages), limits.max_messages, "messages", "messages")
        _check_at_most(len(body.tools or ()), limits.max_tools, "tools", "tools")


def _check_at_most(count: int, limit: int, param: str, what: str) -> None:
    if count > limit:
        raise InvalidRequest(f"{param}: {count} {what} are too many; the limit is {limit}", param)


def _check_tokens(token_ids: list[int], param: str, processor: Processor) -> None:
    """An id beyond the vocabulary would be read outside a table by the engine."""
    vocab_size = processor.vocab_size
    bad = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(f"{param}: token id {bad} is not in [0, {vocab_size})", param)
