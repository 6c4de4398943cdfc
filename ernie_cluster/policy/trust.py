"""Whom not to send work to: who has just failed a request, who may hang, who fails again and again.

None of these is a reason to serve nobody: where nobody else is left in a pool, the least bad are used.
"""

from __future__ import annotations

from collections.abc import Collection

from ernie_cluster.policy.fleet import Fleet


def to_avoid(fleet: Fleet, model: str, failed: Collection[str], shunned: frozenset[str]) -> frozenset[str]:
    """The replicas of a model that a request shall not use.

    Of each pool those who have not failed this request and are not shunned are used, if there are any that take work; else
    those who have not failed it; else those who are not shunned, which have shown since then that they are well; else none.

    Args:
        failed: they have failed this request.
        shunned: they are silent, or fail too often.
    """
    if not failed and not shunned:
        return frozenset()
    known, out = frozenset(failed), frozenset[str]()
    for role in fleet.roles(model):
        usable = fleet.pool(model, role).mask
        for avoided in (known | shunned, known, shunned):
            if usable & ~fleet.bits(avoided):
                break
        else:
            avoided = known | shunned
        out |= {i for i in avoided if (m := fleet.member(i)) and (m.now.model, m.now.role) == (model, role)}
    return out
