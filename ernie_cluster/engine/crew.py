"""How the ranks of a gang come to run the same steps.

The first rank of each tensor-parallel group leads: it has the engine, and announces each step to its followers, which
have nothing but weights. Leaders of several groups (dp > 1) ask each other before each step whether anybody has work:
if so all run, those without work a step without tokens, since experts are spread over all of them. In the same vote rank 0
calls for moving experts: then all leaders hear what it decides, tell their followers, and all ranks exchange weights before
anybody steps.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ernie_cluster.engine.balance import Balancer
from ernie_cluster.model.group import ALONE, Group, Place
from ernie_cluster.model.packing import make_step, open_step, packed_bytes
from ernie_cluster.model.step import StepInput, StepMemory, StepShape
from ernie_cluster.transport.base import Message

BEAT_S = 5.0
"""Idle leaders say so this often, so that followers may take long silence for death."""


class Command(IntEnum):
    """What a leader announces."""

    STEP = 0
    BEAT = 1
    STOP = 2
    MOVE = 3
    """Experts change places; where to, `Balancer.follow` hears."""
    NOTES = 4
    """Something to know before the next step, see `Crew.note`."""


class Crew:
    """A leader's hold on the other ranks. Called on the engine's thread only, but for `note`.

    Args:
        place: of the leader; ALONE has nobody to lead, and every call is free.
        clock: monotonic seconds.
        balancer: of the experts; None = they stay where they are, and nobody counts.
    """

    def __init__(
        self, place: Place = ALONE, clock: Callable[[], float] = time.monotonic, balancer: Balancer | None = None
    ) -> None:
        self._tp, self._dp, self._clock, self.balancer = place.tp, place.dp, clock, balancer
        self._last_said = clock()
        self._notes: deque[Message] = deque()

    @property
    def has_peers(self) -> bool:
        """Whether other leaders may have work when this one has none."""
        return self._dp.size > 1

    def note(self, note: Message) -> None:
        """Say something to the followers before the next step, or while there is none; from any thread."""
        self._notes.append(note)

    @property
    def has_notes(self) -> bool:
        """Whether the followers have not heard all."""
        return bool(self._notes)

    def open(self, step: StepInput) -> None:
        """A step of ours begins."""
        self._vote(True)
        self._say(Command.STEP, step)

    def rest(self) -> bool:
        """There is nothing to do here. True if other leaders step, and so must we: without tokens, and announced."""
        if self._vote(False):
            return True
        self._tell_notes()
        if self._clock() - self._last_said > BEAT_S:
            self._say(Command.BEAT)
        return False

    def join(self, step: StepInput) -> None:
        """Announce the step without tokens that `rest` asked for."""
        self._say(Command.STEP, step)

    def dismiss(self) -> None:
        """Followers end."""
        self._say(Command.STOP)

    def _vote(self, has_work: bool) -> bool:
        """Whether any leader has work. Experts move in here, where every rank is between two steps."""
        is_due = self.balancer is not None and self.balancer.is_due(self._clock())
        if self.has_peers:
            has_work, is_due = (self._dp.add(torch.tensor([int(has_work), int(is_due)])) > 0).tolist()
        if is_due:
            self._move_experts()
        if has_work and self.balancer is not None:
            self.balancer.stepped()
        return has_work

    def _move_experts(self) -> None:
        assert self.balancer is not None, "a leader of this gang balances its experts, so all do"
        wanted = self.balancer.decide()
        if wanted is None:
            return
        self._say(Command.MOVE)
        if self._tp.size > 1:
            self._tp.spread(wanted)
        self.balancer.move(wanted)

    def _say(self, command: Command, step: StepInput | None = None) -> None:
        self._last_said = self._clock()
        if self._tp.size > 1:
            if step is not None:
                self._tell_notes()
            announce(self._tp, command, step)

    def _tell_notes(self) -> None:
        if self._notes and self._tp.size > 1:
            announce(self._tp, Command.NOTES)
            tell(self._tp, [self._notes.popleft() for _ in range(len(self._notes))])


def empty_step(device: torch.device) -> StepInput:
    """A step without tokens."""
    return make_step(
        token_ids=[],
        positions=np.zeros((3, 0)),
        slots=[],
        block_tables=np.zeros((0, 0)),
        query_lens=[],
        context_lens=[],
        num_decode=0,
        logits_rows=[],
        device=device,
    )


_HEADER = 2 + len(fields(StepShape))


def announce(group: Group, command: Command, step: StepInput | None = None) -> None:
    """Tell the followers."""
    if step is None:
        group.spread(torch.tensor([command, *[0] * (_HEADER - 1)]))
        return
    has_embeds = step.media_embeds is not None
    group.spread(torch.tensor([command, has_embeds, *astuple(step.memory.shape)]))
    group.spread(step.memory.host)
    if step.media_embeds is not None:
        group.spread(step.media_embeds)


def receive(group: Group, embed: Tensor) -> tuple[Command, StepInput | None]:
    """What the leader announces; the rows whose logits are wanted are left out, as only a leader needs them.

    Args:
        group: of the leader and its followers.
        embed: [V, D]; shows device, width and dtype of embeddings.

    Raises:
        GangBroken: another rank is gone.
    """
    command, has_embeds, *counts = group.spread(torch.zeros(_HEADER, dtype=torch.int64)).tolist()
    if command != Command.STEP:
        return Command(command), None
    shape, device = StepShape(*counts), embed.device
    pinned = device.type == "cuda"
    host = group.spread(torch.empty(packed_bytes(shape), dtype=torch.uint8, pin_memory=pinned))
    embeds = None
    if has_embeds:
        embeds = group.spread(torch.empty(shape.num_media, embed.shape[1], dtype=embed.dtype, device=device))
    step = open_step(StepMemory(shape, host, host.to(device, non_blocking=True)), embeds)
    return Command.STEP, replace(step, logits_rows=step.logits_rows[:0])


def tell(group: Group, notes: list[Message]) -> None:
    """Give the followers what `hear` returns there."""
    said = torch.frombuffer(bytearray(json.dumps(notes).encode()), dtype=torch.uint8)
    group.spread(torch.tensor([len(said)]))
    group.spread(said)


def hear(group: Group) -> list[Message]:
    """What the leader tells; raises GangBroken."""
    size = group.spread(torch.zeros(1, dtype=torch.int64))
    notes: list[Message] = json.loads(group.spread(torch.empty(int(size), dtype=torch.uint8)).numpy().tobytes())
    return notes
