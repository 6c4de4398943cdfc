"""From a configuration to the loaded `Worker` of one engine rank. Imported inside the rank only: torch stands behind it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ernie_cluster.actors import process
from ernie_cluster.actors.messages import Outcome
from ernie_cluster.config.cluster import ClusterConfig, Role
from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.errors import ConfigError
from ernie_cluster.grammar.compile import Compiler, Vocabulary
from ernie_cluster.inputs.tokenizer import Tokenizer, end_token_ids
from ernie_cluster.observe.progress import ByteProgress


def load_worker(
    config: ClusterConfig, model: str, role: Role, num_cpus: float, emit: Callable[[list[Outcome]], None]
) -> Worker:
    """Weights and KV cache in place, nothing running yet.

    Args:
        config, model, role, num_cpus: as of the rank, see `EngineRank`.
        emit: takes the outcomes.

    Raises:
        ConfigError: the KV cache holds no two blocks, or a GPU is wanted and there is none.
        CheckpointError: the checkpoint cannot be used.
    """
    deployment = config.model(model)
    settings = deployment.engine
    process.set_threads(settings.threads(num_cpus))
    device = process.choose_device(settings.device)
    shape = ModelConfig.from_folder(deployment.path)
    dtype = settings.dtype_of(shape.dtype)
    layout = KVLayout.from_model(shape, settings.block_size, dtype)
    num_blocks = settings.kv_cache_bytes // layout.block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"kv_cache_bytes = {settings.kv_cache_bytes} holds {num_blocks} blocks of {layout.block_bytes} bytes; "
            f"give at least {2 * layout.block_bytes}"
        )
    runner = Runner.load(
        deployment.path,
        shape,
        role,
        dtype=dtype,
        device=device,
        num_blocks=num_blocks,
        block_size=settings.block_size,
        progress=ByteProgress(f"{model}, {role}: weights", sys.stderr),
    )
    return Worker(
        runner,
        shape,
        WorkerSettings(
            block_size=settings.block_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_num_seqs=settings.max_num_seqs,
            enable_prefix_cache=settings.enable_prefix_cache,
            reserve_output_tokens=config.router.reserve_output_tokens,
            lease_timeout_s=config.router.lease_timeout_s,
            piece_bytes=config.transport.piece_bytes,
            can_encode=role != "decode",
        ),
        emit,
        lambda: Compiler(load_vocabulary(deployment.path, shape.text.vocab_size)),
    )


def load_vocabulary(folder: str, size: int) -> Vocabulary:
    """What the model of a checkpoint folder can say, `size` token ids wide; raises CheckpointError."""
    tokenizer = Tokenizer.from_folder(folder)
    return Vocabulary(tokenizer.text_bytes(size), end_token_ids(folder, tokenizer))
