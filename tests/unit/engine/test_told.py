"""What a worker tells of its cache and its pace is what a decision asks for."""

from __future__ import annotations

from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.policy.demand import demand_of
from tests.tiny import make_image, make_request, make_worker
from tests.unit.engine.toy import embed, toy_worker

BLOCK_SIZE = 4
ENGINE = EngineConfig(block_size=BLOCK_SIZE)


def test_a_prompt_is_found_where_it_was_read() -> None:
    worker, _ = toy_worker(30, BLOCK_SIZE)
    picture = make_image(1)
    request = make_request([*range(10, 19), picture, *range(20, 30)], max_tokens=2)
    demand = demand_of(request, ENGINE)
    assert worker.cached(None).added_items == []
    worker.open_prefill(request, 0, None)
    worker.engine.sequences[request.request_id].embeds[0] = embed(request.media[0])
    while worker.engine.step():
        pass
    told = worker.cached(None)
    assert len(demand.chain) > 3
    assert set(demand.chain) <= set(told.added_items)
    assert worker.cached(told.version).is_empty


def test_a_worker_measures_prompts_and_answers_apart() -> None:
    worker, _ = toy_worker(30, BLOCK_SIZE)
    assert (worker.snapshot().reading, worker.snapshot().writing) == (None, None)
    worker.open_prefill(make_request(range(10, 19), max_tokens=1), 0, None)
    while worker.engine.step():
        pass
    assert worker.snapshot().reading is not None
    assert worker.snapshot().writing is None
    worker.open_prefill(make_request(range(10, 19), max_tokens=3), 0, None)
    while worker.engine.step():
        pass
    assert worker.snapshot().writing is not None


def test_warming_up_gives_a_first_pace() -> None:
    worker, _ = make_worker()
    worker.warm_up()
    now = worker.snapshot()
    assert now.reading is not None
    assert now.writing is not None
    assert now.free_blocks == now.total_blocks
    assert now.prompt_tokens == 0, "nobody asked for it"
