"""`ernie-cluster plan`: does it fit, how many tokens of KV are left, how fast could it be. Needs no GPU and no checkpoint."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from ernie_cluster.cli.config import add_config_arguments, read_config
from ernie_cluster.cli.plan_report import Report, as_json, as_text
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.convert import unknown_key
from ernie_cluster.config.engine import GPU_BLOCK_TOKENS, EngineConfig
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.presets import PRESETS
from ernie_cluster.config.published import PUBLISHED
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.sizing.check import pools_of, remedy, setting_of, size_deployment
from ernie_cluster.policy.sizing.formats import FORMATS
from ernie_cluster.policy.sizing.gpus import GPUS, Gpu, gpu
from ernie_cluster.policy.sizing.layout import Wish, nearest, place
from ernie_cluster.policy.sizing.memory import IMAGE_MAX_PIXELS, KV_TYPES
from ernie_cluster.policy.sizing.pools import Setting

_EXAMPLES = f"""\
Two ways to ask:
  --model, --gpu, --count    a model on so many GPUs: the plan chooses gangs and replicas, fills what is left with KV,
                             and prints the configuration
  CONFIG, --gpu              a configuration as it is: checks what `serve` would check

A gang of tp x dp GPUs makes one replica. Attention, MLPs and embedding are split over tp and repeated dp times; experts
are spread over all tp x dp. tp must divide heads and KV heads, tp x dp the experts. With --layout split one half of the
GPUs prefills and the other decodes; decode holds no vision experts.

When it does not fit, the plan says which sum is too large and what would fit: other weights, more GPUs, larger ones,
shorter sequences. Exit code 0: it fits, 1: it does not, 2: the question makes no sense.

Times are rooflines, the best that the makers' figures allow at assumed fractions; nothing here was measured on a GPU.

models:  {", ".join(PUBLISHED)}, or a checkpoint folder (its config.json is enough)
GPUs:    {", ".join(GPUS)}

examples:
  ernie-cluster plan --model 28b --gpu h100-80g
  ernie-cluster plan --model 424b --gpu h100-80g --count 8 --quantization wint4
  ernie-cluster plan --model 424b --gpu h200-141g --count 16 --layout split --max-model-len 131072
  ernie-cluster plan cluster.yaml --gpu a100-80g --json
"""

_ALIASES = {"bf16": "bfloat16", "fp32": "float32"}
_FREE = ("count", "layout", "tp", "dp", "max_model_len", "max_num_seqs", "max_batch_tokens", "image_max_pixels")
"""Options that a configuration answers by itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_config_arguments(parser)
    parser.add_argument("--config", dest="config_option", metavar="CONFIG", help="the same as CONFIG")
    parser.add_argument("--model", help="published model or checkpoint folder; beside CONFIG: the shape of its models")
    parser.add_argument("--gpu", help="kind of GPU, see below")
    parser.add_argument("--count", metavar="N", type=int, help="GPUs in all (default 1)")
    parser.add_argument("--layout", choices=("mixed", "split"), help="one pool, or prefill and decode (default mixed)")
    parser.add_argument(
        "--tp", metavar="N", type=int, help="tensor-parallel ranks (default: the smallest gang that fits)"
    )
    parser.add_argument("--dp", metavar="N", type=int, help="data-parallel groups of them")
    parser.add_argument(
        "--quantization",
        choices=[*_ALIASES, *FORMATS],
        metavar="FORMAT",
        help="bf16 (default), fp8 (blocks of 128 x 128), wint8, or wint4: experts in 4 bits, other linear layers in 8",
    )
    parser.add_argument(
        "--kv-dtype", choices=[*_ALIASES, *KV_TYPES], metavar="TYPE", help="bf16 (default), fp8 or int8"
    )
    parser.add_argument("--max-model-len", metavar="N", type=int, help="longest sequence (default 32768)")
    parser.add_argument("--max-num-seqs", metavar="N", type=int, help="sequences at a time (default 64)")
    parser.add_argument("--max-batch-tokens", metavar="N", type=int, help="tokens per step (default 4096)")
    parser.add_argument("--image-max-pixels", metavar="N", type=int, help="largest picture (default 4842768)")
    parser.add_argument(
        "--video-frames", metavar="N", type=int, default=0, help="frames of the longest video (default 0: no videos)"
    )
    parser.add_argument("--json", action="store_true", help="all numbers, of each rank, for programs")


