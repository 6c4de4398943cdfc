"""Which version of a model takes new work while an application is deployed anew.

Replicas that hold other weights, or KV in another form, are another version; a path is never of two. The one that is wanted
serves as soon as it has all that a request needs; until then one that still has it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from ernie_cluster.config.pool import Role


def in_charge(
    present: Mapping[str, Collection[Role]], wanted: str, missing: Callable[[Collection[Role]], Collection[Role]]
) -> str:
    """The version that takes new work.

    Args:
        present: roles of the replicas that are there, by version.
        wanted: by the configuration that holds now.
        missing: what these roles lack, see `ModelDeployment.missing`.
    """
    whole = [version for version in sorted(present) if not missing(present[version])]
    return wanted if wanted in whole or not whole else whole[0]
