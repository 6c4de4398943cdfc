"""Router and engines must mean the same by a block: what one holds, the other asks for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.deltas import short_hash
from ernie_cluster.policy.demand import demand_of, demand_of_picture
from ernie_cluster.policy.snapshot import Picture
from ernie_cluster.request import GenerationRequest, MediaInput, SamplingParams

ENGINE = EngineConfig(block_size=4)


def picture(name: int, offset: int) -> MediaInput:
    return MediaInput("image", bytes([name]) * 32, (1, 2, 6), offset, 3, None)


def request(num_tokens: int, *media: MediaInput) -> GenerationRequest:
    ids = np.arange(num_tokens, dtype=np.int32)
    return GenerationRequest("r", "m", ids, np.tile(ids, (3, 1)), SamplingParams(max_tokens=9), media)


def test_a_demand_counts_what_a_request_holds() -> None:
    demand = demand_of(request(14, picture(1, 2), picture(2, 7)), ENGINE)
    assert (demand.num_prompt_tokens, demand.max_tokens, demand.num_media, demand.media_tokens) == (14, 9, 2, 6)
    assert demand.pictures == (
        Picture(short_hash(bytes([1]) * 8), 5, 3),
        Picture(short_hash(bytes([2]) * 8), 10, 3),
    )
    assert len(demand.chain) == 3


def test_the_last_token_is_always_computed() -> None:
    assert [len(demand_of(request(n), ENGINE).chain) for n in (1, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


def test_without_a_prefix_cache_there_is_nothing_to_look_for() -> None:
    assert demand_of(request(14), replace(ENGINE, enable_prefix_cache=False)).chain == ()


def test_other_pictures_make_other_blocks_from_there_on() -> None:
    one, other = (demand_of(request(14, picture(name, 5)), ENGINE).chain for name in (1, 2))
    assert one[:1] == other[:1]
    assert not set(one[1:]) & set(other[1:])


def test_a_continued_answer_is_prompt() -> None:
    continued = replace(request(14), output_token_ids=(1, 2, 3))
    demand = demand_of(continued, ENGINE)
    assert (demand.num_prompt_tokens, demand.max_tokens) == (17, 6)
    whole = replace(request(17), prompt_token_ids=np.array([*range(14), 1, 2, 3], np.int32))
    assert demand.chain == demand_of(whole, ENGINE).chain
    assert len(demand.chain) == 4


def test_a_picture_alone_is_found_by_its_content() -> None:
    demand = demand_of_picture("m", picture(1, 5))
    assert demand.pictures == (Picture(short_hash(bytes([1]) * 8), 3, 3),)
    assert (demand.num_media, demand.media_tokens) == (1, 3)
