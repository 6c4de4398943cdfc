"""The same requests over gRPC, asked synchronously by our own client."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ernie_cluster import client
from ernie_cluster.bench.reading import CUT
from ernie_cluster.bench.record import Record
from ernie_cluster.client import Client
from ernie_cluster.errors import ErnieClusterError
from ernie_cluster.proto.v1 import inference_pb2 as pb

_ROLES = {"system": pb.ROLE_SYSTEM, "user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}
_SAMPLING = ("max_tokens", "temperature", "seed", "ignore_eos")


def chat_request(body: Mapping[str, Any]) -> pb.ChatRequest:
    """A scenario's body as a message; pictures travel as bytes."""
    thinking = body.get("chat_template_kwargs", {}).get("enable_thinking")
    tools = [tool["function"] for tool in body.get("tools", ())]
    return pb.ChatRequest(
        model=body["model"],
        messages=[_message(message) for message in body["messages"]],
        sampling=pb.Sampling(**{name: body[name] for name in _SAMPLING if name in body}),
        tools=[
            pb.Tool(name=t["name"], description=t["description"], parameters=json.dumps(t["parameters"])) for t in tools
        ],
        **({} if thinking is None else {"enable_thinking": thinking}),
    )


def ask(
    connection: Client, scenario: str, request: pb.ChatRequest, clock: Callable[[], float] = time.perf_counter
) -> Record:
    """Ask, and read to the end; never raises for what the server or the network does. A kind of error is its class."""
    began_s, start_s = time.time(), clock()
    times_s: list[float] = []
    usage, is_finished, error, detail = pb.Usage(), False, "", ""
    fields = {field.name: value for field, value in request.ListFields() if field.name not in ("model", "messages")}
    try:
        for chunk in connection.stream_chat(request.model, request.messages, **fields):
            if any(choice.text or choice.reasoning or choice.tool_calls for choice in chunk.choices):
                times_s.append(clock())
            is_finished = is_finished or any(choice.finish_reason for choice in chunk.choices)
            if chunk.HasField("usage"):
                usage = chunk.usage
    except ErnieClusterError as e:
        error, detail = type(e).__name__, str(e)[:300]
    record = Record(
        scenario,
        began_s,
        clock() - start_s,
        ttft_s=times_s[0] - start_s if times_s else None,
        gaps_s=tuple(b - a for a, b in pairwise(times_s)),
        num_tokens=usage.completion_tokens or len(times_s),
        num_prompt_tokens=usage.prompt_tokens,
        num_cached_tokens=usage.cached_tokens,
    )
    if not error and not is_finished:
        error, detail = CUT, f"after {len(times_s)} pieces of text"
    return replace(record, error=error, detail=detail)


def _message(message: Mapping[str, Any]) -> pb.Message:
    content = message["content"]
    if isinstance(content, str):
        return pb.Message(role=_ROLES[message["role"]], text=content)
    return pb.Message(role=_ROLES[message["role"]], parts=[_part(part) for part in content])


def _part(part: Mapping[str, Any]) -> pb.Part:
    if part["type"] == "text":
        return pb.Part(text=part["text"])
    url: str = part[part["type"]]["url"]
    if part["type"] == "video_url":
        return client.video(url)
    return client.image(base64.b64decode(url.partition(",")[2]))
