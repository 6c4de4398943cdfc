"""Requests that only ask about tokens: text to ids and back in vLLM's spelling, and the length of a prompt.

Nothing is generated, so no engine hears of them. Each is a function from a request's body to the answer; CPU work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from ernie_cluster.api.anthropic_body import read_prompt
from ernie_cluster.api.media import wanted_media
from ernie_cluster.api.prepare import chat_prompt
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.schemas import ChatBody, Token, parse_body
from ernie_cluster.api.translate import renamed
from ernie_cluster.api.validate import Strict, refuse_unsupported, validated
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.request import GenerationRequest, SamplingParams

FindProcessor = Callable[[str], Processor]
"""By model name; raises UnknownModel."""

Query = Callable[[dict[str, Any], FindProcessor], dict[str, Any]]
"""Answers one request's body; raises InvalidRequest."""

_NOTHING = SamplingParams(max_tokens=1)


class TokenizeBody(Strict):
    """What `POST /tokenize` takes beside a chat request's fields: a text, or a chat."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
                {"allOf": [{"$ref": "#/components/schemas/ChatBody"}], "properties": {"prompt": {"type": "null"}}},
            ]
        }
    )

    model: str
    prompt: str | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Strict):
    """Body of `POST /detokenize`."""

    model: str
    tokens: Annotated[list[Token], Field(fail_fast=True)]


HARMLESS: dict[str, tuple[Any, ...]] = {"chat_template": (None,), "continue_final_message": (None, False)}
"""Fields of vLLM's that are not supported, and the values with which they ask for nothing."""


def tokenize(raw: dict[str, Any], find: FindProcessor) -> dict[str, Any]:
    """`{"model", "prompt"}` or `{"model", "messages", ...}`: the prompt that this would make, as token ids.

    A text prompt is taken as completions take it, which add no special tokens: `add_special_tokens` changes nothing.
    """
    refuse_unsupported(raw, HARMLESS)
    body = validated(TokenizeBody, raw)
    if (body.prompt is None) == (raw.get("messages") is None):
        raise InvalidRequest("give either prompt or messages", "prompt")
    processor = find(body.model)
    if body.prompt is not None:
        request = processor.completion(body.prompt, request_id="", sampling=_NOTHING, timeout_s=1.0)
    else:
        chat = parse_body(ChatBody, {k: v for k, v in raw.items() if k != "add_generation_prompt"})
        request = _chat(chat, processor, add_generation_prompt=body.add_generation_prompt is not False)
    tokens = request.prompt_token_ids.tolist()
    texts = [processor.token_bytes(token).decode(errors="replace") for token in tokens]
    return {
        "count": len(tokens),
        "max_model_len": processor.max_model_len,
        "tokens": tokens,
        "token_strs": texts if body.return_token_strs else None,
    }


def detokenize(raw: dict[str, Any], find: FindProcessor) -> dict[str, Any]:
    """`{"model", "tokens"}`: the text that the ids stand for, control tokens included."""
    body = validated(DetokenizeBody, raw)
    processor = find(body.model)
    for i, token in enumerate(body.tokens):
        if token >= processor.vocab_size:
            param = f"tokens[{i}]"
            raise InvalidRequest(f"{param}: token id {token} is not in [0, {processor.vocab_size})", param)
    return {"prompt": b"".join(map(processor.token_bytes, body.tokens)).decode(errors="replace")}


def count_tokens(raw: dict[str, Any], find: FindProcessor) -> dict[str, Any]:
    """`POST /v1/messages/count_tokens`, Anthropic's: the length of the prompt of a request for a message."""
    body, origins = read_prompt(raw)
    try:
        request = _chat(body, find(body.model), add_generation_prompt=True)
    except InvalidRequest as e:
        raise renamed(e, origins) from None
    return {"input_tokens": request.num_prompt_tokens}


def _chat(body: ChatBody, processor: Processor, *, add_generation_prompt: bool) -> GenerationRequest:
    for wanted in wanted_media(body):
        raise InvalidRequest(
            f"{wanted.param}: nothing is fetched only to count tokens; send a data: URL, or ask for an answer of 1 token",
            wanted.param,
            "media_not_fetched",
        )
    return chat_prompt(
        body,
        processor,
        request_id="",
        sampling=_NOTHING,
        timeout_s=1.0,
        add_generation_prompt=add_generation_prompt,
    )
