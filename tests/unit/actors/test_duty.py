"""What a rank is told to be, what it tells of itself, and that one which may change its role can do every one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from ernie_cluster.actors import process
from ernie_cluster.actors.duty import Duty
from ernie_cluster.actors.encoder import Encoder
from ernie_cluster.actors.engine_rank import EngineRank
from ernie_cluster.actors.load_worker import load_worker
from ernie_cluster.actors.messages import Load, RankArgs, Work
from ernie_cluster.actors.vision_rank import VisionRank
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.pool import PoolConfig, Role
from ernie_cluster.config.units import MIB
from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import OrderRefused
from ernie_cluster.model.group import ALONE
from ernie_cluster.transport.local import LocalChannel, LocalReceiver
from tests.tiny import (
    BLOCK_SIZE,
    CPU,
    Outcomes,
    make_image,
    make_request,
    make_worker,
    run_mixed,
    tiny_folder,
    tiny_vision,
)
from tests.unit.engine.handover_path import show
from tests.unit.engine.toy import ManualChannel, toy_worker

ENGINE_ROLES: list[Role] = ["prefill", "decode", "mixed"]


def args_of(role: Role, *, switch_roles: bool = True) -> RankArgs:
    engine = EngineConfig(block_size=BLOCK_SIZE, kv_cache_bytes=MIB, num_threads=1)
    roles: tuple[Role, ...] = ("vision", "prefill", "decode", "mixed")
    pools = tuple(map(PoolConfig, roles))
    deployment = ModelDeployment("tiny", tiny_folder(), pools, engine, switch_roles=switch_roles)
    return RankArgs(ClusterConfig((deployment,)), "tiny", role, "a-rank", 1.0)


def rank_of(actor: Any, role: Role, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rank in this process: the class behind the actor."""
    monkeypatch.setattr(process, "share_interpreter", lambda: None)
    monkeypatch.setattr(process, "log_lines", lambda: None)
    return actor.__ray_metadata__.modified_class(args_of(role))


def load_of(rank: Any) -> Load:
    load = asyncio.run(rank.snapshot())
    assert isinstance(load, Load)
    return load


# ---- orders


@pytest.mark.parametrize("role", ENGINE_ROLES)
@pytest.mark.parametrize("target", ENGINE_ROLES)
def test_where_roles_may_change_engines_take_every_one(role: Role, target: Role) -> None:
    duty = Duty(args_of(role))
    for _ in range(2):
        duty.become(target)
        assert duty.role == target


@pytest.mark.parametrize("role", ENGINE_ROLES)
def test_elsewhere_they_keep_theirs_and_the_refusal_names_the_key(role: Role) -> None:
    duty = Duty(args_of(role, switch_roles=False))
    duty.become(role)
    for target in set(ENGINE_ROLES) - {role}:
        with pytest.raises(OrderRefused, match=f"a {role} replica cannot become {target} .* set switch_roles: true"):
            duty.become(target)
    assert duty.role == role


@pytest.mark.parametrize("role", ENGINE_ROLES)
def test_eyes_and_engines_do_not_change_places(role: Role) -> None:
    pairs: list[tuple[Role, Role]] = [(role, "vision"), ("vision", role)]
    for first, target in pairs:
        duty = Duty(args_of(first))
        with pytest.raises(
            OrderRefused, match=f"{first} replica cannot become {target}: .* start a replica in the pool"
        ):
            duty.become(target)
        assert duty.role == first


def test_an_engine_rank_tells_what_it_was_told_and_takes_work_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_of(EngineRank, "decode", monkeypatch)
    rank._worker, _ = toy_worker(30, 4)
    assert (load_of(rank).role, load_of(rank).is_draining) == ("decode", False)
    at_rest = load_of(rank)
    assert at_rest.is_idle
    assert at_rest == load_of(rank)  # else it would speak without having anything to say
    asyncio.run(rank.become("prefill"))
    for _ in range(2):
        asyncio.run(rank.drain(True))
    rank._worker.open_prefill(make_request(range(10, 19), "a", max_tokens=3), 0, None)
    told = load_of(rank)
    assert (told.role, told.is_draining, told.num_prompts, told.is_idle) == ("prefill", True, 1, False)
    while rank._worker.engine.step():
        pass
    told = load_of(rank)
    assert (told.is_idle, told.is_draining) == (True, True)
    assert (told.work.num_prompts, told.work.prompt_tokens, told.work.output_tokens) == (1, 9, 3)
    assert (told.work.reading.n, told.work.reading.x, told.work.writing.n) == (1, 9, 2)
    asyncio.run(rank.drain(False))
    assert not load_of(rank).is_draining


