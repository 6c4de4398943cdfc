"""Muon for matrices, AdamW for the rest, shared by several processes.

Parameters, gradients and state lie in shared memory. Each process writes its gradients into a row of its own; then each
updates its part of the parameters with the mean of all rows. Nothing is sent and nothing is computed twice.
Sources: Jordan et al., "Muon" (2024), for the orthogonalised momentum and its five Newton-Schulz steps.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_STEPS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315
MOMENTUM = 0.95
ADAM_BETAS, ADAM_EPS = (0.9, 0.98), 1e-8
WEIGHT_DECAY = 0.2
AVERAGE = 0.99
"""What remains of the running mean of the parameters after a step."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter's numbers lie in the flat buffers."""

    name: str
    parameter: nn.Parameter
    start: int

    @property
    def end(self) -> int:
        return self.start + self.parameter.numel()


class Optimiser:
    """Owns gradients and state of all trained parameters of a network.

    Args:
        network: its parameters are moved to shared memory.
        num_processes: rows of gradients.
    """

    def __init__(self, network: nn.Module, num_processes: int) -> None:
        self.slots: list[Slot] = []
        start = 0
        for name, p in network.named_parameters():
            p.data.share_memory_()
            if p.requires_grad:
                self.slots.append(Slot(name, p, start))
                start += p.numel()
        self.gradients = torch.zeros(num_processes, start).share_memory_()
        self.momentum = torch.zeros(start).share_memory_()
        self.variance = torch.zeros(start).share_memory_()
        self.average = torch.zeros(start).share_memory_()
        """Running mean of the parameters: what is shipped."""
        self.start_average()

    def attach(self, rank: int) -> None:
        """Let this process's backward passes add to its row of gradients."""
        for slot in self.slots:
            slot.parameter.grad = self.gradients[rank, slot.start : slot.end].view_as(slot.parameter)

    @torch.no_grad()
    def start_average(self) -> None:
        """Let the running mean begin at the parameters as they are."""
        for slot in self.slots:
            self.average[slot.start : slot.end] = slot.parameter.view(-1)

    @torch.no_grad()
    def settle(self) -> None:
        """Replace the parameters by their running mean, after the last update."""
        for slot in self.slots:
            slot.parameter.copy_(self.average[slot.start : slot.end].view_as(slot.parameter))

    def clear(self, rank: int) -> None:
        self.gradients[rank].zero_()

    @torch.no_grad()
    def update(self, rank: int, step: int, muon_rate: float, adam_rate: float, parts: tuple[str, ...] = ("",)) -> None:
        """Update this process's part of the parameters; all processes must have written their gradients.

        Args:
            step: counted from 1.
            parts: how names of parameters begin that are to move; those without gradients must not.
        """
        size = len(self.gradients)
        moving = [slot for slot in self.slots if slot.name.startswith(parts)]
        for slots in _by_shape([slot for slot in moving if _is_matrix(slot)])[rank::size]:
            self._update_matrices(slots, muon_rate)
        for slot in [slot for slot in moving if not _is_matrix(slot)][rank::size]:
            self._update_other(slot, step, adam_rate)

    def _update_matrices(self, slots: list[Slot], rate: float) -> None:
        directions = []
        for slot in slots:
            gradient = self.gradients[:, slot.start : slot.end].mean(0)
            momentum = self.momentum[slot.start : slot.end]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            directions.append(gradient.lerp(momentum, MOMENTUM).view(-1, *slot.parameter.shape[-2:]))
        rows, columns = slots[0].parameter.shape[-2:]
        turned = _orthogonal(torch.cat(directions)).float() * max(1.0, rows / columns) ** 0.5
        for slot, direction in zip(slots, turned.split([len(d) for d in directions]), strict=True):
            slot.parameter.mul_(1 - rate * WEIGHT_DECAY).add_(direction.view_as(slot.parameter), alpha=-rate)
            self._follow(slot)

    def _update_other(self, slot: Slot, step: int, rate: float) -> None:
        gradient = self.gradients[:, slot.start : slot.end].mean(0)
        first, second = self.momentum[slot.start : slot.end], self.variance[slot.start : slot.end]
        first.lerp_(gradient, 1 - ADAM_BETAS[0])
        second.lerp_(gradient.square(), 1 - ADAM_BETAS[1])
        scale = (second / (1 - ADAM_BETAS[1] ** step)).sqrt_().add_(ADAM_EPS)
        slot.parameter.view(-1).addcdiv_(first, scale, value=-rate / (1 - ADAM_BETAS[0] ** step))
        self._follow(slot)

    def _follow(self, slot: Slot) -> None:
        self.average[slot.start : slot.end].lerp_(slot.parameter.view(-1), 1 - AVERAGE)


def _by_shape(matrices: list[Slot]) -> list[list[Slot]]:
    """Slots of equal shape together, in two halves each, largest work first."""
    groups: dict[tuple[int, ...], list[Slot]] = defaultdict(list)
    for slot in matrices:
        groups[tuple(slot.parameter.shape)].append(slot)
    halves = [group[i::2] for group in groups.values() for i in range(2) if group[i::2]]
    return sorted(halves, key=lambda g: -sum(s.parameter.numel() * min(s.parameter.shape[-2:]) for s in g))


def _is_matrix(slot: Slot) -> bool:
    """Trained by Muon: inner products of the model; not embeddings, routers, and what lies beside the model."""
    outside = ("embed", "router", "scaffold")
    return slot.parameter.ndim >= 2 and not any(word in slot.name for word in outside)


def _orthogonal(x: Tensor) -> Tensor:
    """[B, m, n] -> nearly the nearest matrices with orthogonal rows or columns, bfloat16."""
    is_tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if is_tall else x
    x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).to(torch.bfloat16)
    for _ in range(_STEPS):
        a = torch.bmm(x, x.transpose(1, 2))
        b = torch.baddbmm(a, a, a, beta=_B, alpha=_C)
        x = torch.baddbmm(x, b, x, beta=_A)
    return x.transpose(1, 2) if is_tall else x
