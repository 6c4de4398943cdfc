"""What was decided and is not done yet: how many replicas each pool is to have, who is to stop, what waits for GPUs.

A plan is a value; whoever carries it out asks `wanted` for the size of a pool, `stopping` for those that are to drain and
end, and shows what there is to `settled`. Which of its replicas a pool loses is decided here and not by Serve: its size stays
as it is until the one that was chosen has ended by itself, and never falls below those that run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ernie_cluster.config.pool import Role
from ernie_cluster.policy.scaling.actions import Action, MoveGpus, ScaleIn, ScaleOut, ScaleToZero, SwitchRole, WakeUp
from ernie_cluster.policy.scaling.snapshot import Phase, ReplicaState

PoolKey = tuple[str, Role]
"""Model and role of a pool: the home of the replicas that were started in it, whatever they do since."""


@dataclass(frozen=True, slots=True)
class Gang:
    """A replica that runs."""

    gang_id: str
    model: str
    home: Role
    role: Role
    """At present, or as it was told to be."""
    is_draining: bool = False
    """It takes no more, or was told so."""
    is_leaving: bool = False
    """Its process ends soon; where its pool is to have as many, another one comes in its place."""
    is_silent: bool = False
    """It has not registered yet, or not again: nothing is known of it but where it was started."""
    is_listed: bool = True
    """Serve counts it among those that run. It does so a while after one has registered, and no more when it stops one."""
    load: float = 0.0
    num_prompts: int = 0
    num_answers: int = 0

    @property
    def pool(self) -> PoolKey:
        return self.model, self.home

    @property
    def has_old_work(self) -> bool:
        """Whether there is any that its role would not get."""
        return bool((self.role == "prefill" and self.num_answers) or (self.role == "decode" and self.num_prompts))


@dataclass(frozen=True, slots=True)
class Move:
    """A replica to be started when others have ended."""

    number: int
    """Names it."""
    stops: frozenset[str]
    model: str
    role: Role
    unstarted: tuple[PoolKey, ...] = ()
    """Pools of replicas that were given up for it before they had started, as was thought; see `Plan.within`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module."""

    counts: Mapping[PoolKey, int]
    """Replicas that each pool is to have, without those that are to stop."""
    stopping: frozenset[str] = frozenset()
    """Gangs that drain and then end."""
    switching: frozenset[str] = frozenset()
    """Gangs that were given another role and may have work of their former one."""
    moves: tuple[Move, ...] = ()

    def wanted(self, pool: PoolKey, running: Collection[str], gone: Collection[str] = ()) -> int:
        """How many replicas Serve is to keep in a pool.

        Args:
            running: its gangs that are alive.
            gone: gangs that were, and are not any more. (Serve, when it is started again, does not know yet who runs.)
        """
        ending = sum(pool_of(i) == pool and i not in gone for i in self.stopping)
        return max(self.counts.get(pool, 0) + ending, len(running))

    def states(self, gangs: Iterable[Gang], gpus: Mapping[PoolKey, float]) -> dict[str, list[ReplicaState]]:
        """The replicas of each model as the next decision is to see them, those with it that are still to come.

        Args:
            gpus: that one replica of each pool holds; every pool that there is.
        """
        found: dict[str, list[ReplicaState]] = {model: [] for model, _ in gpus}
        gangs = list(gangs)
        staying = [g for g in gangs if self._stays(g)]
        there = Counter(g.pool for g in staying)
        surplus = self._surplus(staying, there)
        for gang in gangs:
            phase = "draining" if gang.gang_id in surplus else self.phase(gang)
            found[gang.model].append(ReplicaState(gang.gang_id, gang.role, gpus[gang.pool], phase, gang.load))
        for (model, home), held in gpus.items():
            for i in range(self.counts.get((model, home), 0) - there[model, home]):
                found[model].append(ReplicaState(f"starting/{i}/{home}", home, held, "starting"))
        for move in self.moves:
            held = gpus[move.model, move.role]
            found[move.model].append(ReplicaState(f"planned/{move.number}/{move.role}", move.role, held, "planned"))
        return found

    def phase(self, gang: Gang) -> Phase:
        """What a gang is in the middle of."""
        if gang.is_draining or not self._stays(gang):
            return "draining"
        if gang.is_silent:
            return "silent"
        return "switching" if gang.gang_id in self.switching else "ready"

    def _stays(self, gang: Gang) -> bool:
        """Whether it is one of those that its pool is to have."""
        return not (gang.is_leaving or gang.gang_id in self.stopping)

    def _surplus(self, staying: Iterable[Gang], there: Mapping[PoolKey, int]) -> set[str]:
        """Gangs beyond what their pools are to have, whom Serve or `within` is about to stop: nobody else has to for them."""
        over = Counter({pool: n - self.counts[pool] for pool, n in there.items() if pool in self.counts})
        found = set[str]()
        for gang in sorted(staying, key=lambda g: (g.is_listed, *_order(g))):
            if over[gang.pool] > 0:
                over[gang.pool] -= 1
                found.add(gang.gang_id)
        return found

    def settled(self, gangs: Sequence[Gang]) -> Plan:
        """The plan after what has happened: who has ended, which moves can go on, who has finished its former work."""
        there = {g.gang_id: g for g in gangs}
        stopping = self.stopping & there.keys()
        switching = frozenset(i for i in self.switching & there.keys() if there[i].is_silent or there[i].has_old_work)
        counts, moves = Counter(self.counts), list[Move]()
        for move in self.moves:
            if move.stops & stopping:
                moves.append(move)
            else:
                counts[move.model, move.role] += 1
        return Plan(counts, stopping, switching, tuple(moves))

    def within(self, gangs: Sequence[Gang]) -> Plan:
        """The plan with as many more to stop as run beyond it: some had started when they were given up.

        Args:
            gangs: that Serve runs; those first that take no more, then those with least to finish.
        """
        plan, over = self, Counter[PoolKey]()
        for gang in gangs:
            over[gang.pool] += self._stays(gang)
        over.subtract(self.counts)
        for gang in sorted(gangs, key=_order):
            if over[gang.pool] > 0 and self._stays(gang):
                over[gang.pool] -= 1
                plan = plan._ending(gang.gang_id)
                move = next((m for m in plan.moves if gang.pool in m.unstarted), None)
                if move is not None:  # it waits for this one, then
                    waits = replace(
                        move, stops=move.stops | {gang.gang_id}, unstarted=_without(move.unstarted, gang.pool)
                    )
                    plan = replace(plan, moves=tuple(waits if m == move else m for m in plan.moves))
        return plan

    def after(self, action: Action, gangs: Iterable[Gang]) -> Plan:
        """The plan with one action begun."""
        there = {g.gang_id: g for g in gangs}
        match action:
            case SwitchRole():
                plan = self
                for replica_id in action.replica_ids:
                    plan = plan._switched(action.model, replica_id, action.target, there)
                return plan
            case MoveGpus():
                plan = self
                for stop in action.stops:
                    plan = plan._stopped(stop.model, stop.replica_id, there)
                stops = frozenset(stop.replica_id for stop in action.stops if stop.replica_id in there)
                others = [(s.model, _placeholder(s.replica_id)) for s in action.stops if s.replica_id not in stops]
                unstarted = tuple((model, home) for model, (kind, _, home) in others if kind == "starting")
                return plan._moved(stops, action.model, action.role, unstarted)
            case ScaleOut():
                return self._resized((action.model, action.role), action.count)
            case WakeUp():
                plan = self
                for role in action.roles:
                    plan = plan._resized((action.model, role), 1)
                return plan
            case ScaleIn() | ScaleToZero():
                plan = self
                for replica_id in action.replica_ids:
                    plan = plan._stopped(action.model, replica_id, there)
                return plan

    def _resized(self, pool: PoolKey, by: int) -> Plan:
        counts = Counter(self.counts)
        counts[pool] = max(0, counts[pool] + by)
        return replace(self, counts=counts)

    def _switched(self, model: str, replica_id: str, target: Role, there: Mapping[str, Gang]) -> Plan:
        if replica_id in there:
            return self.given_role(replica_id)
        kind, number, home = _placeholder(replica_id)
        if kind == "planned":
            moves = (replace(m, role=target) if m.number == number else m for m in self.moves)
            return replace(self, moves=tuple(moves))
        return self._resized((model, home), -1)._moved(frozenset(), model, target, ((model, home),))

    def _moved(self, stops: frozenset[str], model: str, role: Role, unstarted: tuple[PoolKey, ...]) -> Plan:
        number = max((m.number for m in self.moves), default=0) + 1
        return replace(self, moves=(*self.moves, Move(number, stops, model, role, unstarted)))

    def _stopped(self, model: str, replica_id: str, there: Mapping[str, Gang]) -> Plan:
        if replica_id in there:
            if replica_id in self.stopping:
                return self
            return self._ending(replica_id)._resized(there[replica_id].pool, -1)
        kind, number, home = _placeholder(replica_id)
        if kind == "planned":
            return replace(self, moves=tuple(m for m in self.moves if m.number != number))
        return self._resized((model, home), -1)

    def _ending(self, gang_id: str) -> Plan:
        return replace(self, stopping=self.stopping | {gang_id}, switching=self.switching - {gang_id})

    def given_role(self, gang_id: str) -> Plan:
        """The plan with a gang that was told another role."""
        return replace(self, switching=self.switching | {gang_id})

    def kept(self, gang: Gang) -> Plan:
        """The plan without the stop of a gang, which goes on where it was, and without what was to be started for it."""
        if gang.gang_id not in self.stopping:
            return self
        moves = tuple(m for m in self.moves if gang.gang_id not in m.stops)
        return replace(self, stopping=self.stopping - {gang.gang_id}, moves=moves)._resized(gang.pool, 1)


def _order(gang: Gang) -> tuple[bool, float, str]:
    """Those first whose end would be missed least."""
    return not gang.is_draining, gang.load, gang.gang_id


def _without(pools: tuple[PoolKey, ...], one: PoolKey) -> tuple[PoolKey, ...]:
    """Less one of those that are alike."""
    i = pools.index(one)
    return pools[:i] + pools[i + 1 :]


def pool_of(gang_id: str) -> PoolKey:
    """Where a replica was started, by its id."""
    model, role, _ = gang_id.rsplit("/", 2)
    return model, role  # type: ignore[return-value]  # as `PoolReplica` names itself


def _placeholder(replica_id: str) -> tuple[str, int, Role]:
    """(starting or planned, number, home) of a replica that is still to come."""
    kind, number, home = replica_id.split("/")
    return kind, int(number), home  # type: ignore[return-value]  # as `Plan.states` wrote it
