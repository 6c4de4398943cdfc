"""The actor that encodes: ViT and resampler, a cache of embeddings by content hash, and channels to prefill replicas.

A task claims its place at the prefill replica first; the answer names the pictures that are still wanted there (the
prefix cache may cover some). They are encoded in one thread, see `encoder_thread`, and embeddings follow at once. Further
pictures of the request may be another replica's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from ernie_cluster.actors import process
from ernie_cluster.actors.channels import Receivers, open_gpu, open_nixl, receive
from ernie_cluster.actors.direct import DirectServer
from ernie_cluster.actors.duty import Duty
from ernie_cluster.actors.encoder_thread import EncoderThread
from ernie_cluster.actors.messages import Batch, EncodeReport, EncodeTask, Load, Meeting, RankArgs, Ready
from ernie_cluster.actors.notice import Notice
from ernie_cluster.actors.parting import HEARD_S, Parting
from ernie_cluster.actors.telling import Teller
from ernie_cluster.config.pool import Role
from ernie_cluster.deltas import Delta
from ernie_cluster.errors import Aborted, ReplicaDraining, TransferFailed
from ernie_cluster.faults import FaultOrder, Faults, FaultState
from ernie_cluster.policy.scaling.observe import Work
from ernie_cluster.policy.snapshot import Rates
from ernie_cluster.request import MediaInput, Span
from ernie_cluster.transport.base import Channel, Message, PieceHeader, Reply
from ernie_cluster.transport.payload import fill

_IDLE_PAUSE_S = 0.02


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
        self._args, self._duty = args, Duty(args)
        self._faults = Faults.of(args.config.faults, args.role, args.actor_name)
        self._parting = Parting(self._duty, self._part, self._stay)
        self._is_parting = False
        self._running: set[str] = set()
        self._aborted: set[str] = set()
        self._claiming: dict[str, asyncio.Future[None]] = {}
        """Tasks whose prompt the prefill replica does not know yet, to be ended when they are given up."""
        self._waiting_tokens = 0

    async def load(self, meeting: Meeting | None) -> None:
        """Load the weights; a vision replica has one rank, so there is nobody to meet."""
        start, config = time.perf_counter(), self._args.config
        from ernie_cluster.actors.encoder import Encoder  # torch, which the conductor need not import
        from ernie_cluster.engine.niceness import give_way

        nixl = open_nixl(config.transport)  # before anything is loaded, for it may not be there
        self._encoder = Encoder.load(config, self._args.model, self._args.num_cpus)
        gpu = open_gpu(_NoSink(), self._encoder.device, config.transport)
        self._receivers = Receivers(_NoSink(), self._args.actor_name, config.transport, gpu, nixl, self._faults)
        self._channels = self._receivers.channels()
        teller = Teller(self._now, self._cached, config.router)
        calls = (self.encode, self.embed, self.abort, self.poll, teller.tell, self.become, self.drain)
        methods = {call.__name__: call for call in calls}
        self._server = DirectServer(methods if self._faults is None else self._faults.guard("replica", methods))
        self._piece_bytes = config.transport.piece_bytes
        self._timeout_s = config.router.lease_timeout_s
        self._begin(partial(give_way, self._encoder.device))
        process.started()
        self._load_s = time.perf_counter() - start

    def _begin(self, begin: Callable[[], None]) -> None:
        timeout_s = self._args.deployment.engine.step_timeout_s
        self._thread = EncoderThread(self._encoder, timeout_s, self._before_piece, begin)

    async def ready(self) -> Ready:
        """Answers once the weights are loaded."""
        self._notice = Notice(self._given_notice)
        address = await self._server.start(ray.util.get_node_ip_address())
        node_id = ray.get_runtime_context().get_node_id()
        return Ready(address, self._receivers.endpoint, node_id, os.getpid(), self._load_s)

    async def encode(self, task: EncodeTask) -> EncodeReport:
        """Encode what the prefill replica wants and send it there.

        Raises:
            TransferFailed: the prefill replica does not wait for this attempt.
            ReplicaLost: it is gone.
            ReplicaDraining: this replica parts with what it has.
            EngineFailed: the encoder hangs.
            Aborted: nobody waits for it any more.
        """
        with self._at_work(task.request_id, list(task.media.values())):
            return await self._encode(task)

    async def embed(self, request_id: str, media: MediaInput) -> NDArray[np.float32]:
        """One vector for a picture, see `Encoder.pooled`; nothing else of it leaves this replica.

        Raises:
            Aborted: nobody waits for it any more.
            EngineFailed: the encoder hangs, or as of `Encoder.pooled`.
            ReplicaDraining: as of `encode`.
        """
        with self._at_work(request_id, [media]):
            rows, _ = await self._thread.rows(request_id, media)
            return await self._thread.pool(rows)

    async def abort(self, request_ids: list[str]) -> None:
        """Stop before the next picture of these requests, or piece of a video."""
        for request_id in self._running.intersection(request_ids):
            self._aborted.add(request_id)
            claiming = self._claiming.get(request_id)
            if claiming is not None and not claiming.done():
                claiming.set_result(None)

    async def poll(self, client_id: str, acknowledged: int) -> Batch:
        """Nothing but a sign of life, while the encoder's thread may be busy: what is encoded goes out elsewhere."""
        await asyncio.sleep(self._args.config.router.sign_of_life_s)
        return Batch(acknowledged + 1, ())

    async def become(self, role: Role) -> None:
        """See `Duty.become`, which refuses."""
        self._duty.become(role)

    async def drain(self, is_draining: bool, within_s: float | None = None) -> None:
        """See `Parting.drain`."""
        self._parting.drain(is_draining, within_s)

    async def leave(self, within_s: float) -> None:
        """See `Parting.leave`."""
        self._parting.leave(within_s)

    async def faults(self, order: FaultOrder) -> list[FaultState]:
        """See `Faults.obey`."""
        return [] if self._faults is None else self._faults.obey(order)

    async def deliver(self, message: Message, refs: list[Any]) -> Message:
        """A message that came through the object store."""
        return await receive(self._receivers, message, refs)

    async def snapshot(self) -> Load:
        """Load now; raises EngineFailed when the encoder hangs, so that the replica is replaced."""
        return self._now()

    def _now(self) -> Load:
        self._thread.look_after()
        line, done = self._encoder.pace.line, self._encoder.done
        return Load(
            num_running=len(self._running),
            num_waiting=0,
            waiting_tokens=self._waiting_tokens,
            rates=Rates(picture_s=line.fixed_s, media_token_s=line.each_s) if line else Rates(),
            token_bytes=self._encoder.token_bytes,
            role=self._duty.role,
            is_draining=self._duty.is_draining,
            is_leaving=self._duty.is_leaving,
            within_s=self._duty.within_s,
            num_prompts=len(self._running),
            work=Work(num_prompts=int(done.n), prompt_tokens=int(done.x), reading=done),
        )

    def _cached(self, since: int | None) -> Delta:
        return self._encoder.log.since(since)

    async def check(self) -> bool:
        """There are no books to check here."""
        return True

    async def stop(self) -> None:
        await self._server.close()
        self._thread.close()
        await asyncio.to_thread(self._channels.close)
        await asyncio.to_thread(self._receivers.close)

    @contextmanager
    def _at_work(self, request_id: str, media: Sequence[MediaInput]) -> Iterator[None]:
        """Count what of a task is not cached as load, and let it be aborted, while it runs."""
        self._check_open(request_id)
        tokens = sum(m.num_tokens for m in media if self._encoder.known(m) is None)
        self._running.add(request_id)
        self._waiting_tokens += tokens
        try:
            yield
        finally:
            self._running.discard(request_id)
            self._waiting_tokens -= tokens
            self._aborted.discard(request_id)

    def _before_piece(self, request_id: str) -> None:
        """In the encoder's thread, where it may have waited."""
        if request_id in self._aborted:
            raise Aborted("given up before its turn came")
        self._check_open(request_id)
        if self._faults is not None:
            self._faults.meet("vision.step")

    def _part(self) -> None:
        self._is_parting = True

    def _stay(self) -> None:
        self._is_parting = False

    def _check_open(self, request_id: str) -> None:
        """Before each picture."""
        if self._is_parting:
            raise ReplicaDraining(f"request {request_id}: this replica is leaving; another one encodes its pictures")

    async def _given_notice(self) -> None:
        """This process is to end soon: no more than the picture that is being encoded."""
        self._parting.leave(HEARD_S)
        async with asyncio.timeout(self._args.config.router.notice_s):
            await asyncio.sleep(HEARD_S)
            while self._running:  # noqa: ASYNC110  the encoder says so
                await asyncio.sleep(_IDLE_PAUSE_S)

    async def _encode(self, task: EncodeTask) -> EncodeReport:
        channel = await asyncio.to_thread(self._channels.to, task.destination)
        claim: Message = {
            "type": "claim", "request_id": task.request_id, "epoch": task.epoch, "media": list(task.media)
        }  # fmt: skip
        answer = await self._unless_given_up(task.request_id, asyncio.wrap_future(channel.call(claim, self._timeout_s)))
        if "error" in answer:
            raise TransferFailed(str(answer["error"]))
        spans, piece = [], 0
        for index in map(int, answer["media"]):  # type: ignore[arg-type]
            if task.request_id in self._aborted:
                break
            self._check_open(task.request_id)
            media, start = task.media[index], time.time()
            if self._faults is not None:
                await self._faults.meet_async("vision.encode")
            try:
                embeds, is_hit = await self._thread.rows(task.request_id, media)
            except Aborted:
                break
            encoded = time.time()
            if self._faults is not None:
                await self._faults.meet_async("vision.send")
            piece = await self._send(channel, task, index, embeds, piece)
            detail = (("picture", index + 1), ("tokens", media.num_tokens), ("cached", int(is_hit)))
            spans.append(Span("encode", start, encoded - start, detail))
            spans.append(Span("embeddings", encoded, time.time() - encoded, (("bytes", embeds.nbytes),)))
        return EncodeReport(tuple(spans))

    async def _unless_given_up(self, request_id: str, claimed: asyncio.Future[Message]) -> Message:
        """A prompt that was given up before it was opened never answers the claim."""
        self._claiming[request_id] = given_up = asyncio.get_running_loop().create_future()
        try:
            if request_id not in self._aborted:
                await asyncio.wait({claimed, given_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._claiming[request_id]
        if not claimed.done():
            claimed.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody wants to know
            raise Aborted("given up before its prompt was there")
        return claimed.result()

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
