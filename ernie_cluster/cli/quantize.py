"""`ernie-cluster quantize`: a checkpoint with its decoder's matrices in 8 or 4 bits, which loads fast and takes less disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from ernie_cluster.cli.hub import local_folder
from ernie_cluster.cli.progress import Progress
from ernie_cluster.config.quantization import METHODS

_EXAMPLES = """\
methods:
  wint8   experts and the other linear layers in 8 bits, one scale per output row: half the size, answers as before
  wint4   experts in 4 bits, the other linear layers in 8: a third of the size; compare with `ernie-cluster eval`
  fp8     both in 8-bit floats (e4m3), one scale per 128 x 128 numbers; needs Hopper GPUs or newer ones

Embedding, head, norms, routers, ViT and resampler stay as they are. The result is served like any checkpoint: its
config.json says how it is stored. `serve` can also quantise while it loads (`quantization: wint8` beside a model's path);
a quantised checkpoint saves that time, and the disk.

examples:
  ernie-cluster quantize /models/ERNIE-4.5-VL-28B-A3B-PT /models/28b-wint4 --method wint4
  ernie-cluster quantize baidu/ERNIE-4.5-VL-28B-A3B-PT /models/28b-wint8      fetched from the hub, in 8 bits
  ernie-cluster plan --model 28b --gpu rtx4090-24g --quantization wint4       does it fit then?
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument("source", metavar="IN", help="checkpoint folder, or a repository of the Hugging Face hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; absent, or empty")
    parser.add_argument("--method", choices=list(METHODS), default="wint8", help="see below (default wint8)")


def main(args: argparse.Namespace) -> int:
    from ernie_cluster.cli.quantize_run import check_out, quantise  # torch

    method = METHODS[args.method]
    check_out(args.out)
    folder = Path(local_folder(args.source, Progress()))
    before, after = quantise(folder, args.out, method)
    print(f"{args.out}: {after / 1e9:.2f} GB as {method.name}, from {before / 1e9:.2f} GB")
    return 0