def test_a_vision_rank_counts_the_pictures_that_it_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_of(VisionRank, "vision", monkeypatch)
    rank._encoder = Encoder(tiny_vision(), CPU)
    rank._begin(lambda: None)
    assert load_of(rank).work == Work()
    pictures = [make_image(seed, grid) for seed, grid in ((1, (1, 4, 4)), (2, (1, 4, 6)))]
    for picture in (*pictures, pictures[0]):  # the third is in the cache
        rank._encoder.embed(picture)
    asyncio.run(rank.drain(True))
    with rank._at_work("r", pictures):
        assert load_of(rank).num_prompts == 1
        assert not load_of(rank).is_idle
    told = load_of(rank)
    tokens = sum(p.num_tokens for p in pictures)
    assert (told.role, told.is_draining, told.is_idle) == ("vision", True, True)
    assert (told.work.num_prompts, told.work.prompt_tokens, told.work.reading.x) == (2, tokens, tokens)
    assert told.work.reading.t > 0
    with pytest.raises(OrderRefused):
        asyncio.run(rank.become("mixed"))
    rank._thread.close()


@pytest.mark.parametrize(
    "field", ["num_running", "num_waiting", "waiting_tokens", "num_leases", "num_prompts", "num_answers"]
)
def test_a_rank_that_has_anything_left_is_not_idle(field: str) -> None:
    nothing = Load(num_running=0, num_waiting=0, waiting_tokens=0)
    assert nothing.is_idle
    assert not replace(nothing, **{field: 1}).is_idle  # type: ignore[arg-type]


# ---- weights


def load(role: Role, *, switch_roles: bool) -> tuple[Worker, Outcomes]:
    outcomes = Outcomes()
    return load_worker(args_of(role, switch_roles=switch_roles), ALONE, outcomes), outcomes


def parameters(worker: Worker) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in worker.engine.runner.decoder.named_parameters()}


def test_decode_ranks_hold_all_experts_where_roles_may_change_and_only_there() -> None:
    prefill, decode = load("prefill", switch_roles=False)[0], load("decode", switch_roles=False)[0]
    able = load("decode", switch_roles=True)[0]
    assert any("pools.1" in name for name in parameters(able))
    assert parameters(able) == parameters(prefill) != parameters(decode)
    assert (able.settings, prefill.settings.can_encode, decode.settings.can_encode) == (prefill.settings, True, False)


def test_a_picture_is_answered_alike_when_prefill_and_decode_have_changed_places() -> None:
    request = make_request([5, make_image(1), *range(30, 60)], "a", max_tokens=6)
    whole, expected = make_worker(max_batch_tokens=1024)
    run_mixed(whole, [request])
    expected.drain()
    (reads, first), (writes, others) = load("decode", switch_roles=True), load("prefill", switch_roles=True)
    kv = ManualChannel(writes.inbox)
    embeds = LocalChannel(LocalReceiver(reads.inbox), "vision")
    writes.open_decode(request, 0)
    reads.open_prefill(request, 0, kv)
    kv.deliver_all()
    show(embeds, request, 0)
    embeds.close()
    others.tokens["a"] = [-1]  # its first event bears index 1
    while any([reads.engine.step(), writes.engine.step()]) or kv.jobs:
        kv.deliver_all()
    first.drain()
    others.drain()
    assert first.tokens["a"] + others.tokens["a"][1:] == expected.tokens["a"]
    for worker in (reads, writes):
        assert worker.check()
        assert worker.pool.num_used == 0
