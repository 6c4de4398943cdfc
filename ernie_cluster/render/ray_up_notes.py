"""What the cluster files of `ray up` open with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ernie_cluster.render.groups import NodeGroup
from ernie_cluster.render.options import DASHBOARD_PORT
from ernie_cluster.render.ray_up import Where, addresses
from ernie_cluster.render.setup import Setup

_TITLES: Mapping[Where, str] = {
    "local-cpu": "this machine, no GPU",
    "on-prem": "machines of your own",
    "aws": "Amazon EC2",
    "gcp": "Google Cloud",
}
_CHANGES: Mapping[Where, str] = {
    "local-cpu": """\
  auth.ssh_user             you, who can `ssh 127.0.0.1`; without ssh and rsync run the last of head_start_ray_commands by hand
  head_start_ray_commands   the path of `ray`, where a login shell does not find it, as in a virtual environment""",
    "on-prem": """\
  provider        addresses of your machines, and the same ones in worker_start_ray_commands, with their pools
  auth            who may log in to all of them by ssh and use sudo; they need NVIDIA's driver and {models}
  setup_commands  where pip finds ernie-cluster: `render --package` takes a wheel""",
    "aws": """\
  provider        region and zone where you have a quota for these instances, or a capacity reservation
  ImageId         an Ubuntu 24.04 image with NVIDIA's driver, as the Deep Learning Base GPU AMI of that region
  CHANGE-ME       the file system with the checkpoints, mounted as {models}
  setup_commands  where pip finds ernie-cluster: `render --package` takes a wheel""",
    "gcp": """\
  provider        project, region and zone where you have a quota, or a reservation, for these machines
  CHANGE-ME       the project, and the file system with the checkpoints, mounted as {models}
  node_config     networks, and how a3 machines are had: a3-highgpu-1g as Spot or Flex-start only, a3-ultragpu with RDMA networks
  setup_commands  where pip finds ernie-cluster: `render --package` takes a wheel""",
}
_RUN = """\
Run, from the folder above this one:
  ray get-auth-token --generate                  # once: what the nodes know each other by
  ernie-cluster key --name me > key.txt          # the key itself stands in here, and nowhere else
  grep '^- ' key.txt >> keys.yaml                # its entry, which holds only the hash; clients' keys are read from there
  ray up deploy/{file}
  ray exec deploy/{file} 'RAY_AUTH_MODE=token ~/ernie/bin/serve deploy ~/serve.yaml'
  ray exec deploy/{file} 'RAY_AUTH_MODE=token ~/ernie/bin/serve status'
Change the configuration, without `ray up`, which starts Ray on the head anew:
  ray rsync-up deploy/{file} deploy/serve.{name}.yaml '~/serve.yaml'
  ray exec deploy/{file} 'RAY_AUTH_MODE=token ~/ernie/bin/serve deploy ~/serve.yaml'
Take all of it away:
  ray down deploy/{file}"""
_RUN_LOCAL = """\
Run, from the folder above this one:
  ray get-auth-token --generate       # once
  ray up deploy/{file}      # or, without ssh, the last of head_start_ray_commands
  export RAY_AUTH_MODE=token
  serve deploy deploy/serve.{name}.yaml
  serve status                        # RUNNING, and then
  curl 127.0.0.1:{port}/ready
  serve deploy deploy/serve.{name}.yaml       # again, after a change
  serve shutdown --yes                # takes the application away
  ray stop                            # ends all that Ray runs here for you, as `ray up` does before it starts"""


def header(setup: Setup, groups: Sequence[NodeGroup], where: Where, models_folder: str) -> str:
    """What to change first, what it starts, and how to run it."""
    file = f"ray-up.{where}.{setup.name}.yaml"
    run = _RUN_LOCAL if where == "local-cpu" else _RUN
    parts = [
        f"Ray cluster for preset {setup.name} on {_TITLES[where]}.",
        "Change first:\n" + _CHANGES[where].format(models=models_folder),
        run.format(file=file, name=setup.name, port=setup.config.api.port),
    ]
    if where == "on-prem":
        nodes = [f"  {address}  {g.name}, as large as {g.machine}" for address, g in addresses(groups).items()]
        parts.insert(2, "\n".join(["Nodes, beside the head, which runs nothing of ours:", *nodes]))
    elif groups:
        nodes = [f"  {g.name}: {g.nodes} x {g.machine}" for g in groups]
        parts.insert(2, "\n".join(["Nodes, beside the head, which runs nothing of ours:", *nodes]))
    parts.append(
        f"The dashboard is at port {DASHBOARD_PORT} of the head. Written by `ernie-cluster render --target ray-up`."
    )
    return "\n\n".join(parts)
