"""The shipped pocket model, asked through the package's own engine: it must see, call tools, and be itself.

The floors lie well below the scores of the model card, because each is measured on a few questions only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import ernie_cluster
from ernie_cluster.skills.catalog import HELD_OUT, draw
from ernie_cluster.skills.sample import Language

SCRIPTS = Path(__file__).parents[2] / "scripts" / "pocket"
FOLDER = Path(ernie_cluster.__file__).parent / "data" / "pocket"
MAX_BYTES = 16 * 10**6

pytestmark = pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason="no pocket checkpoint in this tree")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> None:
    """The training scripts import each other by name."""
    sys.path.insert(0, str(SCRIPTS))
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def respondent() -> object:
    from answers import Respondent

    return Respondent(FOLDER)


FLOORS: list[tuple[str, Language, float]] = [
    *((skill, language, 0.75) for skill in ("colour", "shape", "talk") for language in ("en", "zh")),
    ("count", "en", 0.5),
    ("count", "zh", 0.5),
    ("describe", "en", 0.6),
    ("describe", "zh", 0.55),
    ("compare", "en", 0.55),
    ("read", "en", 0.6),
    ("read", "zh", 0.6),
    ("arithmetic", "en", 0.4),
    ("arithmetic", "zh", 0.35),
    ("motion", "en", 0.7),
    ("tool", "en", 0.4),
    ("ground", "en", 0.55),
    ("zoom", "en", 0.5),
]
"""Skill, language, least share of right answers among 16 held-out questions."""


@pytest.mark.parametrize(("skill", "language", "floor"), FLOORS)
def test_it_answers(respondent: object, skill: str, language: Language, floor: float) -> None:
    from evaluate import score

    samples = [draw(skill, seed, language) for seed in range(HELD_OUT + 5000, HELD_OUT + 5016)]
    wrong: list[object] = []
    result = score(respondent, samples, wrong)  # type: ignore[arg-type]
    assert result.accuracy >= floor, wrong[:3]


def test_it_fits_into_a_pocket() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MAX_BYTES


def test_training_and_serving_compute_the_same() -> None:
    """The batched tree of training foresees the very tokens that the engine then generates."""
    from answers import Respondent
    from batch import make_batch
    from network import Network
    from trees import NUM_LABELS, Planter, expected_text

    from ernie_cluster.model.checkpoint import Checkpoint
    from ernie_cluster.model.weights import load_decoder, load_vision

    respondent = Respondent(FOLDER)
    processor = respondent.processor
    network = Network(processor.config, NUM_LABELS)
    load_decoder(network.decoder, processor.config, Checkpoint(FOLDER), has_vision_experts=True)
    load_vision(network.vision, processor.config, Checkpoint(FOLDER))
    samples = [
        draw(skill, HELD_OUT + i) for skill in ("colour", "describe", "compare", "motion", "tool") for i in range(3)
    ]
    said = respondent.ask(samples)
    assert processor.config.token_ids is not None
    num_checked = 0
    for sample, (text, calls, _) in zip(samples, said, strict=True):
        if calls or sample.enable_thinking or sample.tool_call is not None:
            continue
        from dataclasses import replace

        echo = replace(sample, answer=text)
        tree = Planter(processor).plant([echo])
        with torch.no_grad():
            logits = network(make_batch([tree], processor.config.token_ids.vision_pool)).logits
        expected = processor.tokenizer.encode(expected_text(echo), allow_special=True)
        foreseen = logits.argmax(-1)[: len(expected)].tolist()
        assert foreseen == expected, (text, processor.tokenizer.decode(foreseen))
        num_checked += 1
    assert num_checked >= 8
