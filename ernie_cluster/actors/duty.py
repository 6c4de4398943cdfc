"""What a rank is wanted for at present. It lives with the rank, so that a router which starts anew learns it from there."""

from __future__ import annotations

import logging

from ernie_cluster.actors.messages import RankArgs
from ernie_cluster.config.pool import Role
from ernie_cluster.errors import OrderRefused

log = logging.getLogger(__name__)


class Duty:
    """The role of one rank and whether it takes more. It refuses no work: what was routed before an order is done.

    Args:
        args: of the rank; its role is what it does at first.
    """

    def __init__(self, args: RankArgs) -> None:
        self._args = args
        self.role: Role = args.role
        self.is_draining = False
        self.is_leaving = False
        """Its process is about to end, and nobody can call it back."""
        self.within_s: float | None = None
        """After how long it parts with what it has, as it was told; None = never, or it does not drain."""

    def become(self, role: Role) -> None:
        """Do something else from now on; nothing changes where it does so already.

        Raises:
            OrderRefused: this rank cannot; the message says why.
        """
        if role == self.role:
            return
        if "vision" in (role, self.role):
            raise OrderRefused(
                f"a {self.role} replica cannot become {role}: pictures are encoded with other weights; start a replica in "
                f"the pool {role}",
                param="role",
            )
        if not self._args.deployment.switch_roles:
            raise OrderRefused(
                f"{self._args.model}: a {self.role} replica cannot become {role} while switch_roles is false; set "
                "switch_roles: true beside its pools and start it again",
                param="role",
            )
        log.info("%s: from now on %s, no more %s", self._args.actor_name, role, self.role)
        self.role = role

    def drain(self, *, is_draining: bool, within_s: float | None = None) -> None:
        """Whether others shall be preferred from now on, and for how long at most work here goes on."""
        if is_draining != self.is_draining:
            log.info("%s: %s", self._args.actor_name, "draining" if is_draining else "takes work again")
        bounds = [s for s in (self.within_s, within_s) if s is not None]
        self.within_s = min(bounds, default=None) if is_draining else None
        self.is_draining = is_draining
