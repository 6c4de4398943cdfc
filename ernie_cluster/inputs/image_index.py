"""What is known of a folder's pictures so that those can be found which look alike: a name and a vector for each.

A vector is the mean of what the vision encoder makes of a picture, of length 1, so a dot product is the cosine. The
search is exact. An index is a file of numpy's, without pickles; the same pictures always make the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.errors import ConfigError
from ernie_cluster.inputs.encoder_id import encoder_id
from ernie_cluster.inputs.image_folder import is_plain
from ernie_cluster.inputs.images import PixelConfig

FORMAT = "ernie-cluster image index 1"

Vector = NDArray[np.float32]
"""float32 [width], of length 1."""

_SHA256 = re.compile("[0-9a-f]{64}")
_MAKE_IT = "remove it, and make it anew with `ernie-cluster index`"


@dataclass(frozen=True, slots=True)
class Maker:
    """What made the vectors; those of two makers cannot be compared."""

    encoder: str
    """See `encoder_id`."""
    pixels: str
    """How a picture is resized, as text."""

    @classmethod
    def of(cls, folder: str | Path, pixels: PixelConfig) -> Maker:
        """Of a checkpoint and how it is served; raises CheckpointError."""
        values = {name: value for name, value in asdict(pixels).items() if not name.startswith(("video_", "temporal_"))}
        return cls(encoder_id(folder), ", ".join(f"{name} {value}" for name, value in sorted(values.items())))


class Entry(NamedTuple):
    """A picture of the folder."""

    name: str
    """Relative to the folder, with slashes."""
    sha256: str
    """Of the file, in hexadecimal digits."""


class Hit(NamedTuple):
    """A picture that was found."""

    entry: Entry
    score: float
    """Cosine of the angle between the vectors, at most 1."""


class ImageIndex:
    """Owns the vectors of a folder's pictures.

    Args:
        maker: of all vectors.
        rows: at least one, with different names, in any order.
    """

    def __init__(self, maker: Maker, rows: Iterable[tuple[Entry, Vector]]) -> None:
        ordered = sorted(rows, key=lambda row: row[0].name)
        self.maker = maker
        self.entries = [entry for entry, _ in ordered]
        self.vectors: NDArray[np.float32] = np.stack([vector for _, vector in ordered]).astype(np.float32)
        """[pictures, width]."""
        self.check()

    @classmethod
    def load(cls, path: str | Path, maker: Maker) -> ImageIndex:
        """Read the index that `maker` made.

        Raises:
            ConfigError: there is none, it is broken, or another one made it.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                about, vectors = json.loads(stored["about"].tobytes()), stored["vectors"]
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}, not {FORMAT!r}")
            found = cls(Maker(**about["maker"]), zip(map(_entry, about["entries"]), vectors, strict=True))
        except OSError as e:
            raise ConfigError(f"{path}: cannot be read: {e.strerror or e}; `ernie-cluster index` makes one") from None
        except Exception as e:  # numpy and zipfile raise nearly anything on broken files
            raise ConfigError(f"{path}: no index of pictures, or a broken one ({e}); {_MAKE_IT}") from None
        if found.maker.encoder != maker.encoder:
            raise ConfigError(f"{path}: made with the vision encoder of another model; {_MAKE_IT}")
        if found.maker != maker:
            raise ConfigError(f"{path}: made with pictures of {found.maker.pixels}, not {maker.pixels}; {_MAKE_IT}")
        return found

    def save(self, path: str | Path) -> None:
        """Write the file; whoever reads at the same time sees the old one or the new one, whole."""
        about = {"format": FORMAT, "maker": asdict(self.maker), "entries": self.entries}
        draft = Path(f"{path}.draft")
        with draft.open("wb") as file:
            np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), vectors=self.vectors)
        os.replace(draft, path)

    @property
    def width(self) -> int:
        """Of a vector."""
        return int(self.vectors.shape[1])

    @property
    def known(self) -> dict[str, Vector]:
        """Vector by SHA-256 of the file."""
        return {entry.sha256: vector for entry, vector in zip(self.entries, self.vectors, strict=True)}

    def nearest(self, vector: Vector, count: int) -> list[Hit]:
        """The `count` pictures most like one, best first, or all if there are fewer; equals by name."""
        assert vector.shape == (self.width,), f"a vector of shape {vector.shape} among those of {self.width}"
        scores = self.vectors @ vector
        best = np.argsort(-scores, kind="stable")[:count]
        return [Hit(self.entries[i], min(1.0, float(scores[i]))) for i in best]

    def check(self) -> None:
        """What must hold of any index, whoever wrote the file; raises ValueError."""
        names = [entry.name for entry in self.entries]
        if names != sorted(set(names)):
            raise ValueError("a name stands there twice")
        for entry in self.entries:
            if not is_plain(entry.name) or not _SHA256.fullmatch(entry.sha256):
                raise ValueError(f"an entry is {tuple(entry)!r}")
        if self.vectors.ndim != 2:
            raise ValueError(f"its vectors are of shape {self.vectors.shape}")
        lengths = np.linalg.norm(self.vectors, axis=1)
        if not np.all(np.abs(lengths - 1) < 1e-3):  # NaN is not
            raise ValueError("its vectors are not of length 1")


def _entry(stored: Any) -> Entry:
    name, sha256 = map(str, stored)
    return Entry(name, sha256)
