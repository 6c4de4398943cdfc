"""Headers of a checkpoint against the model of its config.json: every tensor there, whole and of the right shape.

The same plan and the same checks as when it is loaded; only headers are read, and the model has no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.doctor.facts import Stored
from ernie_cluster.errors import CheckpointError, ConfigError
from ernie_cluster.model.build import build_decoder, torch_dtype
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.fill import Copy, check, quantised_weights, stored_copies
from ernie_cluster.model.weights import check_names, decoder_copies, vision_copies

MAX_FAULTS = 5
"""That are told of one checkpoint; more say nothing new."""


def inspect(model: str, folder: str | Path) -> Stored:
    """Look at all headers of a checkpoint; its faults are part of the answer.

    Args:
        model: served name.
        folder: of the checkpoint.
    """
    faults: list[str] = []
    names, files, num_bytes = frozenset[str](), set[Path](), 0
    try:
        config = ModelConfig.from_folder(folder)
        with Checkpoint(folder) as checkpoint:
            names = checkpoint.names
            faults += _faults(config, checkpoint)
            if not faults:
                files = {checkpoint.file_of(name) for name in names}
                num_bytes = sum(checkpoint.entry(name).num_bytes for name in names)
    except ConfigError as e:
        faults.append(str(e))
    return Stored(model, str(folder), len(names), len(files), num_bytes, tuple(faults))


def _faults(config: ModelConfig, checkpoint: Checkpoint) -> list[str]:
    found: dict[str, None] = {}  # in the order in which they are met
    for copy in _copies(config):
        try:
            check([copy], checkpoint)
        except CheckpointError as e:
            found[str(e)] = None
            if len(found) == MAX_FAULTS:
                break
    if not found:
        check_names(config, checkpoint)  # what is missing tells more than what is too much
    return list(found)


def _copies(config: ModelConfig) -> Iterator[Copy]:
    """Every tensor of the model, under the names and in the form that the checkpoint should have it."""
    copies = decoder_copies(config, has_vision_experts=config.is_multimodal)
    if config.quantization == "none":
        yield from copies
    else:
        dtype, meta = torch_dtype(config.dtype), torch.device("meta")
        yield from stored_copies(copies, quantised_weights(build_decoder(config, "mixed", dtype=dtype, device=meta)))
    if config.is_multimodal:
        yield from vision_copies(config)
