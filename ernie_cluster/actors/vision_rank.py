"""The actor that encodes: ViT and resampler, a cache of embeddings by content hash, and channels to prefill replicas.

A task claims its place at the prefill replica first; the answer names the pictures that are still wanted there (the
prefix cache may cover some). Pictures are encoded one at a time in one thread; embeddings follow at once.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from ernie_cluster.actors import process
from ernie_cluster.actors.channels import Receivers, open_gpu, open_nixl, receive
from ernie_cluster.actors.direct import DirectServer
from ernie_cluster.actors.messages import EncodeReport, EncodeTask, Load, Meeting, RankArgs, Ready
from ernie_cluster.actors.telling import Teller
from ernie_cluster.deltas import Delta
from ernie_cluster.errors import Aborted, TransferFailed
from ernie_cluster.policy.snapshot import Rates
from ernie_cluster.request import MediaInput, Span
from ernie_cluster.transport.base import Channel, Message, PieceHeader, Reply
from ernie_cluster.transport.payload import fill


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
    """One vision replica."""

    def __init__(self, args: RankArgs) -> None:
        process.share_interpreter()
        process.log_lines()
        self._args = args

    async def load(self, meeting: Meeting | None) -> None:
        """Load the weights; a vision replica has one rank, so there is nobody to meet."""
        start, config = time.perf_counter(), self._args.config
        from ernie_cluster.actors.encoder import Encoder  # torch, which the conductor need not import

        nixl = open_nixl(config.transport)  # before anything is loaded, for it may not be there
        self._encoder = Encoder.load(config, self._args.model, self._args.num_cpus)
        gpu = open_gpu(_NoSink(), self._encoder.device, config.transport)
        self._receivers = Receivers(_NoSink(), self._args.actor_name, config.transport, gpu, nixl)
        self._channels = self._receivers.channels()
        teller = Teller(self._now, self._cached, config.router)
        calls = (self.encode, self.embed, self.abort, teller.tell)
        self._server = DirectServer({call.__name__: call for call in calls})
        self._piece_bytes = config.transport.piece_bytes
        self._timeout_s = config.router.lease_timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._running: set[str] = set()
        self._aborted: set[str] = set()
        self._waiting_tokens = 0
        self._load_s = time.perf_counter() - start

    async def ready(self) -> Ready:
        """Answers once the weights are loaded."""
        address = await self._server.start(ray.util.get_node_ip_address())
        node_id = ray.get_runtime_context().get_node_id()
        return Ready(address, self._receivers.endpoint, node_id, os.getpid(), self._load_s)

    async def encode(self, task: EncodeTask) -> EncodeReport:
        """Encode what the prefill replica wants and send it there.

        Raises:
            TransferFailed: the prefill replica does not wait for this attempt.
            ReplicaLost: it is gone.
        """
        with self._at_work(task.request_id, task.media):
            return await self._encode(task)

    async def embed(self, request_id: str, media: MediaInput) -> NDArray[np.float32]:
        """One vector for a picture, see `Encoder.pooled`; nothing else of it leaves this replica.

        Raises:
            Aborted: nobody waits for it any more.
            EngineFailed: as of `Encoder.pooled`.
        """
        with self._at_work(request_id, [media]):
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._pooled, request_id, media)

    async def abort(self, request_ids: list[str]) -> None:
        """Stop before the next picture of these requests."""
        self._aborted.update(self._running.intersection(request_ids))

    async def deliver(self, message: Message, refs: list[Any]) -> Message:
        """A message that came through the object store."""
        return await receive(self._receivers, message, refs)

    async def snapshot(self) -> Load:
        return self._now()

    def _now(self) -> Load:
        line = self._encoder.pace.line
        return Load(
            num_running=len(self._running),
            num_waiting=0,
            waiting_tokens=self._waiting_tokens,
            rates=Rates(picture_s=line.fixed_s, media_token_s=line.each_s) if line else Rates(),
            token_bytes=self._encoder.token_bytes,
        )

    def _cached(self, since: int | None) -> Delta:
        return self._encoder.log.since(since)

    async def check(self) -> bool:
        """There are no books to check here."""
        return True

    async def stop(self) -> None:
        await self._server.close()
        self._thread.shutdown(wait=True, cancel_futures=True)
        await asyncio.to_thread(self._channels.close)
        await asyncio.to_thread(self._receivers.close)

    @contextmanager
    def _at_work(self, request_id: str, media: Sequence[MediaInput]) -> Iterator[None]:
        """Count a task as load, and let it be aborted, while it runs."""
        tokens = sum(m.num_tokens for m in media)
        self._running.add(request_id)
        self._waiting_tokens += tokens
        try:
            yield
        finally:
            self._running.discard(request_id)
            self._waiting_tokens -= tokens
            self._aborted.discard(request_id)

    def _pooled(self, request_id: str, media: MediaInput) -> NDArray[np.float32]:
        """In the encoder's thread, where it may have waited."""
        if request_id in self._aborted:
            raise Aborted("given up before its turn came")
        return self._encoder.pooled(media)

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
            start = time.time()
            embeds, is_hit = await loop.run_in_executor(self._thread, self._encoder.embed, media)
            encoded = time.time()
            piece = await self._send(channel, task, int(index), embeds, piece)  # type: ignore[arg-type]
            detail = (("picture", int(index) + 1), ("tokens", media.num_tokens), ("cached", int(is_hit)))  # type: ignore[arg-type]
            spans.append(Span("encode", start, encoded - start, detail))
            spans.append(Span("embeddings", encoded, time.time() - encoded, (("bytes", embeds.nbytes),)))
        return EncodeReport(tuple(spans))

    async def _send(self, channel: Channel, task: EncodeTask, index: int, rows: NDArray[np.uint8], piece: int) -> int:
        """Push one picture's embeddings in pieces of whole rows; the number of the next piece."""
        each = max(1, self._piece_bytes // rows.shape[1])
        pushes = []
        for first in range(0, len(rows), each):
            part = rows[first : first + each].reshape(-1)
            header = PieceHeader(
                task.request_id,
                task.epoch,
                piece,
                part.nbytes,
                (self._encoder.piece_kind, index, first, part.nbytes // rows.shape[1]),
            )
            pushes.append(channel.push(header, lambda out, part=part: fill(out, part)))  # type: ignore[misc]
            piece += 1
        await asyncio.gather(*map(asyncio.wrap_future, pushes))
        return piece
