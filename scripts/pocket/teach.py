"""The training loop: two processes draw, learn, and update one network together."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from batch import NUM_TOKENS, Batch, Tree, make_batch
from crowds import draw_crowd
from lessons import draw_group
from network import Network
from optimiser import Optimiser
from torch import Tensor, multiprocessing
from torch.nn import functional
from trees import Planter

from ernie_cluster.skills.catalog import HELD_OUT

NUM_PROCESSES = 2
"""Fixed, as it is part of what the result depends on."""

WARM_UP, LEAST_RATE = 20, 0.02
"""Steps in which the learning rate rises at the start of a phase, and the share of it that is left at the end."""

TOGETHER = 0.15
"""Share of the lessons, the last ones, in which the eyes learn, too: before that what they know would be unlearned by
a decoder that does not know yet what to look for."""

EASE, LEAST_EASE, EASY_PART = 0.9, 0.1, 0.6
"""Share of easy lessons to begin with, in the end, and after which part of all lessons the end is reached."""

BALANCE_RATE = 0.004
"""By how much an expert's bias moves per step towards an even load."""

SCAFFOLD_WEIGHT = 0.3

_PLACE_UNIT = 5.0
"""Places are weighed in fifths of a picture."""

LESSONS_PER_LOOK = 4
"""As long as the eyes learn, every fourth tree teaches them alone, which costs little as it has no text."""

PICTURES_PER_LOOK = 40
"""Of each process, while the eyes are taught."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast."""

    steps: int
    """In all."""
    eye_steps: int
    """The first of them teach the eyes alone: nothing can be learned about pictures that are not seen yet."""
    seed: int
    muon_rate: float = 0.015
    adam_rate: float = 0.003
    eye_muon_rate: float = 0.02
    checkpoint_every_s: float = 180.0

    def rate(self, step: int) -> float:
        """Share of the full learning rate at a step, counted from 0."""
        first, last = (0, self.eye_steps) if step < self.eye_steps else (self.eye_steps, self.steps)
        return min((step - first + 1) / WARM_UP, max(LEAST_RATE, (last - step) / (last - first)))

    def parts(self, step: int) -> tuple[str, ...]:
        """How the names of the parameters begin that are taught at a step."""
        if step < self.eye_steps:
            return ("vision", "scaffold")
        return ("decoder", "scaffold.deep") if step < self.steps - TOGETHER * (self.steps - self.eye_steps) else ("",)

    def ease(self, step: int) -> float:
        """Share of easy lessons: most at first, few in the end."""
        done = (step - self.eye_steps) / max(1, self.steps - self.eye_steps)
        return max(LEAST_EASE, EASE * (1 - done / EASY_PART))


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
        self.first_step = self.step = 0
        self.seconds, self.num_samples = 0.0, 0

    def save(self, path: Path, next_step: int) -> None:
        """Write all that is needed to go on; the file is replaced whole."""
        state = {
            "step": next_step,
            "network": self.network.state_dict(),
            "momentum": self.optimiser.momentum,
            "variance": self.optimiser.variance,
            "average": self.optimiser.average,
            "seconds": self.seconds,
            "num_samples": self.num_samples,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path)
        self.network.load_state_dict(state["network"])
        self.optimiser.momentum.copy_(state["momentum"])
        self.optimiser.variance.copy_(state["variance"])
        self.optimiser.average.copy_(state["average"])
        self.first_step = state["step"]
        self.seconds, self.num_samples = state["seconds"], state["num_samples"]

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
        batches, looks = self._batches(rank), self._looks(rank)
        last_saved = time.monotonic()
        for step in range(self.first_step, self.plan.steps):
            start, self.step = time.monotonic(), step
            self.optimiser.clear(rank)
            is_eyes, parts = step < self.plan.eye_steps, self.plan.parts(step)
            batch = next(looks if is_eyes else batches)
            if is_eyes:
                loss, scaffold_loss, accuracy = look(self.network, batch)
            else:
                loss, scaffold_loss, accuracy = lesson(self.network, batch, are_eyes_taught=parts == ("",))
            (loss + SCAFFOLD_WEIGHT * scaffold_loss).backward()  # type: ignore[no-untyped-call]
            for i, load in enumerate(self.network.loads.values()):
                self.loads[rank, i] = load
            barrier.wait()
            rate = self.plan.rate(step)
            muon_rate = self.plan.eye_muon_rate if is_eyes else self.plan.muon_rate
            self.optimiser.update(rank, step + 1, muon_rate * rate, self.plan.adam_rate * rate, parts)
            if rank == 0 and not is_eyes:
                self._balance(rate)
            barrier.wait()
            if report is not None:
                seconds = time.monotonic() - start
                self.seconds += seconds
                self.num_samples += batch.num_samples * NUM_PROCESSES
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
        trees: list[Tree] = []
        num_tokens = 0
        for seed in itertools.count(self._first_seed(rank)):
            ease = self.plan.ease(self.step)
            is_look = seed % LESSONS_PER_LOOK == 0 and self.plan.parts(self.step) == ("",)
            tree = (
                self.planter.plant_picture(draw_crowd(seed)) if is_look else self.planter.plant(draw_group(seed, ease))
            )
            if num_tokens + len(tree.ids) > NUM_TOKENS:
                yield make_batch(trees, pool)
                trees, num_tokens = [], 0
            if len(tree.ids) <= NUM_TOKENS:
                trees.append(tree)
                num_tokens += len(tree.ids)

    def _looks(self, rank: int) -> Iterator[Batch]:
        """Batches of pictures without questions."""
        assert self.network.config.token_ids is not None
        seed = self._first_seed(rank)
        while True:
            trees = [self.planter.plant_picture(draw_crowd(seed + i)) for i in range(PICTURES_PER_LOOK)]
            seed += PICTURES_PER_LOOK
            yield make_batch(trees, self.network.config.token_ids.vision_pool)

    def _first_seed(self, rank: int) -> int:
        return (((self.plan.seed * NUM_PROCESSES + rank) << 32) + (self.first_step << 16)) % HELD_OUT


