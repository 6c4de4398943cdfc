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
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ernie_cluster.engine.balance import Balancer
from ernie_cluster.model.group import ALONE, Group, Place
from ernie_cluster.model.step import StepInput
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
    """Something to know for the next step, see `Crew.note`."""


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
        """Say something to the followers with the next step; from any thread."""
        self._notes.append(note)

    def open(self, step: StepInput) -> None:
        """A step of ours begins."""
        self._vote(True)
        self._say(Command.STEP, step)

    def rest(self) -> bool:
        """There is nothing to do here. True if other leaders step, and so must we: without tokens, and announced."""
        if self._vote(False):
            return True
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
            if step is not None and self._notes:
                announce(self._tp, Command.NOTES)
                tell(self._tp, [self._notes.popleft() for _ in range(len(self._notes))])
            announce(self._tp, command, step)


def empty_step(device: torch.device) -> StepInput:
    """A step without tokens."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    lens = none.int()
    return StepInput(none, none.expand(3, 0), none, none.bool(), lens.view(0, 0), lens, (), (), 0, none, none, None)


_HEADER = 7


def announce(group: Group, command: Command, step: StepInput | None = None) -> None:
    """Tell the followers; they get all of the step but the rows whose logits are wanted, which only a leader needs."""
    if step is None:
        group.spread(torch.tensor([command, *[0] * (_HEADER - 1)]))
        return
    (num_rows, width), num_embeds = step.block_tables_BM.shape, len(step.media_rows)
    body = np.concatenate(
        [
            part.cpu().contiguous().numpy().reshape(-1).view(np.uint8)
            for part in (step.token_ids_T, step.positions_3T, step.slots_T, step.media_rows)
        ]
        + [part.cpu().contiguous().numpy().reshape(-1).view(np.uint8) for part in (step.block_tables_BM, step.seq_lens_B)]
        + [np.array(step.query_lens, np.int32).view(np.uint8), step.is_vision_T.cpu().numpy().view(np.uint8)]
    )  # fmt: skip
    has_embeds = step.media_embeds is not None
    header = [command, step.num_tokens, num_rows, width, num_embeds, step.num_decode, has_embeds]
    group.spread(torch.tensor(header))
    group.spread(torch.from_numpy(body))
    if step.media_embeds is not None:
        group.spread(step.media_embeds)


def receive(group: Group, embed: Tensor) -> tuple[Command, StepInput | None]:
    """What the leader announces; `embed` [V, D] shows device, width and dtype of embeddings. Raises GangBroken."""
    header = group.spread(torch.zeros(_HEADER, dtype=torch.int64))
    command, num_tokens, num_rows, width, num_embeds, num_decode, has_embeds = header.tolist()
    if command != Command.STEP:
        return Command(command), None
    longs, ints = 5 * num_tokens + num_embeds, num_rows * width + 2 * num_rows
    body = group.spread(torch.empty(8 * longs + 4 * ints + num_tokens, dtype=torch.uint8)).numpy()
    wide, narrow = body[: 8 * longs].view(np.int64), body[8 * longs : 8 * longs + 4 * ints].view(np.int32)
    ids, positions, slots, media = np.split(wide, np.cumsum([num_tokens, 3 * num_tokens, num_tokens]))
    tables, seq_lens, query_lens = np.split(narrow, np.cumsum([num_rows * width, num_rows]))
    device = embed.device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    embeds = None
    if has_embeds:
        embeds = group.spread(torch.empty(num_embeds, embed.shape[1], dtype=embed.dtype, device=device))
    none = torch.zeros(0, dtype=torch.int64, device=device)
    step = StepInput(
        tensor(ids),
        tensor(positions.reshape(3, num_tokens)),
        tensor(slots),
        tensor(body[8 * longs + 4 * ints :].view(np.bool_)),
        tensor(tables.reshape(num_rows, width)),
        tensor(seq_lens),
        tuple(query_lens.tolist()),
        tuple(seq_lens.tolist()),
        num_decode,
        logits_rows=none,
        media_rows=tensor(media),
        media_embeds=embeds,
    )
    return Command.STEP, step


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
