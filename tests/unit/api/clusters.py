"""A cluster as operators see it, for tests."""

from __future__ import annotations

from ernie_cluster.api.operator import ClusterView, DecisionView, ModelView, ReplicaView
from tests.fakes import FakeBackend

PREFILL = ReplicaView(
    "org/m/prefill/abc123", "org/m", "prefill", "prefill", "ready", "node-1", 1.0, 3, 2, 4096, 60, 100, 0.1
)
SWITCHED = ReplicaView(
    "org/m/prefill/abd456", "org/m", "prefill", "decode", "switching", "node-1", 1.0, 1, 0, 0, 90, 100, 0.2
)
DECODE = ReplicaView(
    "org/m/decode/xyz789", "org/m", "decode", "decode", "draining", "node-2", 2.0, 7, 0, 0, 10, 100, 0.3
)
VISION = ReplicaView("org/m/vision/v1", "org/m", "vision", "vision", "ready", "node-2", 1.0, 0, 0, 0, 0, 0, 0.9)
STARTING = ReplicaView("org/m/decode/new1", "org/m", "decode", "decode", "starting", "", 1.0)

MODELS = (
    ModelView("org/m", True, "", 2, 3.25, 12_345.0, 1234.0, 0.42, 0.031, {"prefill": 2.3, "decode": 1.1}),
    ModelView("asleep", False, "waiting for a mixed replica", 0),
)
DECISIONS = [
    DecisionView(1000.0, "org/m", "switch_role", (SWITCHED.replica,), "1 prefill -> decode", "decode is short of replicas"),
    DecisionView(990.0, "", "note", (), "nothing", "the budget is used up"),
    DecisionView(900.0, "org/m", "drain", (DECODE.replica,), "drained", "an operator's order"),
]  # fmt: skip
VIEW = ClusterView(MODELS, (VISION, PREFILL, SWITCHED, DECODE, STARTING), True, 8.0, 6.0, "GPUs", tuple(DECISIONS[:2]))


def operated() -> FakeBackend:
    """A backend that tells of this cluster."""
    backend = FakeBackend()
    backend.cluster_news, backend.decision_news = VIEW, list(DECISIONS)
    return backend
