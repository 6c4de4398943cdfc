"""`ernie-cluster demo`: the three pools on this machine with the packaged model, and four questions about pictures."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path

from ernie_cluster.cli.local import at_port, serving
from ernie_cluster.cli.progress import Progress
from ernie_cluster.cli.serve import wait_for_signal
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.presets import POCKET, pocket, pocket_mixed
from ernie_cluster.errors import ErnieClusterError

REQUEST_TIMEOUT_S = 60.0
_UNKNOWN_SIZE = (120, 24)  # of what is no terminal

_EPILOG = """\
Serves the packaged model (7.4 million parameters, trained by scripts/pocket) on the CPU of this machine: one vision,
one prefill and one decode replica. Then asks it, through the official openai client, four things: what is in a picture,
a sum to think about, where something is, and a number so small that it has to zoom in by a tool call. The pictures are
drawn here, so the demo knows what is right.

examples:
  ernie-cluster demo
  ernie-cluster demo --once --keep pictures/
  ernie-cluster demo --mixed --port 9000
  ernie-cluster demo --model /models/another-small-checkpoint
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--once", action="store_true", help="stop after the answers instead of staying up")
    parser.add_argument("--port", type=int, default=8000, help="HTTP port (default 8000)")
    parser.add_argument("--mixed", action="store_true", help="prefill and decode in one replica, without a hand-over")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="another checkpoint, served as 'demo': a folder, or owner/name[@revision] on the Hugging Face hub",
    )
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="folder for the pictures (default: demo/ in the user's cache)"
    )


def main(args: argparse.Namespace) -> int:
    progress = Progress()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ernie_cluster"
    folder = args.keep or cache / "demo"
    config = configure(args.model, is_mixed=args.mixed, port=args.port)
    with serving(config, progress) as url:
        folder.mkdir(parents=True, exist_ok=True)
        progress(f"ready; the pictures go to {folder}")
        walk_through(url, config.models[0].name, folder, progress)
        if not args.once:
            print(how_to_go_on(url, config.models[0].name, folder), flush=True)
            wait_for_signal()
    return 0


def configure(model: str | None, *, is_mixed: bool, port: int) -> ClusterConfig:
    """What the demo serves: the packaged checkpoint, or the one in the folder `model`."""
    config = (pocket_mixed if is_mixed else pocket)(model or POCKET)
    if model is not None:
        config = dataclasses.replace(config, models=(dataclasses.replace(config.models[0], name="demo"),))
    return at_port(config, port)


def walk_through(url: str, model: str, folder: Path, progress: Progress) -> None:
    """The questions, and the stages of the first one's journey; raises ErnieClusterError when one is not answered."""
    import openai

    from ernie_cluster.cli.demo_pictures import steps
    from ernie_cluster.cli.demo_walk import Walk, timeline_lines

    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without ✓ is no reason to fail
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=REQUEST_TIMEOUT_S, max_retries=0)
    walk = Walk(client, model, folder, sys.stdout)
    for number, step in enumerate(steps(), start=1):
        asked_s = progress.elapsed_s
        try:
            heard = walk.take(number, step)
        except openai.OpenAIError as e:
            raise ErnieClusterError(f"the model did not answer: {e}") from None
        if number == 1:
            print(
                "\n".join(["", *timeline_lines(heard.timeline, shutil.get_terminal_size(_UNKNOWN_SIZE).columns)]),
                flush=True,
            )
            progress(f"the first token came {asked_s + (heard.first_s or 0.0):.1f} s after the start")


def how_to_go_on(url: str, model: str, folder: Path) -> str:
    """What to try while the server is up."""
    return f"""
  The server stays up until Ctrl-C:

    {url}             a page to try it in a browser
    {url}/v1          OpenAI API, model {model!r}
    {url}/metrics     Prometheus metrics
    {url}/ready       which pools are ready

  In another terminal:

    ernie-cluster chat --url {url} --image {folder / "1-look.png"}
    ernie-cluster eval --url {url} --samples 20
"""
