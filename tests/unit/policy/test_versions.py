"""Which of several versions takes new work."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.pool import PoolConfig, Role
from ernie_cluster.policy.versions import in_charge

MODEL = ModelDeployment("m", "/m", tuple(PoolConfig(r) for r in ("vision", "prefill", "decode")))
ALL: list[Role] = ["vision", "prefill", "decode", "mixed"]


@given(st.dictionaries(st.sampled_from("abc"), st.sets(st.sampled_from(ALL)), max_size=3))
def test_the_wanted_one_when_it_can_else_one_that_can_else_the_wanted_one(present: dict[str, set[Role]]) -> None:
    found = in_charge(present, "b", MODEL.missing)
    whole = {v for v in present if not MODEL.missing(present[v])}
    assert found == "b" if "b" in whole or not whole else found in whole


def test_a_new_version_waits_for_its_last_role() -> None:
    old: set[Role] = {"vision", "prefill", "decode"}
    assert in_charge({"old": old, "new": {"vision", "decode"}}, "new", MODEL.missing) == "old"
    assert in_charge({"old": old, "new": old}, "new", MODEL.missing) == "new"
    assert in_charge({"old": {"decode"}, "new": {"prefill"}}, "new", MODEL.missing) == "new"


def test_what_may_continue_each_others_kv_is_one_version() -> None:
    def version(**fields: object) -> str:
        engine = {k: v for k, v in fields.items() if hasattr(MODEL.engine, k)}
        own = {k: v for k, v in fields.items() if k not in engine}
        return replace(MODEL, engine=replace(MODEL.engine, **engine), **own).version  # type: ignore[arg-type]

    assert version(max_num_seqs=3, floor=2, max_batch_tokens=64, name="other") == MODEL.version
    others: list[dict[str, object]] = [
        {"path": "/n"},
        {"block_size": 32},
        {"dtype": "float32"},
        {"kv_dtype": "int8"},
        {"quantization": "wint8"},
    ]
    assert len({MODEL.version, *(version(**o) for o in others)}) == len(others) + 1
