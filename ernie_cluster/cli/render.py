"""`ernie-cluster render`: the files that clusters are made of. Needs no cluster, no GPU and no checkpoint of a preset."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from ernie_cluster import __version__
from ernie_cluster.cli.config import add_config_arguments, read_config
from ernie_cluster.errors import ConfigError
from ernie_cluster.render import files
from ernie_cluster.render.machines import MACHINES
from ernie_cluster.render.options import Options
from ernie_cluster.render.pods import MODELS_CLAIM
from ernie_cluster.render.ray_up import Where
from ernie_cluster.render.setup import SETUPS, Setup, config_setup, local_setup, preset_setup

_EXAMPLES = f"""\
One configuration becomes groups of equal nodes, one per pool and one for the API: a replica is a gang of tp x dp ranks and
lies on one node as a whole, so nodes have at least its GPUs. Labels lead each pool to its nodes. The same groups are written
as what a target reads:

  serve     an application for `serve deploy FILE`, on any Ray cluster whose nodes have the labels
  ray-up    a cluster for `ray up FILE`, on machines of --cloud, and the application beside it
  kuberay   a RayService and what belongs around it, for `kubectl apply -k`

And for any of them, without a preset:

  monitoring  alerts for Prometheus, and dashboards for Grafana (kuberay brings both along)

Without --out it prints, several files as one stream of documents. Each file opens with what to change first. Those of the
presets lie in deploy/ and k8s/. A CONFIG of your own is rendered alike, where its checkpoints can be read: for kuberay with
api.host 0.0.0.0, api.listen_on every_node and a volume claim {MODELS_CLAIM} with the checkpoints.

presets:   {", ".join(SETUPS)}
machines:  {"; ".join(f"{cloud}: {', '.join(m.name for m in known if m.gpus)}" for cloud, known in MACHINES.items())}
           (kuberay takes those of on-prem: it asks for the GPUs that they have)

examples:
  ernie-cluster render --preset 28b --target serve
  ernie-cluster render --preset both --target ray-up --cloud aws --out .
  ernie-cluster render --preset 28b --target ray-up --cloud gcp --machine a3-highgpu-8g
  ernie-cluster render --preset 424b --target kuberay --image registry.example.com/ernie-cluster:{__version__}-cuda --out .
  ernie-cluster render cluster.yaml --name vision --target kuberay --rdma rdma/hca_shared_devices_a --out .
  ernie-cluster render --target monitoring --out .
  ernie-cluster plan --model 424b --gpu h200-141g --count 16 --layout split     what fits, before it is rendered
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_config_arguments(parser)
    parser.add_argument("--preset", choices=list(SETUPS), metavar="NAME", help="a ready-made setup, see below")
    parser.add_argument("--target", choices=get_args(files.Target), help="what shall read the files")
    parser.add_argument(
        "--cloud",
        choices=["local-cpu", *files.CLOUDS],
        help="of --target ray-up: where the machines are (default on-prem; local-cpu: this one, for pocket)",
    )
    parser.add_argument(
        "--machine",
        dest="machines",
        metavar="KIND",
        action="append",
        default=[],
        help="take these machines with GPUs only; may be given more than once (default: the smallest that fit)",
    )
    parser.add_argument("--name", metavar="NAME", help="of a CONFIG's files and objects (default: the file's name)")
    parser.add_argument(
        "--models",
        metavar="FOLDER",
        default="/models",
        help="where nodes have the presets' checkpoints (default /models)",
    )
    parser.add_argument(
        "--image",
        metavar="IMAGE",
        default="",
        help=f"container image (default ernie-cluster:{__version__}-cuda or -cpu)",
    )
    parser.add_argument(
        "--package",
        metavar="WHAT",
        default="",
        help=f"what pip installs, a wheel's URL for example (default ernie-cluster[gpu]=={__version__})",
    )
    parser.add_argument(
        "--rdma", metavar="RESOURCE", default="", help="Kubernetes' name of RDMA adapters (default: NCCL goes by TCP)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="write files below this folder, over those that are there")
    parser.add_argument("--all", action="store_true", help="all files of the repository, for --out")


def main(args: argparse.Namespace) -> int:
    found = files.checked_in(__version__) if args.all else _wanted(args)
    if args.out is None:
        sys.stdout.write(_stream(found))
        return 0
    for path, file in found.items():
        target = Path(args.out, path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(file.text, encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"--out {args.out}: {target} cannot be written: {e.strerror}") from None
        print(target)
    return 0


def _wanted(args: argparse.Namespace) -> files.Files:
    """What one target of one setup consists of; raises ConfigError when the options do not go together."""
    if args.target is None:
        raise ConfigError(f"--target is missing: one of {', '.join(get_args(files.Target))}")
    if args.cloud is not None and args.target != "ray-up":
        raise ConfigError(f"--cloud {args.cloud} beside --target {args.target}: it says where `ray up` gets machines")
    if args.target == "monitoring":
        return _monitoring(args)
    where: Where = args.cloud or "on-prem"
    setup = _setup(args, is_local=where == "local-cpu")
    options = Options(__version__, args.image, args.package, args.models, args.rdma)
    if args.target == "serve":
        return files.serve_files(setup)
    if args.target == "kuberay":
        return files.kuberay_files(setup, options, args.machines)
    return files.ray_up_files(setup, where, options, args.machines)


def _monitoring(args: argparse.Namespace) -> files.Files:
    """Raises ConfigError where a setup is named: the files are the same for all."""
    if args.preset is not None or args.config or args.overrides:
        raise ConfigError("--target monitoring is the same for every setup: leave out --preset, CONFIG and --set")
    return files.monitoring_files()


def _setup(args: argparse.Namespace, *, is_local: bool) -> Setup:
    has_config = bool(args.config or args.overrides)
    if has_config == (args.preset is not None):
        raise ConfigError("name a --preset, or else a CONFIG; `ernie-cluster render --help` has examples")
    if has_config:
        return config_setup(read_config(args), args.name or (Path(args.config).stem if args.config else "custom"))
    if not is_local and not (args.preset in files.LOCAL and args.target == "serve"):
        return preset_setup(args.preset, args.models)
    if args.preset not in files.LOCAL:
        raise ConfigError(f"--cloud local-cpu starts one machine without GPUs; {args.preset} needs more, take pocket")
    return local_setup(args.preset, args.models)


def _stream(found: files.Files) -> str:
    """One file as it is; of several those that are objects, one stream under their comments."""
    if len(found) == 1:
        return next(iter(found.values())).text
    kept = {path: f for path, f in found.items() if not path.endswith("kustomization.yaml")}
    return "---\n".join(f"# {path}\n{file.text}" for path, file in kept.items())
