"""Actions of the autoscaler in words."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.policy.scaling.actions import Action, MoveGpus, ScaleIn, ScaleOut, ScaleToZero, SwitchRole, WakeUp


@dataclass(frozen=True, slots=True)
class Said:
    """One action for people to read."""

    model: str
    name: str
    """As in logs and metrics."""
    replicas: tuple[str, ...]
    """That it names."""
    detail: str
    reason: str


def said(action: Action) -> Said:
    """What an action does, in a few words."""
    match action:
        case SwitchRole(model, ids, source, target, reason):
            return Said(model, "switch_role", ids, f"{len(ids)} {source} -> {target}", reason)
        case MoveGpus(stops, model, role, reason):
            ids = tuple(stop.replica_id for stop in stops)
            givers = ", ".join(sorted({stop.model for stop in stops}))
            return Said(model, "move_gpus", ids, f"{len(ids)} of {givers} stop for 1 {role}", reason)
        case ScaleOut(model, role, count, reason):
            return Said(model, "scale_out", (), f"{count} {role} more", reason)
        case ScaleIn(model, role, ids, reason):
            return Said(model, "scale_in", ids, f"{len(ids)} {role} fewer", reason)
        case ScaleToZero(model, ids, reason):
            return Said(model, "scale_to_zero", ids, f"all {len(ids)} stop", reason)
        case WakeUp(model, roles, reason):
            return Said(model, "wake_up", (), "start " + ", ".join(roles), reason)
