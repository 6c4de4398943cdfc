"""The actor that encodes: ViT and resampler, a cache of embeddings by content hash, and channels to prefill replicas.

A task claims its place at the prefill replica first; the answer names the pictures that are still wanted there (the
prefix cache may cover some). Pictures are encoded one at a time in one thread; embeddings follow at once.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from ernie_cluster.actors import process
from ernie_cluster.actors.channels import Channels, Receivers, receive
from ernie_cluster.actors.engine_rank import Ready
from ernie_cluster.actors.messages import EncodeReport, EncodeTask
from ernie_cluster.config.cluster import ClusterConfig, Role
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.handover import EMBED_PIECE
from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.model.build import build_vision, torch_dtype
from ernie_cluster.model.weights import Checkpoint, load_vision
from ernie_cluster.request import MediaInput, Span
from ernie_cluster.transport.base import Channel, Message, PieceHeader, Reply

_CACHE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class VisionSnapshot:
    """Load of one vision replica."""

    num_running: int
    waiting_tokens: int
    """Media tokens not yet encoded."""
    cached_bytes: int
    num_encoded: int
    num_cache_hits: int


class EmbeddingCache:
    """Embeddings by content hash, least recently used first out.

    Args:
        max_bytes: bound of all entries together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def get(self, digest: bytes) -> torch.Tensor | None:
        if digest in self._entries:
            self._entries.move_to_end(digest)
        return self._entries.get(digest)

    def put(self, digest: bytes, embeds: torch.Tensor) -> None:
        if digest in self._entries or embeds.nbytes > self._max_bytes:
            return
        self._entries[digest] = embeds
        self.num_bytes += embeds.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.nbytes


class _NoSink:
    """Nothing is sent to a vision replica."""

    def accept(self, header: PieceHeader, payload: NDArray[np.uint8]) -> None:
        raise TransferFailed("a vision replica takes no pieces")

    def handle(self, message: Message, reply: Reply) -> None:
        raise TransferFailed("a vision replica takes no messages")

    def disconnected(self, peer: str) -> None:
        """Nobody was connected."""


@ray.remote(num_cpus=0, max_restarts=0)
class VisionRank:
    """One vision replica; arguments as for `EngineRank`."""

    def __init__(self, config: ClusterConfig, model: str, role: Role, actor_name: str, num_cpus: float) -> None:
        start = time.perf_counter()
        deployment = config.model(model)
        process.set_threads(deployment.engine.num_threads or max(1, int(num_cpus)))
        self._device = process.choose_device(deployment.engine.device)
        shape = ModelConfig.from_folder(deployment.path)
        dtype = torch_dtype(shape.dtype if deployment.engine.dtype == "auto" else deployment.engine.dtype)
        self._encoder = build_vision(shape, dtype=dtype, device=self._device)
        checkpoint = Checkpoint(deployment.path)
        load_vision(self._encoder, shape, checkpoint)
        checkpoint.close()
        self._receivers = Receivers(_NoSink(), actor_name, config.transport)
        self._channels = Channels(self._receivers.endpoint)
        self._piece_bytes = config.transport.piece_bytes
        self._timeout_s = config.router.lease_timeout_s
        self._cache = EmbeddingCache(_CACHE_BYTES)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._running: set[str] = set()
        self._aborted: set[str] = set()
        self._waiting_tokens = self._num_encoded = self._num_hits = 0
        self._load_s = time.perf_counter() - start

    async def ready(self) -> Ready:
        """Answers once the weights are loaded."""
        node_id = ray.get_runtime_context().get_node_id()
        return Ready(self._receivers.endpoint, node_id, os.getpid(), self._load_s)

    async def encode(self, task: EncodeTask) -> EncodeReport:
        """Encode what the prefill replica wants and send it there.

        Raises:
            TransferFailed: the prefill replica does not wait for this attempt.
            ReplicaLost: it is gone.
        """
        tokens = sum(m.num_tokens for m in task.media)
        self._running.add(task.request_id)
        self._waiting_tokens += tokens
        try:
            return await self._encode(task)
        except ReplicaLost:
            await asyncio.to_thread(self._channels.drop, task.destination)
            raise
        finally:
            self._running.discard(task.request_id)
            self._waiting_tokens -= tokens
            self._aborted.discard(task.request_id)

    async def abort(self, request_ids: list[str]) -> None:
        """Stop before the next picture of these requests."""
        self._aborted.update(self._running.intersection(request_ids))

    async def deliver(self, message: Message, refs: list[Any]) -> Message:
        """A message that came through the object store."""
        return await receive(self._receivers, message, refs)

    async def snapshot(self) -> VisionSnapshot:
        return VisionSnapshot(
            len(self._running), self._waiting_tokens, self._cache.num_bytes, self._num_encoded, self._num_hits
        )

    async def check(self) -> bool:
        """There are no books to check here."""
        return True

    async def stop(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        await asyncio.to_thread(self._channels.close)
        await asyncio.to_thread(self._receivers.close)

    async def _encode(self, task: EncodeTask) -> EncodeReport:
        channel = await asyncio.to_thread(self._channels.to, task.destination)
        claim: Message = {"type": "claim", "request_id": task.request_id, "epoch": task.epoch}
        answer = await asyncio.wrap_future(channel.call(claim, self._timeout_s))
        if "error" in answer:
            raise TransferFailed(str(answer["error"]))
        loop, spans, piece = asyncio.get_running_loop(), [], 0
        for index in answer["media"]:  # type: ignore[union-attr]
            if task.request_id in self._aborted:
                break
            media = task.media[int(index)]  # type: ignore[arg-type]
            start, is_hit = time.time(), self._cache.get(media.media_hash) is not None
            embeds = await loop.run_in_executor(self._thread, self._embed, media)
            encoded = time.time()
            piece = await self._send(channel, task, int(index), embeds, piece)  # type: ignore[arg-type]
            detail = (("picture", int(index) + 1), ("tokens", media.num_tokens), ("cached", int(is_hit)))  # type: ignore[arg-type]
            spans.append(Span("encode", start, encoded - start, detail))
            spans.append(Span("embeddings", encoded, time.time() - encoded, (("bytes", embeds.nbytes),)))
        return EncodeReport(tuple(spans))

    @torch.inference_mode()
    def _embed(self, media: MediaInput) -> torch.Tensor:
        """Embeddings [tokens, hidden] on CPU, from the cache or from the encoder's thread."""
        known = self._cache.get(media.media_hash)
        if known is not None:
            self._num_hits += 1
            return known
        assert media.patches is not None
        patches = torch.tensor(media.patches, device=self._device)
        embeds: torch.Tensor = self._encoder(patches, [media.grid_thw]).cpu()
        self._cache.put(media.media_hash, embeds)
        self._num_encoded += 1
        return embeds

    async def _send(self, channel: Channel, task: EncodeTask, index: int, embeds: torch.Tensor, piece: int) -> int:
        """Push one picture's embeddings in pieces of whole rows; the number of the next piece."""
        rows = embeds.view(torch.uint8).numpy()
        each = max(1, self._piece_bytes // rows.shape[1])
        pushes = []
        for first in range(0, len(rows), each):
            part = rows[first : first + each].reshape(-1)
            header = PieceHeader(
                task.request_id,
                task.epoch,
                piece,
                part.nbytes,
                (EMBED_PIECE, index, first, part.nbytes // rows.shape[1]),
            )
            pushes.append(channel.push(header, lambda out, part=part: np.copyto(out, part)))  # type: ignore[misc]
            piece += 1
        await asyncio.gather(*map(asyncio.wrap_future, pushes))
        return piece
