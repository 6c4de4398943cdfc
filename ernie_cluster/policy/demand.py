"""From a request to what a decision must know of it: the same hashes by which engines and encoders find what they hold."""

from __future__ import annotations

from ernie_cluster.config.cluster import EngineConfig
from ernie_cluster.deltas import short_hash
from ernie_cluster.policy.snapshot import Demand, Picture
from ernie_cluster.request import GenerationRequest, MediaInput, block_hashes


def demand_of(request: GenerationRequest, engine: EngineConfig) -> Demand:
    """What a request needs from here on; of one that goes on elsewhere, the answer so far is prompt.

    Args:
        engine: of its model.
    """
    num_done = len(request.output_token_ids)
    num_tokens = request.num_prompt_tokens + num_done
    chain: list[bytes] = []
    if engine.enable_prefix_cache:
        chain = block_hashes(request.prompt_token_ids, request.media, engine.block_size, request.cache_salt)
    return Demand(
        model=request.model,
        num_prompt_tokens=num_tokens,
        max_tokens=max(1, request.sampling.max_tokens - num_done),
        num_media=len(request.media),
        media_tokens=sum(m.num_tokens for m in request.media),
        chain=tuple(map(short_hash, chain[: (num_tokens - 1) // engine.block_size])),
        pictures=tuple(Picture(short_hash(m.media_hash), m.end, m.num_tokens) for m in request.media),
        priority=request.priority,
        tenant=request.tenant,
        timeout_s=request.timeout_s,
    )


def demand_of_picture(model: str, media: MediaInput) -> Demand:
    """What a picture needs of which nothing but a vector is wanted; its place in a prompt does not matter."""
    picture = Picture(short_hash(media.media_hash), media.num_tokens, media.num_tokens)
    return Demand(model, media.num_tokens, 1, 1, media.num_tokens, pictures=(picture,))
