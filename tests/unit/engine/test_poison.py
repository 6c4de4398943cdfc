"""Freed blocks that read as NaN: unseen by whoever keeps to the rules, seen by all who do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie_cluster.engine.block_pool import BlockPool
from ernie_cluster.engine.poison import Poison
from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import EngineFailed
from ernie_cluster.model.kv_pages import PAGES, PLAIN_PAGES
from tests.tiny import Outcomes, make_request, make_worker
from tests.unit.engine.test_laws import answers, requests

HEAD_DIM = 8


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", *PAGES])
def test_poison_is_no_number_in_any_type_of_kv_and_clean_is_zero(kind: str) -> None:
    pages, dtype = PAGES.get(kind, PLAIN_PAGES), torch.float32 if kind in PAGES else getattr(torch, kind)
    row, stored = pages.row(HEAD_DIM, dtype)
    kv = torch.zeros(2, 2, 5, 4, 1, row, dtype=stored)
    poison = Poison(kv)
    poison.poison([1, 3, 4])
    poison.clean([3])
    for layer in kv:
        for page in layer:
            read = pages.read(page, torch.arange(5), dtype)
            assert read.isnan().flatten(1).all(1).tolist() == [False, True, False, False, True]
            assert not read[[0, 2, 3]].any()


def test_content_that_can_be_found_is_kept_and_all_else_is_erased() -> None:
    kv = torch.ones(1, 2, 5, 4, 1, 1)
    pool = BlockPool(5, 4, eraser=Poison(kv))
    first, second = pool.allocate(2)
    kv[:, :, [first, second]] = 7
    pool.publish(first, b"first")
    pool.free([first, second])
    assert kv[:, :, first].eq(7).all()
    assert kv[:, :, second].isnan().all()
    assert not kv[:, :, pool.allocate(4)].any(), "what is handed out holds nothing"


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_answers_are_the_same_with_poison(kv_dtype: str) -> None:
    """Also where sequences are preempted for lack of blocks, and others take theirs."""
    some = [r for r in requests() if not r.media]
    few = {"kv_dtype": kv_dtype, "num_blocks": 24, "enable_prefix_cache": False, "max_batch_tokens": 16}
    expected = answers(*make_worker(**few), some)  # type: ignore[arg-type]
    assert answers(*poisoned(**few), some) == expected


def poisoned(**settings: object) -> tuple[Worker, Outcomes]:
    """As an actor makes it."""
    worker, outcomes = make_worker(poison_freed_blocks=True, **settings)  # type: ignore[arg-type]
    worker.engine.runner = dataclasses.replace(worker.engine.runner, rejects_nan=True)
    return worker, outcomes


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_sequence_that_reads_what_it_has_freed_stops_the_engine(kv_dtype: str) -> None:
    worker, _ = poisoned(kv_dtype=kv_dtype, enable_prefix_cache=False)
    worker.open_prefill(make_request(range(10, 30), "a"), 0, None)
    worker.engine.step()
    worker.pool.free(worker.engine.sequences["a"].blocks[1:2])
    with pytest.raises(EngineFailed, match="KV of a block that nobody held"):
        worker.engine.step()
