"""A made-up server that knows the questions it will be asked, and their right answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ernie_cluster.skills.sample import Sample

Message = dict[str, Any]
Reply = Callable[[Sample, bool], Awaitable[Message | Response]]
"""(question, whether its tool was run already) -> the assistant's message, or a whole response."""


def call(name: str, arguments: str) -> Message:
    """A message that calls one tool."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def truth(sample: Sample, is_after_call: bool) -> Message:
    """The right message."""
    if sample.tool_call is not None and not is_after_call:
        return call(sample.tool_call.name, json.dumps(dict(sample.tool_call.arguments)))
    return {"role": "assistant", "content": sample.answer, "reasoning_content": sample.reasoning or None}


async def tell_truth(sample: Sample, is_after_call: bool) -> Message:
    return truth(sample, is_after_call)


async def lie(sample: Sample, is_after_call: bool) -> Message:
    return {"role": "assistant", "content": "no idea"}


class Oracle:
    """An ASGI app.

    Args:
        samples: what it may be asked, told apart by their first message.
        reply: what it says.
    """

    def __init__(self, samples: Iterable[Sample], reply: Reply = tell_truth) -> None:
        self._samples = {json.dumps(sample.wire_messages()[0]): sample for sample in samples}
        self._reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.app = Starlette(
            routes=[Route("/v1/models", self._models), Route("/v1/chat/completions", self._chat, methods=["POST"])]
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "oracle"}]})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        reply = await self._reply(self.sample_of(body), len(body["messages"]) > 1)
        return reply if isinstance(reply, Response) else JSONResponse({"choices": [{"index": 0, "message": reply}]})

    def sample_of(self, body: dict[str, Any]) -> Sample:
        """The question that a request asks."""
        return self._samples[json.dumps(body["messages"][0])]
