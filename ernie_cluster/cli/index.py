"""`ernie-cluster index`: vectors of a folder's pictures, for the tool `image_search`.

Runs the vision encoder of a served model in this process; no server is needed. What an earlier run has computed is
taken over by the files' content, so a second run is quick, and one that was broken off goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

from ernie_cluster.cli.config import add_config_arguments, read_config
from ernie_cluster.cli.local import check_packaged
from ernie_cluster.cli.progress import Bar, Progress
from ernie_cluster.cli.remote import printable
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.load import ENV_PREFIX
from ernie_cluster.config.presets import pocket_mixed
from ernie_cluster.errors import ConfigError, InvalidRequest
from ernie_cluster.inputs.image_folder import ImageFolder, is_plain
from ernie_cluster.inputs.image_index import Entry, ImageIndex, Maker, Vector
from ernie_cluster.request import MediaInput

SAVE_S = 300.0
"""Between two drafts of an unfinished index."""

_EXAMPLES = """\
examples:
  ernie-cluster index photos/ --out photos.index                  with the packaged model
  ernie-cluster index photos/ cluster.yaml --out photos.index     with the model that this configuration serves
  ernie-cluster serve cluster.yaml --set api.image_search.index=$PWD/photos.index --set api.image_search.folder=$PWD/photos

PNG, JPEG, WebP and GIF files are taken, in subfolders, too; symbolic links are not followed. An index belongs to one
model and its picture sizes. When pictures have come, gone or changed, run it again and restart the server.
"""

Embed = Callable[[bytes], Vector]
"""The vector of a file's picture; raises InvalidRequest for what is none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument("folder", metavar="FOLDER", help="with pictures")
    add_config_arguments(parser)
    parser.add_argument(
        "--out", metavar="INDEX", type=Path, required=True, help="file to write, or to bring up to date"
    )
    parser.add_argument("--model", metavar="NAME", help="served model (default: the first that sees)")


def main(args: argparse.Namespace) -> int:
    is_configured = args.config or args.overrides or any(name.startswith(ENV_PREFIX) for name in os.environ)
    config = read_config(args) if is_configured else pocket_mixed()
    deployment = choose(config, args.model)
    check_packaged(deployment.path)
    folder = ImageFolder(args.folder, config.api.max_image_bytes)
    names = folder.names()
    local = LocalModel(config, deployment.name)
    maker = Maker.of(deployment.path, local.processor.pixels)
    draft = Path(f"{args.out}.part")
    known = {**vectors_in(draft, maker), **vectors_in(args.out, maker)}
    builder = Builder(folder, maker, known, local.embed, draft)
    bar = Bar("pictures", len(names))
    try:
        builder.add(names, bar)
    except BaseException:
        builder.save_draft()
        raise
    finally:
        bar.close()
    if not builder.rows:
        raise ConfigError(f"{args.folder}: no picture that can be indexed; the index would be empty")
    ImageIndex(maker, builder.rows).save(args.out)
    draft.unlink(missing_ok=True)
    skipped = f", {builder.num_skipped:,} files left out" if builder.num_skipped else ""
    print(f"{args.out}: {len(builder.rows):,} pictures, {builder.num_new:,} of them new{skipped}")
    return 0


def choose(config: ClusterConfig, name: str | None) -> ModelDeployment:
    """The model that makes the index; raises ConfigError when it cannot see."""
    if name is None:
        found = config.search_model or next((m for m in config.models if m.has_vision_pool), None)
    else:
        found = config.model(name)
    if found is None or not found.has_vision_pool:
        raise ConfigError(f"{name or 'the configuration'} has no vision pool; name a model that has one")
    return found


def vectors_in(path: Path, maker: Maker) -> Mapping[str, Vector]:
    """Vectors of an earlier run by content; raises ConfigError for a file that is not `maker`'s index."""
    return ImageIndex.load(path, maker).known if path.exists() else {}


class Builder:
    """Makes the rows of an index.

    Args:
        folder: of the pictures.
        maker: of the vectors.
        known: vectors by SHA-256 of their files.
        embed: makes those that are not known.
        draft: file for what is done when it ends too early.
        clock: seconds from any start.
    """

    def __init__(
        self,
        folder: ImageFolder,
        maker: Maker,
        known: Mapping[str, Vector],
        embed: Embed,
        draft: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._maker, self._embed = folder, maker, embed
        self._known = dict(known)
        self._draft, self._clock, self._saved_s = draft, clock, clock()
        self.rows: list[tuple[Entry, Vector]] = []
        self.num_new = 0
        self.num_skipped = 0

    def add(self, names: Iterable[str], bar: Bar) -> None:
        """A row for each picture that can be used; why the others cannot, the bar says."""
        for name in names:
            try:
                self.rows.append(self._row(name))
            except InvalidRequest as e:
                self.num_skipped += 1
                bar.say(printable(f"{name!r} is left out: {e.message}"))
            bar.step()
            if self._clock() - self._saved_s > SAVE_S:
                self.save_draft()

    def save_draft(self) -> None:
        """Keep what is new for the next run."""
        self._saved_s = self._clock()
        if self.num_new:
            ImageIndex(self._maker, self.rows).save(self._draft)

    def _row(self, name: str) -> tuple[Entry, Vector]:
        if not is_plain(name):
            raise InvalidRequest("its name cannot be shown; rename it")
        content = self._folder.read(name)
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._known:
            self._known[digest] = self._embed(content)
            self.num_new += 1
        return Entry(name, digest), self._known[digest]


class LocalModel:
    """The eyes of a served model, in this process; weights are read when the first picture comes.

    Args:
        config: of the application.
        name: of the model.
    """

    def __init__(self, config: ClusterConfig, name: str) -> None:
        from ernie_cluster.actors.ingress import make_processor, media_mapper

        self._config, self._name = config, name
        self.processor = make_processor(config, name, media_mapper(config))

    def embed(self, content: bytes) -> Vector:
        """An `Embed`."""
        return self._pooled(self.processor.picture({"url": "", "content": content}))

    @cached_property
    def _pooled(self) -> Callable[[MediaInput], Vector]:
        from ernie_cluster.actors.encoder import Encoder

        Progress()(f"loading the vision encoder of {self._name}")
        return Encoder.load(self._config, self._name, os.cpu_count() or 1).pooled