def look(network: Network, batch: Batch) -> tuple[Tensor, Tensor, float]:
    """As `lesson`, but for the eyes alone."""
    patches, embeds = network.see(batch)
    return torch.zeros(()), _scaffold_loss(network, batch, patches, embeds), 0.0


def lesson(network: Network, batch: Batch, *, are_eyes_taught: bool) -> tuple[Tensor, Tensor, float]:
    """Loss on the answers, loss of the scaffold, and the share of answers' tokens that were foreseen."""
    thoughts = network(batch, are_eyes_taught=are_eyes_taught)
    each = functional.cross_entropy(thoughts.logits, batch.target_ids, reduction="none")
    weights = batch.target_weights
    loss = (each * weights).sum() / weights.sum()
    is_right = (thoughts.logits.detach().argmax(-1) == batch.target_ids) & (weights > 0)
    scaffold_loss = _place_loss(network, batch, "deep_places", thoughts.deep.float()[: len(batch.media_rows)])
    if len(thoughts.aims):
        read = network.scaffold["deep_boxes"](thoughts.found.float())
        places = functional.smooth_l1_loss(read * _PLACE_UNIT, batch.pointers.boxes * _PLACE_UNIT, beta=0.1)
        scaffold_loss = scaffold_loss - thoughts.aims.mean() + places
    if are_eyes_taught:
        scaffold_loss = scaffold_loss + _scaffold_loss(network, batch, thoughts.patches, thoughts.embeds)
    return loss, scaffold_loss, is_right.sum().item() / (weights > 0).sum().item()


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
    total = total + _token_loss(network, batch, counted)
    if is_thing.any():
        boxes = heads["boxes"](seen[is_thing])
        total = total + functional.smooth_l1_loss(boxes, batch.boxes[is_thing], beta=0.1)
    if (batch.counts >= 0).any():
        total = total + functional.cross_entropy(heads["counts"](counted), batch.counts, ignore_index=-1)
    return total if math.isfinite(total.item()) else torch.zeros((), requires_grad=True)


def _token_loss(network: Network, batch: Batch, embeds: Tensor) -> Tensor:
    """The same for the resampler: an embedding must tell what stands at each of its four patches.

    Frames of videos are left out: their patches have no labels.
    """
    heads, blocks = network.scaffold, batch.first_frame
    names, colours = batch.names.view(-1, 4)[blocks], batch.colours.view(-1, 4)[blocks]
    is_known = (names >= 0).all(1)
    if not is_known.any():
        return torch.zeros(())
    seen, names, colours = embeds[is_known], names[is_known].view(-1), colours[is_known].view(-1)
    num_names, num_colours = heads["names"].out_features, heads["colours"].out_features
    weight = torch.ones(num_names)
    weight[0] = 0.3
    total = functional.cross_entropy(heads["token_names"](seen).view(-1, num_names), names, weight)
    is_coloured = colours > 0
    if is_coloured.any():
        logits = heads["token_colours"](seen).view(-1, num_colours)[is_coloured]
        total = total + functional.cross_entropy(logits, colours[is_coloured])
    if (names > 0).any():
        wanted = batch.boxes.view(-1, 4, 4)[blocks][is_known].view(-1, 4)[names > 0]
        read = heads["token_boxes"](seen).view(-1, 4)[names > 0]
        total = total + functional.smooth_l1_loss(read, wanted, beta=0.1)
    return total + _place_loss(network, batch, "token_places", embeds)


def _place_loss(network: Network, batch: Batch, head: str, seen: Tensor) -> Tensor:
    """How wrong a head is about the edges of the things at each token, as fractions of the picture; `seen` is [n, D]."""
    blocks = batch.first_frame[: len(seen)]
    is_thing = batch.names.view(-1, 4)[blocks] > 0
    if not is_thing.any():
        return torch.zeros(())
    wanted = batch.places.view(-1, 4, 4)[blocks][is_thing]
    read = network.scaffold[head](seen).view(-1, 4, 4)[is_thing]
    return functional.smooth_l1_loss(read * _PLACE_UNIT, wanted * _PLACE_UNIT, beta=0.1)
