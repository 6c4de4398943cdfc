"""Twins of the real parts, for tests: true to their protocols, and with nothing behind them."""

from __future__ import annotations

import asyncio
import base64
import codecs
import dataclasses
import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.api.backend import ModelStatus, ReplicaExperts, ReplicaLoad
from ernie_cluster.api.operator import ClusterView, DecisionView, FaultsView, Order, ReplicaView
from ernie_cluster.errors import ContextTooLong, InvalidRequest, OrderRefused, Overloaded, UnknownReplica
from ernie_cluster.faults import FaultOrder
from ernie_cluster.request import (
    FinishReason,
    GenerationRequest,
    MediaInput,
    SamplingParams,
    Span,
    ThinkingLimit,
    TokenEvent,
    TokenLogprobs,
)

EOS = 256
"""End token of the byte tokenizer; 0 to 255 are bytes."""


def bytes_of(text: str) -> tuple[int, ...]:
    """Token ids of `text`."""
    return tuple(text.encode())


@dataclass(frozen=True)
class Step:
    """One item of a backend's stream."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


Script = Sequence["Step | asyncio.Event | BaseException"]
"""What a backend does in order: yields a step, waits for an event, or raises."""


def say(text: str, tokens_per_step: int = 1, finish_reason: FinishReason | None = FinishReason.STOP) -> list[Step]:
    """Steps that spell `text`, and end with the end token (STOP), without it (LENGTH), or not at all (None)."""
    ids = bytes_of(text)
    steps = [Step(ids[i : i + tokens_per_step]) for i in range(0, len(ids), tokens_per_step)]
    if finish_reason is FinishReason.STOP:
        return [*steps, Step((EOS,), finish_reason)]
    return steps if finish_reason is None else [*steps, Step((), finish_reason)]


NO_CLUSTER = ClusterView((), (), False, 0.0, 0.0, "GPUs", ())


def vector_of(digest: bytes) -> NDArray[np.float32]:
    """Eight numbers of length 1, others for each digest."""
    vector = np.random.default_rng(int.from_bytes(digest[:8], "big")).normal(size=8)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class FakeBackend:
    """A `Backend` that plays a script to every request.

    A step beyond the request's `max_tokens` is cut there with finish reason LENGTH, as an engine does.

    Args:
        script: see `Script`.
        scripts: one script per choice, by request id's end `-<choice>`; the others play `script`.
        num_cached_tokens: told with the last event.
        spans: told with the last event.
    """

    def __init__(
        self,
        script: Script = (),
        *,
        scripts: dict[int, Script] | None = None,
        num_cached_tokens: int = 0,
        spans: tuple[Span, ...] = (),
    ) -> None:
        self.script = script
        self.scripts = scripts or {}
        self.num_cached_tokens = num_cached_tokens
        self.spans = spans
        self.states: list[ModelStatus] | Exception = [ModelStatus("tiny", True, "")]
        self.load_news: list[ReplicaLoad] | Exception = []
        self.expert_news: list[ReplicaExperts] | Exception = []
        self.cluster_news: ClusterView | Exception = NO_CLUSTER
        self.decision_news: list[DecisionView] | Exception = []
        self.orders: list[Order] = []
        self.fault_orders: list[FaultOrder] = []
        self.fault_news: FaultsView | Exception = FaultsView((), ())
        self.num_looks = 0
        """How often somebody asked for the loads."""
        self.knocks: list[tuple[str, int, int]] = []
        self.closed_door: Overloaded | None = None
        """What `knock` raises."""
        self.requests: list[GenerationRequest] = []
        self.arrivals: asyncio.Queue[GenerationRequest] = asyncio.Queue()
        """The same requests, to be waited for."""
        self.finished: list[str] = []
        """Ids of requests that were played to their last event, or to their error."""
        self.aborted: list[str] = []
        """Ids of requests that were closed before."""
        self.embedded: list[tuple[str, MediaInput]] = []
        """Model and picture of every call of `embed`."""
        self.embed_script: list[asyncio.Event | Exception] = []
        """What the next calls of `embed` wait for, or raise."""
        self.is_closed = False

    async def knock(self, model: str, max_tokens: int, priority: int, timeout_s: float) -> None:
        self.knocks.append((model, max_tokens, priority))
        if self.closed_door is not None:
            raise self.closed_door

    async def embed(self, model: str, media: MediaInput, timeout_s: float) -> NDArray[np.float32]:
        self.embedded.append((model, media))
        if self.embed_script:
            item = self.embed_script.pop(0)
            if isinstance(item, Exception):
                raise item
            await item.wait()
        return vector_of(media.media_hash)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
        self.requests.append(request)
        self.arrivals.put_nowait(request)
        is_finished = False
        index = 0
        try:
            for item in self._script_of(request):
                if isinstance(item, asyncio.Event):
                    await item.wait()
                    continue
                if isinstance(item, BaseException):
                    is_finished = True
                    raise item
                event = self._event(request, index, item)
                index += len(event.token_ids)
                is_finished = event.finish_reason is not None
                yield [event]
                if is_finished:
                    return
            is_finished = True
        finally:
            (self.finished if is_finished else self.aborted).append(request.request_id)

    def _script_of(self, request: GenerationRequest) -> Script:
        return self.scripts.get(int(request.request_id.rpartition("-")[2]), self.script)

    def _event(self, request: GenerationRequest, index: int, step: Step) -> TokenEvent:
        room = request.sampling.max_tokens - index
        ids, reason = step.token_ids[:room], step.finish_reason
        if len(step.token_ids) >= room and reason is None:
            reason = FinishReason.LENGTH
        is_last = reason is not None
        return TokenEvent(
            request.request_id,
            index,
            ids,
            reason,
            self.num_cached_tokens if is_last else 0,
            self.spans if is_last else (),
            () if request.sampling.num_logprobs is None else tuple(map(partial(_logprobs, request.sampling), ids)),
        )

    async def status(self) -> list[ModelStatus]:
        if isinstance(self.states, Exception):
            raise self.states
        return self.states

    async def loads(self) -> list[ReplicaLoad]:
        self.num_looks += 1
        if isinstance(self.load_news, Exception):
            raise self.load_news
        return self.load_news

    async def experts(self) -> list[ReplicaExperts]:
        if isinstance(self.expert_news, Exception):
            raise self.expert_news
        return self.expert_news

    async def cluster(self) -> ClusterView:
        if isinstance(self.cluster_news, Exception):
            raise self.cluster_news
        return self.cluster_news

    async def decisions(self) -> list[DecisionView]:
        if isinstance(self.decision_news, Exception):
            raise self.decision_news
        return self.decision_news

    async def faults(self, order: FaultOrder) -> FaultsView:
        if isinstance(self.fault_news, Exception):
            raise self.fault_news
        self.fault_orders.append(order)
        return self.fault_news

    async def order(self, order: Order) -> ReplicaView:
        """What `cluster` tells from now on; a role has to be one that some replica of the model was started in."""
        view = await self.cluster()
        known = {replica.replica: replica for replica in view.replicas}
        if order.replica not in known:
            raise UnknownReplica(f"no replica {order.replica!r}; there are: {', '.join(known) or 'none'}")
        self.orders.append(order)
        changed = _ordered(known[order.replica], order, {(r.model, r.home) for r in view.replicas})
        known[order.replica] = changed
        self.cluster_news = dataclasses.replace(view, replicas=tuple(known.values()))
        return changed

    async def close(self) -> None:
        self.is_closed = True


def _ordered(replica: ReplicaView, order: Order, pools: set[tuple[str, str]]) -> ReplicaView:
    if order.action != "role":
        return dataclasses.replace(replica, phase="draining" if order.action == "drain" else "ready")
    if order.role is None or (replica.model, order.role) not in pools:
        raise OrderRefused(f"{replica.model} has no {order.role} pool")
    return dataclasses.replace(replica, role=order.role, phase="switching")


def _logprobs(sampling: SamplingParams, token_id: int) -> TokenLogprobs:
    """The chosen token is the likeliest, the ones after it by number follow."""
    count = sampling.num_logprobs or 0
    return TokenLogprobs(-0.5, tuple(((token_id + i) % (EOS + 1), -0.5 - i) for i in range(count)))


class ByteDetokenizer:
    """UTF-8, character by character; control tokens are left out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(bytes(i for i in ids if i < EOS))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeProcessor:
    """A `Processor` whose tokens are bytes and whose template is `<role>text` per message. A picture is one byte.

    With `enable_thinking` the prompt ends in `<think>`.
    """

    eos_token_ids = (EOS,)
    vocab_size = EOS + 1

    def __init__(self, served_name: str = "tiny", max_model_len: int = 512) -> None:
        self.served_name = served_name
        self.max_model_len = max_model_len
        self.calls: list[dict[str, Any]] = []
        """Arguments of every call of `chat`."""

    def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        request_id: str,
        sampling: SamplingParams,
        enable_thinking: bool | None,
        tools: list[dict[str, Any]] | None,
        timeout_s: float,
        add_generation_prompt: bool = True,
        cache_salt: bytes = b"",
    ) -> GenerationRequest:
        self.calls.append({"messages": messages, "enable_thinking": enable_thinking, "tools": tools})
        prompt = "".join(f"<{m['role']}>{_text(m.get('content'))}" for m in messages)
        prompt += "<think>" if enable_thinking and add_generation_prompt else ""
        return self._request(list(bytes_of(prompt)), "messages", request_id, sampling, timeout_s)

    def completion(
        self, prompt: str | list[int], *, request_id: str, sampling: SamplingParams, timeout_s: float
    ) -> GenerationRequest:
        if isinstance(prompt, list) and not all(0 <= i < self.vocab_size for i in prompt):
            raise InvalidRequest(f"a token id is not in [0, {self.vocab_size})", "prompt")
        ids = list(bytes_of(prompt)) if isinstance(prompt, str) else prompt
        return self._request(ids, "prompt", request_id, sampling, timeout_s)

    def _request(
        self, ids: list[int], param: str, request_id: str, sampling: SamplingParams, timeout_s: float
    ) -> GenerationRequest:
        if len(ids) > self.max_model_len:
            raise ContextTooLong(f"the prompt has {len(ids)} tokens, the context {self.max_model_len}", param)
        positions = np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids)))
        return GenerationRequest(
            request_id,
            self.served_name,
            np.array(ids, dtype=np.int32),
            positions,
            sampling,
            eos_token_ids=self.eos_token_ids,
            timeout_s=timeout_s,
        )

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b"<eos>"

    def picture(self, given: dict[str, Any], *, cache_salt: bytes = b"") -> MediaInput:
        """The hash is that of the file and the regions; a file that says it is broken is refused."""
        file = given.get("content", base64.b64decode(given["url"].partition(",")[2]))
        if file == b"broken":
            raise InvalidRequest("the image cannot be decoded", "image_url.url")
        digest = hashlib.sha256(repr((file, tuple(given.get("regions", ())))).encode()).digest()
        return MediaInput("image", digest, (1, 4, 6), 0, 6, None)

    def thumbnail(self, media: MediaInput) -> str:
        return f"data:image/jpeg;base64,{media.media_hash.hex()}"

    def opens_reasoning(self, request: GenerationRequest) -> bool:
        return bytes(request.prompt_token_ids[-7:].tolist()) == b"<think>"

    def thinking_limit(self, max_tokens: int) -> ThinkingLimit:
        return ThinkingLimit(max_tokens, bytes_of("</think>"), bytes_of("\n</think>\n\n"))

    def detokenizer(self) -> ByteDetokenizer:
        return ByteDetokenizer()


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    for i, part in enumerate(content):
        given = part.get("image_url", {})
        if part["type"] == "image_url" and "content" not in given and ";base64," not in given["url"]:
            raise InvalidRequest("not a base64 data URL", f"messages[?].content[{i}].image_url.url")
    return "".join(part["text"] if part["type"] == "text" else "#" for part in content)
