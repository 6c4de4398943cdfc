"""What a stage costs on a replica, in seconds. Each number grows with the replica's load, and with nothing else of it.

A path is weighed by the time to its first token, and the time that the first stretch of the answer takes after it. What
the network and the hand-over take is measured on CPU (BENCHMARKS.md); the rest, the replicas measure themselves.
"""

from __future__ import annotations

from ernie_cluster.policy.snapshot import ReplicaSnapshot

_NODE_BYTES_PER_S = 4e9
"""Inside a node, through shared memory."""
_NETWORK_BYTES_PER_S = 1e9
"""Between nodes: a 10 Gbit/s line that others use too."""
_HANDOVER_S = 0.002
"""A prompt that is handed over, beside its bytes."""
_STALL_WEIGHT = 0.25
"""A second by which others' answers stand still: their readers have some text before them."""
_CROWD_WEIGHT = 1.0
"""Requests that wait for what a replica does now, beside the one it does it for. In replays of a published trace 1 costs
the mean time to the first token 1 % at most, and saves 2 to 3 % of the replicas' time; more costs more than it saves."""


def queue_s(replica: ReplicaSnapshot) -> float:
    """Until a replica begins with what comes now: it works off first what waits."""
    rates = replica.rates
    return replica.waiting_tokens * (rates.media_token_s if replica.role == "vision" else rates.token_s)


def prefill_s(replica: ReplicaSnapshot, num_tokens: int) -> float:
    """Of a prompt of which so many tokens are not cached."""
    return replica.rates.chunk_s + num_tokens * replica.rates.token_s


def encode_s(replica: ReplicaSnapshot, num_pictures: int, num_tokens: int) -> float:
    """Of pictures that are not cached."""
    return num_pictures * replica.rates.picture_s + num_tokens * replica.rates.media_token_s


def pace_s(replica: ReplicaSnapshot) -> float:
    """Of a token of an answer, among those of the others.

    A replica short of blocks takes them back from somebody sooner or later, so a full one counts twice.
    """
    rates = replica.rates
    step_s = rates.step_s + rates.sequence_s * (replica.num_running + replica.num_waiting)
    fill = 1 - replica.free_blocks / max(1, replica.total_blocks)
    return step_s * (1 + fill * fill)


def decode_s(replica: ReplicaSnapshot, num_tokens: int) -> float:
    """Of so many tokens of an answer."""
    return num_tokens * pace_s(replica)


def stall_s(replica: ReplicaSnapshot, seconds: float) -> float:
    """What a prompt of so many seconds takes from those whose answers are written on the same replica."""
    return _STALL_WEIGHT * replica.num_running * seconds


def crowd_s(seconds: float) -> float:
    """What a prompt of so many seconds takes from those who come after it.

    Without it everybody leaves a busy replica for one where his prompt is read a second time, to gain less than others lose.
    """
    return _CROWD_WEIGHT * seconds


def transfer_s(source: ReplicaSnapshot, target: ReplicaSnapshot, num_tokens: int) -> float:
    """Of the KV of so many tokens, or of their embeddings."""
    rate = _NODE_BYTES_PER_S if source.node_id == target.node_id else _NETWORK_BYTES_PER_S
    return _HANDOVER_S + num_tokens * source.token_bytes / rate


def rank_s(replica: ReplicaSnapshot) -> float:
    """Of a nominal request of which nothing is cached: how the replicas of one role are ordered before a closer look."""
    if replica.role == "decode":
        return pace_s(replica)
    if replica.role == "mixed":
        return queue_s(replica) + decode_s(replica, 16)
    return queue_s(replica)
