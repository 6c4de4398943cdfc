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
WEIGHT_DECAY = 0.02


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

    def attach(self, rank: int) -> None:
        """Let this process's backward passes add to its row of gradients."""
        for slot in self.slots:
            slot.parameter.grad = self.gradients[rank, slot.start : slot.end].view_as(slot.parameter)

    def clear(self, rank: int) -> None:
        self.gradients[rank].zero_()

    @torch.no_grad()
    def update(self, rank: int, step: int, muon_rate: float, adam_rate: float) -> None:
        """Update this process's part of the parameters; all processes must have written their gradients.

        Args:
            step: counted from 1.
        """
        size = len(self.gradients)
        for slots in self._matrices()[rank::size]:
            self._update_matrices(slots, muon_rate)
        for slot in [s for s in self.slots if not _is_matrix(s)][rank::size]:
            self._update_other(slot, step, adam_rate)

    def _matrices(self) -> list[list[Slot]]:
        """Slots of equal shape together, largest work first."""
        by_shape: dict[tuple[int, ...], list[Slot]] = defaultdict(list)
        for slot in filter(_is_matrix, self.slots):
            by_shape[tuple(slot.parameter.shape)].append(slot)
        halves = [group[i::2] for group in by_shape.values() for i in range(2) if group[i::2]]
        return sorted(halves, key=lambda g: -sum(s.parameter.numel() * min(s.parameter.shape[-2:]) for s in g))

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

    def _update_other(self, slot: Slot, step: int, rate: float) -> None:
        gradient = self.gradients[:, slot.start : slot.end].mean(0)
        first, second = self.momentum[slot.start : slot.end], self.variance[slot.start : slot.end]
        first.lerp_(gradient, 1 - ADAM_BETAS[0])
        second.lerp_(gradient.square(), 1 - ADAM_BETAS[1])
        scale = (second / (1 - ADAM_BETAS[1] ** step)).sqrt_().add_(ADAM_EPS)
        slot.parameter.view(-1).addcdiv_(first, scale, value=-rate / (1 - ADAM_BETAS[0] ** step))


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
