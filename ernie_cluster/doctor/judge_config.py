"""What to think of a configuration, its checkpoints, and whether it fits the machines: pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ernie_cluster.doctor.facts import Card, Gpus, Memory, Stored
from ernie_cluster.doctor.finding import Finding
from ernie_cluster.doctor.need import Need
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.sizing.check import check_fit
from ernie_cluster.policy.sizing.gpus import GPUS, Gpu
from ernie_cluster.policy.sizing.pools import gigabytes

SAME_KIND = 0.1
"""Share by which a GPU's memory may differ from what its maker says, for it to be of that kind: MIG and vGPUs differ by more."""


def checkpoints(need: Need, facts: Sequence[Stored]) -> Iterator[Finding]:
    name = "checkpoints"
    if need.config is None:
        yield Finding(name, "skipped", "no CONFIG was given")
        return
    for stored in facts:
        where = f"{stored.model}: {stored.folder}"
        for fault in stored.faults:
            what, _, remedy = fault.partition("; ")
            yield Finding(
                name, "problem", what, f"whole, as its config.json says ({where})", remedy or "download it again"
            )
        if not stored.faults:
            files = f"{stored.num_files} file" + ("" if stored.num_files == 1 else "s")
            size = f"{stored.num_tensors:,} tensors in {files}, {gigabytes(stored.num_bytes)}"
            yield Finding(name, "ok", f"{where}: {size}")
    looked_at = {stored.model for stored in facts}
    for model in need.config.models:
        if model.name not in looked_at:
            yield Finding(
                name, "skipped", f"{model.name}: {model.path} is not on this machine; `serve` fetches it, if it can"
            )


def plan(need: Need, gpus: Sequence[Gpus], memories: Sequence[Memory]) -> Iterator[Finding]:
    """Whether the pools fit, by the same sums as `ernie-cluster plan` and `serve`.

    Args:
        gpus, memories: of all machines together.
    """
    if need.config is None:
        yield Finding("plan", "skipped", "no CONFIG was given")
        return
    unknown = [model.name for model in need.config.models if model.name not in need.shapes]
    if unknown:
        yield Finding("plan", "skipped", f"the shape of {', '.join(unknown)} is not known here: no config.json")
        return
    cards = [card for machine in gpus for card in machine.cards]
    strange = sorted({card.name for card in cards if kind_of(card) is None})
    if need.num_gpus and (strange or not cards):
        why = f"what {', '.join(strange)} can do is not known" if strange else "no GPU can be seen"
        yield Finding(
            "plan", "skipped", f"{why}; `ernie-cluster plan CONFIG --gpu KIND` says what fits on a known kind"
        )
        return
    kinds = sorted({kind.name for card in cards if (kind := kind_of(card)) is not None})
    memory = sum(m.total_bytes for m in memories)
    try:
        check_fit(need.config, need.shapes, [GPUS[kind] for kind in kinds], memory or None)
    except ConfigError as e:
        what, _, remedy = str(e).partition("; ")
        yield Finding("plan", "problem", what, "fits", remedy)
        return
    where = f"{len(cards)} GPUs ({', '.join(kinds)}) and " if cards else ""
    wanted = f"{need.num_gpus:g} GPUs" if need.num_gpus else gigabytes(need.host_bytes or 0)
    if need.num_gpus > len(cards):
        remedy = "add machines, or lower num_replicas; until then replicas wait for a place"
        yield Finding("plan", "problem", f"{len(cards)} GPUs in all", wanted, remedy)
    else:
        yield Finding("plan", "ok", f"fits {where}{gigabytes(memory)} of memory", wanted)


def kind_of(card: Card) -> Gpu | None:
    """By name and memory; None of a kind that is not in the table."""
    near = [
        kind
        for kind in GPUS.values()
        if kind.ray_type.replace("-", " ") in card.name.replace("-", " ")
        and abs(kind.memory_bytes - card.memory_bytes) <= SAME_KIND * kind.memory_bytes
    ]
    return min(near, key=lambda kind: abs(kind.memory_bytes - card.memory_bytes), default=None)
