"""Steps that an engine runs before anybody waits for it."""

from __future__ import annotations

import logging
import time

import numpy as np

from ernie_cluster.engine.engine import Engine
from ernie_cluster.engine.sampler import SamplerRow
from ernie_cluster.engine.scheduler import Schedule
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.request import GenerationRequest, SamplingParams

log = logging.getLogger(__name__)


def warm_up(engine: Engine, max_batch_tokens: int, max_num_seqs: int) -> None:
    """Run a prompt and decode steps: compiles kernels, touches memory, records graphs.

    Args:
        engine: idle; nothing steps it meanwhile.
        max_batch_tokens, max_num_seqs: of its steps.
    """
    prompt = np.zeros(min(32, max_batch_tokens), dtype=np.int32)
    request = GenerationRequest(
        "warm-up",
        "",
        prompt,
        np.tile(np.arange(len(prompt), dtype=np.int32), (3, 1)),
        SamplingParams(temperature=0),
    )
    sequence = Sequence(request, [], blocks=engine.pool.allocate(1))
    sequence.blocks *= engine.pool.num_blocks_for(len(prompt) + 1)  # nobody reads what it writes
    buckets = engine.runner.buckets
    sizes = (1,) if buckets is None else buckets.sizes[::-1]  # the largest first: the others fit into its memory
    schedules = [Schedule(chunks=[(sequence, len(prompt))]), *(Schedule(decodes=[sequence] * n) for n in sizes)]
    row = SamplerRow(request.sampling, 0, (), (), ())
    for i, schedule in enumerate(schedules):
        rows = [row] * max(1, len(schedule.decodes))
        engine.runner.run(engine.builder.build(schedule), rows)
        sequence.tokens, sequence.num_computed = [0] * (len(prompt) + 1), len(prompt)
        if i and buckets is not None:
            log.info("recorded decode steps of %d: %d of %d CUDA graphs", len(schedule.decodes), i, len(sizes))
    _try_pace(engine, sequence, row, len(prompt), max_num_seqs)
    engine.pool.free(sequence.blocks[:1])


def _try_pace(engine: Engine, sequence: Sequence, row: SamplerRow, num_tokens: int, max_num_seqs: int) -> None:
    """Time some warm steps: until there are real ones, the router's forecasts rest on them."""
    parts = [Schedule(chunks=[(sequence, n)]) for n in (max(1, num_tokens // 4), num_tokens)]
    for schedule in [*parts, *(Schedule(decodes=[sequence] * n) for n in (1, min(4, max_num_seqs)))]:
        sequence.num_computed = 0 if schedule.chunks else num_tokens
        sequence.tokens = [0] * (schedule.num_tokens if schedule.chunks else num_tokens + 1)
        step_input, rows = engine.builder.build(schedule), [row] * max(1, len(schedule.decodes))
        start = time.perf_counter()
        engine.runner.run(step_input, rows)
        pace = engine.reading if schedule.chunks else engine.writing
        pace.note(schedule.num_tokens, time.perf_counter() - start)