def main(args: argparse.Namespace) -> int:
    args.config = args.config or args.config_option
    reports = _configured(args) if args.config or args.overrides else [_wished(args)]
    print(json.dumps(as_json(reports), indent=1) if args.json else as_text(reports))
    return 0 if all(r.fits for r in reports) else 1


def _configured(args: argparse.Namespace) -> list[Report]:
    """One report per model of a configuration."""
    given = [name for name in _FREE if getattr(args, name) is not None]
    if given:
        raise ConfigError(f"--{given[0].replace('_', '-')} beside a configuration, which says it itself: use --set")
    config = read_config(args)
    kind = _gpu_of(args, config)
    reports = []
    for deployment in config.models:
        setting = setting_of(deployment, _shape(args.model or deployment.path), kind)
        setting = _stored(replace(setting, video_frames=args.video_frames), args)
        pools = size_deployment(deployment, setting)
        misfit = next((p for p in pools if p.problem), None)
        reports.append(
            Report(
                title=deployment.name,
                setting=setting,
                pools=pools,
                problem="" if misfit is None else misfit.problem,
                nearest=() if misfit is None else ((remedy(misfit), ""),),
            )
        )
    return reports


def _wished(args: argparse.Namespace) -> Report:
    """The report on `--model`."""
    if args.model is None or args.gpu is None:
        raise ConfigError("name a configuration, or --model and --gpu; `ernie-cluster plan --help` has examples")
    shape = _shape(args.model)
    engine = _engine(args, shape)
    setting = Setting(
        shape,
        engine,
        FORMATS["bfloat16"],
        "bfloat16",
        gpu(args.gpu),
        _image_max_pixels(args),
        args.video_frames,
        fills_kv=True,
    )
    wish = Wish(_stored(setting, args), 1 if args.count is None else args.count, args.layout or "mixed", _dims(args))
    placement = place(wish)
    return Report(
        title=args.model,
        setting=wish.setting,
        pools=placement.pools,
        problem=placement.problem,
        nearest=tuple(nearest(wish)) if placement.problem else (),
        configs=placement.configs,
        num_gpus=wish.count,
        num_idle=placement.num_idle,
    )


def _shape(model: str) -> ModelConfig:
    """Of a published model or a checkpoint folder."""
    if model in PUBLISHED:
        return PUBLISHED[model]
    if Path(model).is_dir() or "/" in model:
        return ModelConfig.from_folder(model)
    raise unknown_key("--model", model, PUBLISHED, what="model")


def _engine(args: argparse.Namespace, shape: ModelConfig) -> EngineConfig:
    bound = shape.text.max_position_embeddings
    length = min(32_768, bound) if args.max_model_len is None else args.max_model_len
    if length > bound:
        raise ConfigError(f"--max-model-len {length}: the model was trained for {bound} positions at most")
    seqs = 64 if args.max_num_seqs is None else args.max_num_seqs
    tokens = max(4096, seqs) if args.max_batch_tokens is None else args.max_batch_tokens
    return EngineConfig(block_size=GPU_BLOCK_TOKENS, max_batch_tokens=tokens, max_num_seqs=seqs, max_model_len=length)


def _image_max_pixels(args: argparse.Namespace) -> int:
    """As asked, else as the model's preset has it."""
    if args.image_max_pixels is not None:
        return int(args.image_max_pixels)
    preset = PRESETS.get(args.model)
    return (preset("-").models[0].image_max_pixels if preset else None) or IMAGE_MAX_PIXELS


def _dims(args: argparse.Namespace) -> ParallelDims | None:
    if args.tp is None and args.dp is None:
        return None
    return ParallelDims(1 if args.tp is None else args.tp, 1 if args.dp is None else args.dp)


def _stored(setting: Setting, args: argparse.Namespace) -> Setting:
    """The setting with what the options say of weights and KV."""
    weights = _ALIASES.get(args.quantization, args.quantization) or setting.weights.name
    kv = _ALIASES.get(args.kv_dtype, args.kv_dtype) or setting.kv
    return replace(setting, weights=FORMATS[weights], kv=kv)


def _gpu_of(args: argparse.Namespace, config: ClusterConfig) -> Gpu | None:
    needs_gpu = any(p.num_gpus for m in config.models for p in pools_of(m))
    if needs_gpu and args.gpu is None:
        raise ConfigError(f"some pools have GPUs: say which by --gpu; known: {', '.join(GPUS)}")
    return gpu(args.gpu) if needs_gpu else None
