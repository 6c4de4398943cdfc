"""Train the pocket model: a real ERNIE-4.5-VL of 7.4 million parameters that is to see.

The eyes learn their part within a quarter of an hour, the decoder most of its skills within an hour; pointing at
things, and so zooming in, takes longer than that.

    python scripts/pocket/train.py                      # two idle cores, about 90 minutes
    python scripts/pocket/train.py --steps 200          # a quick look: learns to answer, hardly to see
    python scripts/pocket/train.py --resume             # go on after a break

Draws pictures with questions (`ernie_cluster.skills`), trains on them with Muon, writes the checkpoint folder in the
hub's own format, evaluates it on pictures that training never saw, and writes the scores into its model card.
The loss is plotted to `loss.png` in the working folder, beside the resumable state.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each process has one core

import torch
from card import Making, write_card
from evaluate import evaluate
from export import export
from files import write_files
from network import Network
from progress import Progress
from teach import Classroom, Plan
from texts import corpus
from trees import NUM_LABELS, Planter

from ernie_cluster.inputs.chat import ChatProcessor

SHIPPED = Path(__file__).parents[2] / "ernie_cluster" / "data" / "pocket"


def main() -> None:
    """Parse, train, export, evaluate."""
    args = parse()
    keep_memory()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    state = args.work / "state.pt"
    if not (args.resume and (args.work / "config.json").exists()):
        print("training the tokenizer ...", flush=True)
        write_files(args.work, corpus())
    processor = ChatProcessor.from_folder(args.work, served_name="pocket")
    network = Network(processor.config, NUM_LABELS, args.seed)
    room = Classroom(network, Planter(processor), Plan(args.steps, args.eye_steps, args.seed))
    if args.resume and state.exists():
        room.load(state)
    progress = Progress(args.steps, args.work / "loss.png")
    room.run(progress, state)
    progress.close()
    room.optimiser.settle()
    export(network, args.work, args.out)
    scores = evaluate(args.out, args.samples)
    write_card(args.out, scores, Making(args.steps, args.seed, room.seconds, room.num_samples))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4500, help="updates; each sees about 90 questions (default 4500)")
    parser.add_argument("--eye-steps", type=int, default=1000, help="of these, teach the eyes alone (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and lessons (default 0)")
    parser.add_argument(
        "--out", type=Path, default=SHIPPED, help="folder of the checkpoint (default: inside the package)"
    )
    parser.add_argument("--work", type=Path, default=Path("pocket-training"), help="folder of state.pt and loss.png")
    parser.add_argument("--resume", action="store_true", help="go on from state.pt in the working folder")
    parser.add_argument("--samples", type=int, default=200, help="questions per skill in the final evaluation")
    args: argparse.Namespace = parser.parse_args()
    return args


def keep_memory() -> None:
    """Let the C library keep freed memory: asking the system for fresh pages in each step costs a fifth of the time."""
    trim_threshold, mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 30)
    except (OSError, AttributeError):
        pass  # not glibc


if __name__ == "__main__":
    main()
