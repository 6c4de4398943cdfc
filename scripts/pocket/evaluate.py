"""Accuracy per skill on pictures that training never saw, and the table of the model card."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from answers import Respondent

from ernie_cluster.config.quantization import METHODS, Quantization
from ernie_cluster.skills.catalog import CHINESE_SKILLS, HELD_OUT, SKILLS, draw
from ernie_cluster.skills.judge import judge
from ernie_cluster.skills.sample import Language, Sample, ToolCall
from ernie_cluster.skills.tools import next_turn

_AT_ONCE = 50


@dataclass(slots=True)
class Score:
    """Of one skill in one language."""

    num: int = 0
    num_right: int = 0
    """Last answer right, and the call before it where one was due."""
    num_calls_due: int = 0
    num_calls_formed: int = 0
    """Calls that name a tool on offer and could be run."""
    num_calls_right: int = 0

    @property
    def accuracy(self) -> float:
        return self.num_right / max(1, self.num)


Reply = tuple[str, list[ToolCall], str]


def score(respondent: Respondent, samples: Sequence[Sample], wrong: list[tuple[Sample, Reply]] | None = None) -> Score:
    """Ask all of them; run the tools that are called, and ask again."""
    out = Score(num=len(samples))
    later: list[Sample] = []
    for sample, reply in zip(samples, respondent.ask(samples), strict=True):
        text, calls, reasoning = reply
        is_right = judge(sample, text, calls)
        if sample.tool_call is None:
            out.num_right += is_right
        else:
            following = next_turn(sample, calls, reasoning=reasoning)
            out.num_calls_due += 1
            out.num_calls_right += is_right
            out.num_calls_formed += following is not None
            if following is not None:
                later.append(following)
        if wrong is not None and not is_right:
            wrong.append((sample, reply))
    if later:
        out.num_right += score(respondent, later, wrong).num_right
    return out


def evaluate(
    folder: Path,
    num_samples: int,
    skills: Sequence[str] = SKILLS,
    quantization: Literal["auto", Quantization] = "auto",
    kv_dtype: str = "auto",
) -> dict[tuple[str, Language], Score]:
    """Score every skill; prints a line for each, and one for all questions together."""
    respondent = Respondent(folder, quantization, kv_dtype)
    languages: tuple[Language, ...] = ("en", "zh")
    out = {}
    for skill in skills:
        for language in languages[: 2 if skill in CHINESE_SKILLS else 1]:
            start, total = time.monotonic(), Score()
            for first in range(0, num_samples, _AT_ONCE):
                seeds = range(HELD_OUT + first, HELD_OUT + min(first + _AT_ONCE, num_samples))
                part = score(respondent, [draw(skill, seed, language) for seed in seeds])
                for name in Score.__slots__:
                    setattr(total, name, getattr(total, name) + getattr(part, name))
            out[skill, language] = total
            calls = f"  calls formed {total.num_calls_formed}/{total.num_calls_due}, right {total.num_calls_right}" * bool(total.num_calls_due)  # fmt: skip
            print(f"{skill:12} {language} {total.accuracy:7.1%}{calls}  ({time.monotonic() - start:.0f} s)", flush=True)
    num, num_right = sum(s.num for s in out.values()), sum(s.num_right for s in out.values())
    print(f"{'all':12}    {num_right / max(1, num):7.1%}  ({num_right} of {num})")
    return out


def main() -> None:
    """Evaluate a checkpoint folder."""
    parser = argparse.ArgumentParser(description="Evaluate a pocket checkpoint on held-out pictures.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=200, help="questions per skill and language")
    parser.add_argument("--skills", nargs="*", default=SKILLS)
    parser.add_argument("--quantization", choices=["auto", "none", *METHODS], default="auto", help="of the decoder")
    parser.add_argument("--kv-dtype", choices=["auto", "int8", "fp8"], default="auto", help="of K and V")
    args = parser.parse_args()
    torch.set_num_threads(1)
    evaluate(args.folder, args.samples, args.skills, args.quantization, args.kv_dtype)


if __name__ == "__main__":
    main()
