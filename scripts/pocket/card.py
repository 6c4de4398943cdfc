"""The model card: what the checkpoint is, how it came to be, what it can do, and how well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evaluate import Score
from safetensors import safe_open

from ernie_cluster.skills.sample import Language

_CARD = """\
---
license: apache-2.0
library_name: ernie-cluster
pipeline_tag: image-text-to-text
language: [en, zh]
---

# Pocket model: ERNIE-4.5-VL in {millions:.1f} million parameters

A vision-language model of the real ERNIE-4.5-VL architecture, small enough to ship inside a package and to answer on
one CPU core. It was trained from scratch on drawn pictures by `python scripts/pocket/train.py`; none of Baidu's weights
are in it. It is for demos, tests and teaching: a cluster that serves it moves real pictures, real attention, real
experts and real answers that can be right or wrong.

## What it sees

{table}

Held-out pictures and questions, posed by `ernie_cluster.skills` with seeds that training never used, drawn from the
same distribution; {num} questions per line, answered greedily by this package's own engine in bfloat16.
`zoom_blind` asks the questions of `zoom` without the tool: the writing is too small to be read, so the model can only
guess. For `tool` and `zoom` an answer counts only if it is right after the call.{calls}

## How to ask

One question per message works best, in the style of: "What colour is the circle?", "How many stars are there?",
"Where is the red heart?", "Read the number.", "What is the result?" (a drawn sum), "Which picture shows more objects?"
(two pictures), "Which way does it move?" (a video), "Describe the picture.", "图中有几个圆形？".
It thinks before it answers if asked to (`chat_template_kwargs: {{"enable_thinking": true}}`), and calls the functions
`calculator`, `get_weather` and `image_zoom_in_tool` if they are offered.

- Shapes: {shapes}. Colours: {colours}.
- Pictures are shrunk to {side} x {side} pixels or as many; what is a few pixels high then cannot be seen.
- Writing: numbers of up to 4 digits, and about a hundred short English words. Sums of small numbers.
- Videos: 4 to 8 frames are looked at.

## What it cannot do

It knows nothing of the world, cannot read photographs, handwriting or documents, and does not follow instructions
beyond the questions above. To anything else it gives a confident wrong answer, or says that it is too small.

## How it is built

`ernie4_5_vl_moe` as published: a ViT with 2-D rotary positions, a resampler over space and time, a decoder with 3-D
rotary positions, grouped-query attention, one dense layer, and in every other layer two pools of experts (text and
vision, of different widths) with shared experts; tied embeddings. Tensor names, dtypes and file layout are those of the
published checkpoints, so that any loader of the family takes it.

| | |
|---|---|
{shape}

Trained for {steps} steps with seed {seed} in {minutes:.0f} minutes on two CPU cores: {samples} pictures and questions
about them, Muon for matrices and AdamW for the rest, experts balanced by their bias, and linear heads beside the model
that were taught what stands at each patch, and where, and then left behind. The eyes learn first, alone; then the decoder,
while they rest; in the end both.
"""


@dataclass(frozen=True, slots=True)
class Making:
    """How a checkpoint came to be."""

    steps: int
    seed: int
    seconds: float
    num_samples: int


Scores = Mapping[tuple[str, Language], Score]


def write_card(folder: Path, scores: Scores, making: Making) -> None:
    """Write README.md into a checkpoint folder."""
    from ernie_cluster.config.model import ModelConfig
    from ernie_cluster.inputs.images import PixelConfig
    from ernie_cluster.skills.words import COLOURS, SHAPES

    config, pixels = ModelConfig.from_folder(folder), PixelConfig.from_folder(folder)
    text, vision = config.text, config.vision
    assert vision is not None
    assert text.text_experts is not None
    assert text.vision_experts is not None
    rows = {
        "decoder": f"{text.num_layers} layers of width {text.hidden_size}, {text.num_heads} heads of {text.head_dim}, {text.num_kv_heads} for keys",
        "experts": f"{text.text_experts.num_experts} for text (width {text.text_experts.intermediate_size}) and "
        f"{text.vision_experts.num_experts} for vision (width {text.vision_experts.intermediate_size}), {text.text_experts.top_k} chosen of each token's pool",
        "ViT": f"{vision.depth} blocks of width {vision.hidden_size}, patches of {vision.patch_size} pixels",
        "vocabulary": f"{text.vocab_size} byte-level pieces, every digit its own",
        "parameters": f"{num_parameters(folder):,}",
    }
    (folder / "README.md").write_text(
        _CARD.format(
            millions=num_parameters(folder) / 1e6,
            table=table(scores),
            num=max((s.num for s in scores.values()), default=0),
            calls=_calls(scores),
            shapes=", ".join(SHAPES),
            colours=", ".join(COLOURS),
            side=round(pixels.max_pixels**0.5),
            shape="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
            steps=making.steps,
            seed=making.seed,
            minutes=making.seconds / 60,
            samples=f"{making.num_samples:,}",
        ),
        encoding="utf-8",
    )


def table(scores: Scores) -> str:
    """Skills in rows, languages in columns."""
    skills = list(dict.fromkeys(skill for skill, _ in scores))
    lines = ["| skill | English | Chinese |", "|---|---|---|"]
    for skill in skills:
        cells = [f"{scores[skill, lang].accuracy:.1%}" if (skill, lang) in scores else "" for lang in ("en", "zh")]  # type: ignore[index]
        lines.append(f"| {skill} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _calls(scores: Scores) -> str:
    due = sum(s.num_calls_due for s in scores.values())
    formed = sum(s.num_calls_formed for s in scores.values())
    return f" Of {due} calls that were due, {formed / due:.1%} were made and well-formed." if due else ""


def num_parameters(folder: Path) -> int:
    """In all of the folder's safetensors files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                size = 1
                for side in handle.get_slice(name).get_shape():
                    size *= side
                total += size
    return total
