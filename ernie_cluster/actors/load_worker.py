"""From a configuration to the loaded `Worker` of one engine rank. Imported inside the rank only: torch stands behind it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from ernie_cluster.actors import process
from ernie_cluster.actors.messages import Outcome, RankArgs
from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.balance import Rule
from ernie_cluster.engine.emulate import EmulatedRunner
from ernie_cluster.engine.follower import Follower
from ernie_cluster.engine.host_tier import HostMemory
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.slices import SliceOf
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.errors import ConfigError
from ernie_cluster.grammar.compile import Compiler, Vocabulary
from ernie_cluster.inputs.tokenizer import Tokenizer, end_token_ids
from ernie_cluster.model.group import ALONE, Place, join
from ernie_cluster.observe.progress import ByteProgress
from ernie_cluster.policy.experts import rebalance
from ernie_cluster.transport.base import Channel
from ernie_cluster.transport.choose import Endpoint

_COLLECTIVE_TIMEOUT_S = 120.0
"""A rank that lets its peers wait for longer is taken for dead; a first step may compile for many seconds."""


def join_gang(args: RankArgs, meeting: Any) -> Place:
    """This rank's place, once all ranks of its gang are there; ALONE without a meeting.

    Args:
        meeting: what `open_store` made, on rank 0; where it is, on the others.
    """
    if meeting is None:
        return ALONE
    return join(meeting, args.shard, process.choose_device(_settings(args).device), _COLLECTIVE_TIMEOUT_S)


def load_runner(args: RankArgs, place: Place) -> Runner:
    """Weights and KV cache of a rank in place.

    Raises:
        ConfigError: the KV cache holds no two blocks, or a GPU is wanted and there is none.
        CheckpointError: the checkpoint cannot be used.
        GangBroken: another rank is gone.
    """
    settings, folder = _settings(args), args.config.model(args.model).path
    process.set_threads(settings.threads(args.num_cpus))
    shape = ModelConfig.from_folder(folder)
    dtype = settings.dtype_of(shape.dtype)
    layout = _layout(args, shape)
    num_blocks = settings.kv_cache_bytes // layout.block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"kv_cache_bytes = {settings.kv_cache_bytes} holds {num_blocks} blocks of {layout.block_bytes} bytes; "
            f"give at least {2 * layout.block_bytes}"
        )
    number = f" {args.shard.rank}" if args.shard.dims.world > 1 else ""
    runner = Runner.load(
        folder,
        shape,
        args.weights_role,
        dtype=dtype,
        device=process.choose_device(settings.device),
        num_blocks=num_blocks,
        block_size=settings.block_size,
        place=place,
        max_graphed=settings.max_num_seqs if settings.cuda_graphs else 0,
        shares_kv=settings.kv_placement != "split",
        rule=rule_of(args),
        quantization=args.config.model(args.model).quantization,
        kv_dtype=settings.kv_dtype,
        progress=ByteProgress(f"{args.model}, {args.role}{number}: weights", sys.stderr),
    )
    return dataclasses.replace(runner, rejects_nan=settings.poison_freed_blocks)


def load_follower(
    args: RankArgs, place: Place, connect: Callable[[Endpoint], Channel]
) -> tuple[Runner, Follower | None]:
    """What a following rank runs, and its part in hand-overs, None where the leader sees all KV heads.

    `connect` gives the channel to a rank of another replica. Raises as `load_runner` does.
    """
    runner = load_runner(args, place)
    num_kv_heads = runner.decoder.config.num_kv_heads
    if runner.kv.data.shape[4] == num_kv_heads:
        return runner, None
    part = SliceOf(num_kv_heads, place.tp.rank, place.tp.size)
    num_slots = host_blocks(args, ModelConfig.from_folder(args.config.model(args.model).path))
    memory = HostMemory(runner.kv.data, num_slots) if num_slots else None
    return runner, Follower(runner.kv, part, args.config.transport.piece_bytes, connect, memory)


def load_worker(args: RankArgs, place: Place, emit: Callable[[list[Outcome]], None]) -> Worker:
    """The worker of a leading rank, nothing running yet; `emit` takes the outcomes. Raises as `load_runner` does."""
    config, settings, folder = args.config, _settings(args), args.config.model(args.model).path
    shape = ModelConfig.from_folder(folder)
    return Worker(
        EmulatedRunner.of(load_runner(args, place), settings.emulate),
        shape,
        WorkerSettings(
            block_size=settings.block_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_num_seqs=settings.max_num_seqs,
            enable_prefix_cache=settings.enable_prefix_cache,
            reserve_output_tokens=config.router.reserve_output_tokens,
            lease_timeout_s=config.router.lease_timeout_s,
            piece_bytes=config.transport.piece_bytes,
            can_encode=args.weights_role != "decode",
            host_blocks=host_blocks(args, shape),
            poison_freed_blocks=settings.poison_freed_blocks,
            step_timeout_s=settings.step_timeout_s,
        ),
        emit,
        lambda: Compiler(load_vocabulary(folder, shape.text.vocab_size)),
    )


def _layout(args: RankArgs, shape: ModelConfig) -> KVLayout:
    """Of this rank's own KV heads."""
    settings = _settings(args)
    dims = args.shard.dims
    return KVLayout.from_model(shape, settings.block_size, settings.kv_dtype_of(shape.dtype), dims.tp)


def host_blocks(args: RankArgs, shape: ModelConfig) -> int:
    """Blocks that the memory behind the KV cache holds; raises ConfigError where it is too small for one."""
    given, block_bytes = _settings(args).host_cache_bytes, _layout(args, shape).block_bytes
    if 0 < given < block_bytes:
        raise ConfigError(f"host_cache_bytes = {given} holds no block of {block_bytes} bytes; give at least that, or 0")
    return given // block_bytes


def _settings(args: RankArgs) -> EngineConfig:
    return args.config.model(args.model).engine


def rule_of(args: RankArgs) -> Rule | None:
    """When the experts of this rank's gang move; None = never."""
    pool = args.config.model(args.model).pool(args.role)
    if pool is None or not pool.eplb.enabled:
        return None
    return Rule(pool.eplb.interval_steps, partial(rebalance, min_gain=pool.eplb.min_gain))


def load_vocabulary(folder: str, size: int) -> Vocabulary:
    """What the model of a checkpoint folder can say, `size` token ids wide; raises CheckpointError."""
    tokenizer = Tokenizer.from_folder(folder)
    return Vocabulary(tokenizer.text_bytes(size), end_token_ids(folder, tokenizer))
