"""`ernie-cluster demo`: the three pools on this machine with a toy model, and one question about a picture.

The model has the real structure and random weights, so its answer means nothing; the journey is the real one.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ernie_cluster import __version__
from ernie_cluster.cli.progress import Progress
from ernie_cluster.cli.serve import base_url, check_port, wait_for_signal

_QUESTION = "What is in this picture?"
_BAR_WIDTH = 36


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "examples:\n  ernie-cluster demo --once\n  ernie-cluster demo --mixed --port 9000\n"
    parser.add_argument("--once", action="store_true", help="stop after the answer instead of staying up")
    parser.add_argument("--port", type=int, default=8000, help="HTTP port (default 8000)")
    parser.add_argument("--mixed", action="store_true", help="prefill and decode in one replica, without a hand-over")
    parser.add_argument(
        "--keep",
        metavar="DIR",
        type=Path,
        help="folder for the toy checkpoint and the picture (default: the user's cache)",
    )


def main(args: argparse.Namespace) -> int:
    progress = Progress()
    folder = args.keep or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ernie_cluster"
    check_port("127.0.0.1", args.port)
    checkpoint = folder / f"tiny-{__version__}"
    if not (checkpoint / "config.json").exists():
        progress(f"writing a toy checkpoint to {checkpoint}")
        from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint

        write_tiny_checkpoint(checkpoint)
    picture = folder / "demo.png"
    picture.write_bytes(draw_picture())

    progress("loading Ray")
    from ernie_cluster.actors import launch
    from ernie_cluster.config.presets import PRESETS

    config = PRESETS["tiny-mixed" if args.mixed else "tiny"](str(checkpoint))
    config = dataclasses.replace(config, api=dataclasses.replace(config.api, port=args.port))
    launch.check(config)
    launch.start_ray(config, None, progress)
    try:
        launch.start(config, progress, timeout_s=120)
        url = base_url(config.api.host, config.api.port)
        progress(f"ready; asking about {picture}")
        _ask(f"{url}/v1", config.models[0].name, picture, progress)
        if not args.once:
            _say_how_to_go_on(url, config.models[0].name)
            wait_for_signal()
    finally:
        launch.stop(progress)
    return 0


def draw_picture() -> bytes:
    """A red circle, a blue square and a green triangle on white, 224 x 168, as PNG."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (224, 168), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((14, 40, 84, 110), fill=(210, 40, 40))
    draw.rectangle((98, 70, 152, 124), fill=(40, 80, 200))
    draw.polygon(((164, 130), (214, 130), (189, 60)), fill=(30, 150, 70))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _ask(base: str, model: str, picture: Path, progress: Progress) -> None:
    """One streamed question through the official client, and the stages of its journey."""
    import openai

    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    client = openai.OpenAI(base_url=base, api_key="none", timeout=60)
    stream = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": _QUESTION}],
            }
        ],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=24,
        temperature=0,
        extra_body={"include_timeline": True},
    )
    print(f"\n  {_QUESTION}\n  ", end="", flush=True)
    first_s, usage = 0.0, None
    timeline: list[dict[str, Any]] = []
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first_s = first_s or progress.elapsed_s
            print(chunk.choices[0].delta.content.replace("\n", "\n  "), end="", flush=True)
        usage = chunk.usage or usage
        timeline = getattr(chunk, "timeline", None) or timeline
    print("\n\n  (a toy model with random weights: the words mean nothing, the way they took is real)\n")
    if usage is not None:
        print(f"  {usage.prompt_tokens} prompt tokens, {usage.completion_tokens} output tokens\n")
    print("\n".join(timeline_lines(timeline)), flush=True)
    progress(f"the first token came {first_s:.1f} s after the start")


def timeline_lines(timeline: Sequence[dict[str, Any]]) -> list[str]:
    """The stages of a journey as a table with bars on one time axis."""
    if not timeline:
        return []
    start = min(s["start_s"] for s in timeline)
    total = max(s["start_s"] + s["duration_s"] for s in timeline) - start or 1e-9
    lines = [f"  {'stage':<11}{'start':>9}{'took':>10}  {'':<{_BAR_WIDTH}}"]
    for span in timeline:
        left = int((span["start_s"] - start) / total * _BAR_WIDTH)
        width = max(1, round(span["duration_s"] / total * _BAR_WIDTH))
        bar = (" " * left + "#" * width)[:_BAR_WIDTH]
        detail = [
            f"{v:,} {k}" if isinstance(v, int) else str(v)
            for k, v in span.items()
            if k not in ("name", "start_s", "duration_s")
        ]
        when, took = (span["start_s"] - start) * 1e3, span["duration_s"] * 1e3
        lines.append(f"  {span['name']:<11}{when:>6.1f} ms{took:>7.1f} ms  {bar:<{_BAR_WIDTH}}  {', '.join(detail)}")
    return lines


def _say_how_to_go_on(url: str, model: str) -> None:
    print(
        f"""
  The server stays up until Ctrl-C:

    {url}/v1          OpenAI API, model {model!r}
    {url}/metrics     Prometheus metrics
    {url}/ready       which pools are ready

  In another terminal:

    ernie-cluster chat --url {url}/v1
""",
        flush=True,
    )
