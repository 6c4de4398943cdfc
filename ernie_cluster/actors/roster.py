"""The replicas that have registered: how each is reached, what it told last, and what it was told to be.

It keeps the books' snapshots fresh, by a question to each replica that is answered when something is new. What a replica
is told (a role, to take no more) counts in the books at once, and is told again until the replica says so itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ernie_cluster.actors import background
from ernie_cluster.actors.direct import DirectPeer, RemoteFailure
from ernie_cluster.actors.messages import Load, ReplicaInfo, Told
from ernie_cluster.actors.patience import answered
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.pool import Role
from ernie_cluster.errors import OrderRefused, ReplicaLost
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.pace import pause_s
from ernie_cluster.policy.scaling.observe import Lane
from ernie_cluster.policy.scaling.plan import Gang
from ernie_cluster.policy.snapshot import ReplicaSnapshot
from ernie_cluster.policy.versions import in_charge

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Wish:
    """What a gang was told and has not shown yet; None = nothing."""

    role: Role | None = None
    is_draining: bool | None = None
    within_s: float | None = None

    def drains(self, load: Load) -> bool:
        """Whether a lane with this load has not been told all about draining."""
        if self.is_draining is None:
            return False
        is_sooner = self.within_s is not None and (load.within_s is None or self.within_s < load.within_s)
        return self.is_draining != load.is_draining or (self.is_draining and is_sooner)


class Roster:
    """Owns the connections to all replicas.

    Args:
        books: what is known goes there.
    """

    def __init__(self, books: Books, config: ClusterConfig) -> None:
        self._books, self._config, self._limits = books, config, config.router
        self._infos: dict[str, ReplicaInfo] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._peers: dict[str, DirectPeer] = {}
        self._loads: dict[str, Load] = {}
        self._wishes: defaultdict[str, _Wish] = defaultdict(_Wish)  # by gang
        self._pools = {(m.name, p.role) for m in config.models for p in m.pools}
        self._versions: dict[str, str] = {m.name: m.version for m in config.models}
        """In charge, by model."""

    @property
    def infos(self) -> Mapping[str, ReplicaInfo]:
        """By id, of those with a lane of their own."""
        return self._infos

    def register(self, info: ReplicaInfo) -> None:
        """It is there, or still there."""
        known = self._infos.get(info.replica_id)
        if known is not None and known.incarnation == info.incarnation:
            return
        if (info.model, info.role) not in self._pools:
            return  # of an earlier configuration; it finishes what it has
        log.info("%s %s is there (incarnation %s)", info.role, info.replica_id, info.incarnation)
        self.forget(info.replica_id)
        self._infos[info.replica_id] = info
        self._watchers[info.replica_id] = background.start(self._watch(info))
        self._charge(info.model)

    def suspect(self, replica_id: str) -> None:
        """Somebody could not reach it. If it is gone its connection ends, if it is well it tells something soon."""
        self._books.suspect(replica_id)

    def forget(self, replica_id: str) -> None:
        """It is gone: no work for it until it registers again."""
        info = self._infos.pop(replica_id, None)
        self._loads.pop(replica_id, None)
        self._peers.pop(replica_id, None)
        self._books.forget(replica_id)
        watcher = self._watchers.pop(replica_id, None)
        if watcher is not None:
            watcher.cancel()
        if info is not None and not any(i.gang == info.gang for i in self._infos.values()):
            self._wishes.pop(info.gang, None)
        if info is not None:
            self._charge(info.model)

    def gangs(self) -> list[Gang]:
        """Every replica that has told of itself, by id."""
        lanes: defaultdict[str, list[tuple[ReplicaInfo, Load]]] = defaultdict(list)
        for replica_id, load in self._loads.items():
            info = self._infos[replica_id]
            lanes[info.gang].append((info, load))
        return [self._gang(gang_id, own) for gang_id, own in sorted(lanes.items())]

    def roles(self, model: str) -> set[Role]:
        """Those for which a model has a replica that takes new work; looks at no replica by itself, however many there are."""
        fleet = self._books.fleet(time.monotonic())
        return {role for role in fleet.roles(model) if fleet.pool(model, role).mask}

    def lanes(self) -> list[Lane]:
        """What each group of ranks that takes requests has done and has to do."""
        return [self._lane(self._infos[replica_id], load) for replica_id, load in self._loads.items()]

    def loads(self, gang_id: str) -> list[tuple[ReplicaInfo, Load]]:
        """Of the lanes of one replica."""
        return [(i, load) for key, load in self._loads.items() if (i := self._infos[key]).gang == gang_id]

    def is_done(self, gang_id: str) -> bool:
        """Whether all lanes of a replica have told that they take no more and have nothing left to do."""
        lanes = self.loads(gang_id)
        return bool(lanes) and len(lanes) == self._num_lanes(lanes[0][0]) and all(_is_done(load) for _, load in lanes)

    async def tell(
        self,
        gang_id: str,
        *,
        role: Role | None = None,
        is_draining: bool | None = None,
        within_s: float | None = None,
    ) -> None:
        """Order a replica about; counts at once for what is routed from now on.

        Args:
            within_s: one that drains parts after so many seconds with what it still has.

        Raises:
            OrderRefused: it cannot do that; then nothing has changed.
            ReplicaLost, TimeoutError: it does not answer; it will be told again while it is known.
        """
        lanes = self.loads(gang_id)
        if not lanes:
            raise ReplicaLost(f"{gang_id} has not told of itself lately; try again when it has")
        wish = self._wishes[gang_id]
        wish.role = role or wish.role
        if is_draining is not None:
            wish.is_draining, wish.within_s = is_draining, within_s
        self._book(gang_id)
        try:
            for info, _ in lanes:
                await self._remind(info.replica_id)
        except OrderRefused:
            self._book(gang_id)
            raise

    def _charge(self, model: str) -> None:
        """See which version of a model takes new work, now that a replica has come or gone."""
        deployment = self._config.model(model)
        present: defaultdict[str, set[Role]] = defaultdict(set)
        own = [i for i in self._infos.values() if i.model == model]
        for info in own:
            present[info.version or deployment.version].add(info.role)
        version = in_charge(present, deployment.version, deployment.missing)
        if version != self._versions[model]:
            log.info("%s: from now on replicas of version %s take new work", model, version)
            self._versions[model] = version
            for gang in {i.gang for i in own}:
                self._book(gang)

    def _is_in_charge(self, info: ReplicaInfo) -> bool:
        return info.version is None or info.version == self._versions[info.model]

    def _book(self, gang_id: str) -> None:
        """Let the books know what a gang is told."""
        now = time.monotonic()
        for info, load in self.loads(gang_id):
            self._books.report(self._snapshot(info, load, 0.0), now)

    def _num_lanes(self, info: ReplicaInfo) -> int:
        pool = self._config.model(info.model).pool(info.role)
        return pool.dp if pool else 1

    async def _remind(self, replica_id: str) -> None:
        """Tell a replica what it does not show yet; forget what it refuses."""
        load, peer = self._loads.get(replica_id), self._peers.get(replica_id)
        if load is None or peer is None:  # gone meanwhile
            return
        wish = self._wishes[self._infos[replica_id].gang]
        try:
            async with asyncio.timeout(self._limits.heartbeat_timeout_s):
                if wish.role not in (None, load.role):
                    await peer.call("become", wish.role)
                if wish.drains(load):
                    await peer.call("drain", wish.is_draining, wish.within_s)
        except RemoteFailure as e:
            if isinstance(e.error, OrderRefused):
                self._withdraw(wish, load)
            raise e.error from None

    @staticmethod
    def _withdraw(wish: _Wish, load: Load) -> None:
        """A rank has refused: to become something, or to take work again."""
        if wish.role not in (None, load.role):
            wish.role = None
        else:
            wish.is_draining = None

    async def _watch(self, info: ReplicaInfo) -> None:
        """Ask one replica what is new, over and over; forget it when its connection ends.

        The books know of themselves who is silent. Who is stopped and goes on answers the very question that is open.
        """
        key = info.replica_id
        peer: DirectPeer | None = None
        try:
            peer = await DirectPeer.connect(info.address, key)
            while True:
                asked = time.monotonic()
                told: Told = await answered(peer.call("tell", self._books.seen(key)), self._limits.lease_timeout_s)
                now = time.monotonic()
                self._loads[key], self._peers[key] = told.load, peer
                self._books.report(self._snapshot(info, told.load, max(0.0, now - asked - told.held_s)), now)
                self._books.cached(key, told.cached)
                try:
                    await self._remind(key)
                except OrderRefused:  # whoever ordered it hears of it
                    self._book(info.gang)
                except TimeoutError:
                    pass  # told again with what it tells next
                await asyncio.sleep(pause_s(len(self._infos), self._limits))
        except asyncio.CancelledError:
            raise
        except Exception as e:  # dead, stuck, or its engine has stopped: it registers again when it is well
            log.warning("%s does not answer: %s", key, e)
            self._watchers.pop(key, None)
            self.forget(key)
        finally:
            if peer is not None:
                if self._peers.get(key) is peer:
                    del self._peers[key]
                await peer.close()

    def _role(self, info: ReplicaInfo, load: Load) -> Role:
        wish = self._wishes.get(info.gang)
        return (wish and wish.role) or load.role or info.role

    def _is_draining(self, info: ReplicaInfo, load: Load) -> bool:
        wish = self._wishes.get(info.gang)
        return load.is_draining if wish is None or wish.is_draining is None else wish.is_draining

    def _gang(self, gang_id: str, lanes: list[tuple[ReplicaInfo, Load]]) -> Gang:
        info, load = lanes[0]
        loads = [load for _, load in lanes]
        block_size = self._config.model(info.model).engine.block_size
        used = sum((load.total_blocks - load.free_blocks) * block_size for load in loads)
        return Gang(
            gang_id,
            info.model,
            home=info.role,
            role=self._role(info, load),
            is_draining=self._is_draining(info, load),
            is_leaving=any(load.is_leaving for load in loads),
            load=used + sum(load.waiting_tokens for load in loads),
            num_prompts=sum(load.num_prompts for load in loads),
            num_answers=sum(load.num_answers for load in loads),
        )

    def _lane(self, info: ReplicaInfo, load: Load) -> Lane:
        return Lane(
            lane_id=info.replica_id,
            gang=info.gang,
            model=info.model,
            role=self._role(info, load),
            incarnation=info.incarnation,
            work=load.work,
            backlog_tokens=load.waiting_tokens,
            kv_tokens=load.total_blocks * self._config.model(info.model).engine.block_size,
            is_idle=load.is_idle,
        )

    def _snapshot(self, info: ReplicaInfo, load: Load, age_s: float) -> ReplicaSnapshot:
        return ReplicaSnapshot(
            replica_id=info.replica_id,
            model=info.model,
            role=self._role(info, load),
            node_id=info.node_id,
            incarnation=info.incarnation,
            is_ready=self._is_in_charge(info),
            is_draining=self._is_draining(info, load),
            num_running=load.num_running,
            num_waiting=max(load.num_waiting, load.num_answers - load.num_running),  # with those whose KV is on its way
            max_running=self._config.model(info.model).engine.max_num_seqs,
            waiting_tokens=load.waiting_tokens,
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            block_size=self._config.model(info.model).engine.block_size,
            age_s=age_s,
            experts=load.experts,
            rates=load.rates,
            token_bytes=load.token_bytes,
        )


def _is_done(load: Load) -> bool:
    return load.is_idle and load.is_draining
