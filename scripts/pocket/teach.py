"""The training loop: two processes draw, learn, and update one network together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from batch import NUM_TOKENS, Batch, Tree, make_batch
from lessons import draw_group
from network import Network
from optimiser import Optimiser
from torch import Tensor, multiprocessing
from torch.nn import functional
from trees import Planter

NUM_PROCESSES = 2
"""Fixed, as it is part of what the result depends on."""

WARM_UP, COOL_DOWN = 0.02, 0.35
"""Shares of the steps in which the learning rate rises, and falls to zero."""

BALANCE_RATE = 0.004
"""By how much an expert's bias moves per step towards an even load."""

SCAFFOLD_WEIGHT = 0.3


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast."""

    steps: int
    seed: int
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    checkpoint_every_s: float = 180.0

    def rate(self, step: int) -> float:
        """Share of the full learning rate at a step, counted from 0."""
        done = step / self.steps
        return min(1.0, (step + 1) / (WARM_UP * self.steps + 1), (1 - done) / COOL_DOWN)


@dataclass(frozen=True, slots=True)
class Report:
    """What one step of one process came to."""

    step: int
    loss: float
    scaffold_loss: float
    accuracy: float
    """Share of answers' tokens that were foreseen."""
    num_samples: int
    seconds: float


class Classroom:
    """What the processes share: network, optimiser state, step counter.

    Args:
        network: trained in place.
        planter: makes trees of samples.
        plan: how long and how fast.
    """

    def __init__(self, network: Network, planter: Planter, plan: Plan) -> None:
        self.network, self.planter, self.plan = network, planter, plan
        self.optimiser = Optimiser(network, NUM_PROCESSES)
        sparse = sorted(network.config.text.sparse_layers)
        assert network.config.text.text_experts is not None
        self.loads = torch.zeros(
            NUM_PROCESSES, len(sparse), 2, network.config.text.text_experts.num_experts
        ).share_memory_()
        self.biases = [network.decoder.layers[i].mlp.router.bias for i in sparse]
        self.first_step = 0

    def save(self, path: Path, next_step: int) -> None:
        """Write all that is needed to go on; the file is replaced whole."""
        state = {
            "step": next_step,
            "network": self.network.state_dict(),
            "momentum": self.optimiser.momentum,
            "variance": self.optimiser.variance,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path)
        self.network.load_state_dict(state["network"])
        self.optimiser.momentum.copy_(state["momentum"])
        self.optimiser.variance.copy_(state["variance"])
        self.first_step = state["step"]

    def run(self, report: Callable[[Report], None], checkpoint: Path) -> None:
        """Train to the end. Rank 0 is this process: it reports and writes checkpoints; the other is its child."""
        context = multiprocessing.get_context("fork")
        barrier = context.Barrier(NUM_PROCESSES)
        children = [
            context.Process(target=self._work, args=(rank, barrier), daemon=True) for rank in range(1, NUM_PROCESSES)
        ]
        for child in children:
            child.start()
        self._work(0, barrier, report, checkpoint)
        for child in children:
            child.join()

    def _work(
        self, rank: int, barrier: Any, report: Callable[[Report], None] | None = None, checkpoint: Path | None = None
    ) -> None:
        torch.set_num_threads(1)
        self.optimiser.attach(rank)
        batches = self._batches(rank)
        last_saved = time.monotonic()
        for step in range(self.first_step, self.plan.steps):
            start = time.monotonic()
            self.optimiser.clear(rank)
            batch = next(batches)
            loss, scaffold_loss, accuracy = lesson(self.network, batch)
            (loss + SCAFFOLD_WEIGHT * scaffold_loss).backward()  # type: ignore[no-untyped-call]
            for i, load in enumerate(self.network.loads.values()):
                self.loads[rank, i] = load
            barrier.wait()
            rate = self.plan.rate(step)
            self.optimiser.update(rank, step + 1, self.plan.muon_rate * rate, self.plan.adam_rate * rate)
            if rank == 0:
                self._balance(rate)
            barrier.wait()
            if report is not None:
                seconds = time.monotonic() - start
                report(
                    Report(
                        step, loss.item(), scaffold_loss.item(), accuracy, batch.num_samples * NUM_PROCESSES, seconds
                    )
                )
            if checkpoint is not None and time.monotonic() - last_saved > self.plan.checkpoint_every_s:
                self.save(checkpoint, step + 1)
                last_saved = time.monotonic()
        if checkpoint is not None:
            self.save(checkpoint, self.plan.steps)

    def _balance(self, rate: float) -> None:
        """Move the biases that decide who is chosen: up for idle experts, down for busy ones."""
        for i, bias in enumerate(self.biases):
            load = self.loads[:, i].sum(0)
            bias.data += BALANCE_RATE * rate * torch.sign(load.mean(-1, keepdim=True) - load)

    def _batches(self, rank: int) -> Iterator[Batch]:
        """Batches of as many trees as fit; each process and each start of the run draws seeds of its own."""
        assert self.network.config.token_ids is not None
        pool = self.network.config.token_ids.vision_pool
        seed = ((self.plan.seed * NUM_PROCESSES + rank) << 32) + (self.first_step << 16) % (1 << 32)
        trees: list[Tree] = []
        num_tokens = 0
        while True:
            tree = self.planter.plant(draw_group(seed % (1 << 40)))
            seed += 1
            if num_tokens + len(tree.ids) > NUM_TOKENS:
                yield make_batch(trees, pool)
                trees, num_tokens = [], 0
            if len(tree.ids) <= NUM_TOKENS:
                trees.append(tree)
                num_tokens += len(tree.ids)


def lesson(network: Network, batch: Batch) -> tuple[Tensor, Tensor, float]:
    """Loss on the answers, loss of the scaffold, and the share of answers' tokens that were foreseen."""
    logits, patches, embeds = network(batch)
    each = functional.cross_entropy(logits, batch.target_ids, reduction="none")
    weights = batch.target_weights
    loss = (each * weights).sum() / weights.sum()
    is_right = (logits.detach().argmax(-1) == batch.target_ids) & (weights > 0)
    return loss, _scaffold_loss(network, batch, patches, embeds), is_right.sum().item() / (weights > 0).sum().item()


def _scaffold_loss(network: Network, batch: Batch, patches: Tensor, embeds: Tensor) -> Tensor:
    heads = network.scaffold
    seen, counted = patches.float(), embeds.float()
    is_thing = batch.names > 0
    total = torch.zeros(())
    # most patches are empty: each kind counts by the square root of its frequency, roughly
    weight = torch.ones(heads["names"].out_features)
    weight[0] = 0.3
    if (batch.names >= 0).any():
        total = total + functional.cross_entropy(heads["names"](seen), batch.names, weight, ignore_index=-1)
    if (batch.colours > 0).any():
        only_things = batch.colours.masked_fill(batch.colours == 0, -1)
        total = total + functional.cross_entropy(heads["colours"](seen), only_things, ignore_index=-1)
    if is_thing.any():
        boxes = heads["boxes"](seen[is_thing])
        total = total + functional.smooth_l1_loss(boxes, batch.boxes[is_thing], beta=0.1)
    if (batch.counts >= 0).any():
        total = total + functional.cross_entropy(heads["counts"](counted), batch.counts, ignore_index=-1)
    return total if math.isfinite(total.item()) else torch.zeros((), requires_grad=True)
