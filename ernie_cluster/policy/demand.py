"""From a request to what a decision must know of it: the same hashes by which engines and encoders find what they hold."""

from __future__ import annotations

from collections.abc import Sequence

from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.deltas import short_hash
from ernie_cluster.policy.snapshot import Demand, Picture
from ernie_cluster.request import GenerationRequest, MediaInput


def demand_of(request: GenerationRequest, engine: EngineConfig) -> Demand:
    """What a request needs from here on; of one that goes on elsewhere, the answer so far is prompt.

    Args:
        engine: of its model.
    """
    num_done = len(request.output_token_ids)
    num_tokens = request.num_prompt_tokens + num_done
    chain = request.block_hashes(engine.block_size) if engine.enable_prefix_cache else []
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
    return demand_of_pictures(model, (media,))


def demand_of_pictures(model: str, media: Sequence[MediaInput]) -> Demand:
    """What pictures need that are to be encoded, and nothing else; at least one."""
    pictures, end = list[Picture](), 0
    for each in media:
        end += each.num_tokens
        pictures.append(Picture(short_hash(each.media_hash), end, each.num_tokens))
    return Demand(model, end, 1, len(media), end, pictures=tuple(pictures))
