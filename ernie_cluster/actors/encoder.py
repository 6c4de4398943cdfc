"""ViT and resampler of one vision rank, with a cache by content. Imported inside the rank only: torch stands behind it."""

from __future__ import annotations

import sys
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ernie_cluster.actors import process
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.slices import EMBED_PIECE
from ernie_cluster.errors import EngineFailed
from ernie_cluster.model.build import build_vision, torch_dtype
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.vision import VisionEncoder
from ernie_cluster.model.weights import load_vision
from ernie_cluster.observe.progress import ByteProgress
from ernie_cluster.policy.sizing.memory import EMBEDDING_CACHE_BYTES
from ernie_cluster.request import MediaInput


class EmbeddingCache:
    """Embeddings by content hash, least recently used first out.

    Args:
        max_bytes: bound of all entries together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[bytes, NDArray[np.uint8]] = OrderedDict()

    def get(self, digest: bytes) -> NDArray[np.uint8] | None:
        if digest in self._entries:
            self._entries.move_to_end(digest)
        return self._entries.get(digest)

    def put(self, digest: bytes, embeds: NDArray[np.uint8]) -> None:
        if digest in self._entries or embeds.nbytes > self._max_bytes:
            return
        self._entries[digest] = embeds
        self.num_bytes += embeds.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.nbytes


class Encoder:
    """Pictures to embeddings; for one thread.

    Args:
        encoder: ViT and resampler with their weights.
        device: where they are.
    """

    piece_kind = EMBED_PIECE
    """What a prefill replica knows a piece of an embedding by."""

    def __init__(self, encoder: VisionEncoder, device: torch.device) -> None:
        self._encoder, self.device = encoder, device
        self._cache = EmbeddingCache(EMBEDDING_CACHE_BYTES)

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
        return cls(encoder, device)

    @torch.inference_mode()
    def embed(self, media: MediaInput) -> tuple[NDArray[np.uint8], bool]:
        """Embeddings as bytes, uint8 [tokens, bytes of a row], and whether they came from the cache."""
        known = self._cache.get(media.media_hash)
        if known is not None:
            return known, True
        assert media.patches is not None
        patches = torch.tensor(media.patches, device=self.device)
        embeds: torch.Tensor = self._encoder(patches, [media.grid_thw]).cpu()
        rows: NDArray[np.uint8] = embeds.view(torch.uint8).numpy()
        self._cache.put(media.media_hash, rows)
        return rows, False

    @torch.inference_mode()
    def pooled(self, media: MediaInput) -> NDArray[np.float32]:
        """One vector for a picture: the mean of its embeddings, float32 [width], of length 1.

        Raises:
            EngineFailed: it has no direction; the weights are broken.
        """
        rows, _ = self.embed(media)
        embeds = torch.from_numpy(rows).view(self._encoder.dtype)
        vector: NDArray[np.float32] = functional.normalize(embeds.float().mean(0), dim=0).numpy()
        if not abs(float(np.linalg.norm(vector)) - 1) < 1e-3:
            raise EngineFailed("the vision encoder makes no numbers of a picture; check the checkpoint")
        return vector
