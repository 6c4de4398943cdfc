"""The gRPC face: `ernie_cluster.v1.Inference` over the same service as HTTP. Knows no Ray and no tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import grpc

from ernie_cluster.api.generation import Generation, Lookup, Work
from ernie_cluster.api.grpc_answer import ChatCall, GenerateCall
from ernie_cluster.api.grpc_body import chat_body, generate_body
from ernie_cluster.api.grpc_call import Behaviour, Call, handler
from ernie_cluster.api.prepare import chat_prompt
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.protobuf import parse_message
from ernie_cluster.api.schemas import ChatBody, CompletionBody, prompts_of
from ernie_cluster.api.service import Service
from ernie_cluster.api.traffic import Meter
from ernie_cluster.api.translate import renamed
from ernie_cluster.errors import DeadlineExceeded, InvalidRequest
from ernie_cluster.proto.v1 import inference_pb2 as pb
from ernie_cluster.request import GenerationRequest, SamplingParams

NAME = "ernie_cluster.v1.Inference"

_NOTHING = SamplingParams(max_tokens=1)


def inference(service: Service) -> grpc.GenericRpcHandler:
    """The methods of `Inference`."""
    works = _works(service)
    return grpc.method_handlers_generic_handler(
        NAME, {name: handler(_run(service, work), service.limits) for name, work in works.items()}
    )


def _works(service: Service) -> Mapping[str, Callable[[], Work]]:
    limits = service.limits
    chat, generate = partial(parse_message, pb.ChatRequest), partial(parse_message, pb.GenerateRequest)
    return {
        "Chat": lambda: Generation(service, ChatCall(limits, is_stream=False), chat),
        "StreamChat": lambda: Generation(service, ChatCall(limits, is_stream=True), chat),
        "Generate": lambda: Generation(service, GenerateCall(is_stream=False), generate),
        "StreamGenerate": lambda: Generation(service, GenerateCall(is_stream=True), generate),
        "Tokenize": lambda: Lookup(service, partial(_tokenize, service), has_files=True),
        "ListModels": lambda: Lookup(service, partial(_list_models, service)),
    }


def _run(service: Service, make: Callable[[], Work]) -> Behaviour:
    async def behaviour(call: Call) -> None:
        remaining_s, timeout_s = call.time_remaining_s, service.limits.request_timeout_s
        if remaining_s is not None:
            if remaining_s <= 0:
                raise DeadlineExceeded("the deadline had passed when the call arrived")
            timeout_s = min(timeout_s, remaining_s)
        async with service.request(timeout_s) as meter:
            await make().answer(await _message(call, service, meter), call, meter, call.visit.guest, timeout_s)

    return behaviour


async def _message(call: Call, service: Service, meter: Meter) -> bytes:
    raw = await call.read(service.limits)
    meter.took(len(raw))
    return raw


def _tokenize(service: Service, raw: bytes) -> bytes:
    request = parse_message(pb.TokenizeRequest, raw, service.limits)
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("chat: give generate or chat", "chat")
    try:
        processor, prompt = _prompt(service, request)
    except InvalidRequest as e:
        raise renamed(e, {e.param or "": f"{kind}.{e.param}"}) from None
    tokens = prompt.prompt_token_ids.tolist()
    response = pb.TokenizeResponse(
        token_ids=tokens, tokens=map(processor.token_bytes, tokens), max_model_len=processor.max_model_len
    )
    serialized: bytes = response.SerializeToString()
    return serialized


def _prompt(service: Service, request: pb.TokenizeRequest) -> tuple[Processor, GenerationRequest]:
    if request.HasField("chat"):
        found = chat_body(request.chat, service.limits, is_stream=False)
    else:
        found = generate_body(request.generate, is_stream=False)
    body = found.body
    processor = service.processor(body.model)
    try:
        if isinstance(body, ChatBody):
            prompt = chat_prompt(
                body, processor, request_id="", sampling=_NOTHING, timeout_s=1.0, fetched=found.content
            )
        else:
            assert isinstance(body, CompletionBody)
            (text,) = prompts_of(body.prompt)
            prompt = processor.completion(text, request_id="", sampling=_NOTHING, timeout_s=1.0)
    except InvalidRequest as e:
        raise renamed(e, found.origins) from None
    return processor, prompt


def _list_models(service: Service, raw: bytes) -> bytes:
    parse_message(pb.ListModelsRequest, raw, service.limits)
    models = [
        pb.Model(name=name, max_model_len=service.max_model_len(name), created=service.created)
        for name in service.names
    ]
    serialized: bytes = pb.ListModelsResponse(models=models).SerializeToString()
    return serialized
