"""A step's numbers in one piece of memory."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.model.packing import make_step, open_step, packed_bytes
from ernie_cluster.model.step import StepInput, StepMemory, StepShape


def a_step(num_tokens: int, num_sequences: int, width: int, num_media: int, seed: int) -> StepInput:
    rng = np.random.default_rng(seed)
    return make_step(
        token_ids=rng.integers(0, 1000, num_tokens),
        positions=rng.integers(0, 1000, (3, num_tokens)),
        slots=rng.integers(0, 1000, num_tokens),
        is_vision=rng.integers(0, 2, num_tokens),
        block_tables=rng.integers(0, 1000, (num_sequences, width)),
        query_lens=rng.integers(0, 1000, num_sequences).tolist(),
        context_lens=rng.integers(0, 1000, num_sequences).tolist(),
        num_decode=num_sequences,
        logits_rows=range(num_sequences),
        media_rows=rng.integers(0, 1000, num_media).tolist(),
        device=torch.device("cpu"),
    )


TENSORS = [name for name, kind in StepInput.__annotations__.items() if kind == "Tensor"]


@given(st.integers(0, 9), st.integers(0, 4), st.integers(0, 5), st.integers(0, 3), st.integers(0, 99))
def test_fields_come_back_as_they_went_in(tokens: int, sequences: int, width: int, media: int, seed: int) -> None:
    rng, step = np.random.default_rng(seed), a_step(tokens, sequences, width, media, seed)
    assert step.token_ids_T.tolist() == rng.integers(0, 1000, tokens).tolist()
    assert step.positions_3T.tolist() == rng.integers(0, 1000, (3, tokens)).tolist()
    assert step.query_starts.diff().tolist() == list(step.query_lens)
    assert step.key_starts.diff().tolist() == step.seq_lens_B.tolist() == list(step.context_lens)
    assert step.memory.shape == StepShape(tokens, sequences, width, sequences, sequences, media)
    assert step.memory.host.nbytes == packed_bytes(step.memory.shape)


@given(st.integers(0, 9), st.integers(0, 4), st.integers(0, 5), st.integers(0, 99))
def test_a_step_copied_over_another_of_its_shape_takes_its_place(
    tokens: int, sequences: int, width: int, seed: int
) -> None:
    old, new = a_step(tokens, sequences, width, 0, seed), a_step(tokens, sequences, width, 0, seed + 1)
    there = open_step(StepMemory(old.memory.shape, old.memory.host, old.memory.device.clone()))
    there.memory.device.copy_(new.memory.device)
    for name in TENSORS:
        assert torch.equal(getattr(there, name), getattr(new, name)), name
        assert getattr(there, name).data_ptr() % getattr(there, name).element_size() == 0, name


def test_all_tensors_are_one_copy() -> None:
    step = a_step(5, 2, 3, 1, 0)
    for name in TENSORS:
        assert getattr(step, name).untyped_storage().data_ptr() == step.memory.device.data_ptr(), name
