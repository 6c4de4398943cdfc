"""ViT and resampler of one vision rank, with a cache by content. Imported inside the rank only: torch stands behind it."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ernie_cluster.actors import process
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.emulate import EmulateConfig
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.deltas import DeltaLog, short_hash
from ernie_cluster.engine.emulate import Patience
from ernie_cluster.engine.pace import Pace
from ernie_cluster.engine.slices import EMBED_PIECE
from ernie_cluster.errors import EngineFailed
from ernie_cluster.model.build import build_vision, torch_dtype
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.vision import VisionEncoder
from ernie_cluster.model.weights import load_vision
from ernie_cluster.observe.progress import ByteProgress
from ernie_cluster.policy.sizing.memory import EMBEDDING_CACHE_BYTES
from ernie_cluster.request import MediaInput
from ernie_cluster.sums import Sums

PIECE_PATCHES = 8192
"""Most patches of a video that are encoded in one go, two frames at least; a small picture then waits for no more than that.
A picture is always one: in the ViT all of it attends to all of it."""


class EmbeddingCache:
    """Embeddings by content hash, least recently used first out; for any thread.

    Args:
        max_bytes: bound of all entries together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.num_bytes = max_bytes, 0
        self.log = DeltaLog()
        """Which pictures are here."""
        self._entries: OrderedDict[bytes, NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> NDArray[np.uint8] | None:
        with self._lock:
            if digest in self._entries:
                self._entries.move_to_end(digest)
            return self._entries.get(digest)

    def put(self, digest: bytes, embeds: NDArray[np.uint8]) -> None:
        with self._lock:
            if digest in self._entries or embeds.nbytes > self._max_bytes:
                return
            self._entries[digest] = embeds
            self.num_bytes += embeds.nbytes
            self.log.add(short_hash(digest))
            while self.num_bytes > self._max_bytes:
                gone, oldest = self._entries.popitem(last=False)
                self.num_bytes -= oldest.nbytes
                self.log.remove(short_hash(gone))


class Encoder:
    """Pictures to embeddings; for one thread, but for `known`.

    Args:
        encoder: ViT and resampler with their weights.
        device: where they are.
    """

    piece_kind = EMBED_PIECE
    """What a prefill replica knows a piece of an embedding by."""

    def __init__(self, encoder: VisionEncoder, device: torch.device) -> None:
        self._encoder, self.device = encoder, device
        self._cache = EmbeddingCache(EMBEDDING_CACHE_BYTES)
        self.log = self._cache.log
        self.pace = Pace()
        """Pictures that were encoded, by their tokens."""
        self.done = Sums()
        """(tokens, seconds) of every one of them."""
        self.token_bytes = 0
        """A row of embeddings; 0 before the first picture."""

    @classmethod
    def load(cls, config: ClusterConfig, model: str, num_cpus: float) -> Encoder:
        """Arguments as of `VisionRank`.

        Raises:
            ConfigError: a GPU is wanted and there is none; CheckpointError: the checkpoint cannot be used.
        """
        deployment = config.model(model)
        process.set_threads(deployment.engine.threads(num_cpus))
        device = process.choose_device(deployment.engine.device)
        shape = ModelConfig.from_folder(deployment.path)
        dtype = torch_dtype(deployment.engine.dtype_of(shape.dtype))
        encoder = build_vision(shape, dtype=dtype, device=device)
        with Checkpoint(deployment.path) as checkpoint:
            load_vision(encoder, shape, checkpoint, progress=ByteProgress(f"{model}, vision: weights", sys.stderr))
        emulate = deployment.engine.emulate
        return cls(encoder, device) if emulate is None else EmulatedEncoder(encoder, device, emulate)

    def known(self, media: MediaInput) -> NDArray[np.uint8] | None:
        """What `embed` would find in the cache; from any thread."""
        return self._cache.get(media.media_hash)

    def embed(self, media: MediaInput) -> tuple[NDArray[np.uint8], bool]:
        """Embeddings as bytes, uint8 [tokens, bytes of a row], and whether they came from the cache."""
        known = self.known(media)
        return (
            (known, True)
            if known is not None
            else (next(rows for rows in self.steps(media) if rows is not None), False)
        )

    def steps(self, media: MediaInput) -> Iterator[NDArray[np.uint8] | None]:
        """Encode what is not in the cache, piece by piece: None as often as another one is to come, at last what `embed` gives.

        A video is cut between pairs of frames, see `runs_of`, where nothing of it attends or is joined: the pieces are the
        whole. The cuts depend on nothing else, so that the same video has the same embeddings at all times.
        """
        parts, encode_s = list[torch.Tensor](), 0.0
        runs = runs_of(media.grid_thw, PIECE_PATCHES)
        for frames in runs:
            start = time.perf_counter()
            with torch.inference_mode():
                parts.append(self._run(media, frames))
            encode_s += time.perf_counter() - start
            if len(parts) < len(runs):
                yield None
        rows: NDArray[np.uint8] = torch.cat(parts).view(torch.uint8).numpy()
        self.pace.note(media.num_tokens, encode_s)
        self.done += Sums.of((media.num_tokens, encode_s))
        self.token_bytes = rows.shape[1]
        self._cache.put(media.media_hash, rows)
        yield rows

    def pooled(self, media: MediaInput) -> NDArray[np.float32]:
        """One vector for a picture, see `pool`."""
        return self.pool(self.embed(media)[0])

    def pool(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The mean of a picture's embeddings, float32 [width], of length 1.

        Raises:
            EngineFailed: it has no direction; the weights are broken.
        """
        embeds = torch.from_numpy(rows).view(self._encoder.dtype)
        vector: NDArray[np.float32] = functional.normalize(embeds.float().mean(0), dim=0).numpy()
        if not abs(float(np.linalg.norm(vector)) - 1) < 1e-3:
            raise EngineFailed("the vision encoder makes no numbers of a picture; check the checkpoint")
        return vector

    def _run(self, media: MediaInput, frames: range) -> torch.Tensor:
        """Embeddings of some frames, [tokens, width] in host memory."""
        assert media.patches is not None
        _, height, width = media.grid_thw
        first, end = (frame * height * width for frame in (frames.start, frames.stop))
        patches = torch.tensor(media.patches[first:end], device=self.device)
        embeds: torch.Tensor = self._encoder(patches, [(len(frames), height, width)]).cpu()
        return embeds


def runs_of(grid: tuple[int, int, int], most_patches: int) -> list[range]:
    """Frames of a picture or video that are encoded together: whole pairs, at least one, of `most_patches` if they fit.

    Six frames of 4 x 4 patches and at most 70 give [0, 4) and [4, 6).
    """
    num_frames, height, width = grid
    each = 2 * max(1, most_patches // (2 * height * width))
    return [range(first, min(first + each, num_frames)) for first in range(0, num_frames, each)]


class EmulatedEncoder(Encoder):
    """An `Encoder` that takes as long as on imagined hardware.

    Args:
        encoder, device: as of `Encoder`.
        emulate: how long that is.
        patience: waits for the rest.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        device: torch.device,
        emulate: EmulateConfig,
        patience: Patience | None = None,
    ) -> None:
        super().__init__(encoder, device)
        self._emulate, self._patience = emulate, patience or Patience()

    def _run(self, media: MediaInput, frames: range) -> torch.Tensor:
        start_s, share = self._patience.clock(), len(frames) / media.grid_thw[0]
        embeds = super()._run(media, frames)
        self._patience.until(start_s, share * self._emulate.of_picture(media.num_tokens))
        return embeds
