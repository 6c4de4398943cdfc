"""From a folder to what a model is shown of it: the command, the index, the eyes of a tiny model; no Ray."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ernie_cluster.actors.encoder import Encoder
from ernie_cluster.actors.ingress import make_processor, make_searcher
from ernie_cluster.builtin.base import Search
from ernie_cluster.builtin.pictures import Shown
from ernie_cluster.cli.main import main
from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.image_search import ImageSearchConfig
from ernie_cluster.config.presets import PRESETS
from ernie_cluster.errors import ConfigError, EngineFailed
from ernie_cluster.request import MediaInput
from tests.fakes import FakeBackend
from tests.tiny import CPU, encode, make_image, tiny_folder, tiny_vision

T = TypeVar("T")


@cache
def eyes() -> Encoder:
    return Encoder(tiny_vision(), CPU)


class Seeing(FakeBackend):
    """Embeds with the tiny model's own eyes."""

    async def embed(self, model: str, media: MediaInput, timeout_s: float) -> NDArray[np.float32]:
        return eyes().pooled(media)


def test_a_picture_s_vector_is_the_mean_of_its_embeddings() -> None:
    for seed in range(3):
        media = make_image(seed, (1, 4, 2 + 2 * seed))
        mean = encode(media).double().mean(0)
        for _ in range(2):  # the second time from the cache
            vector = eyes().pooled(media)
            assert (vector.dtype, vector.shape) == (np.float32, mean.shape)
            np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_broken_weights_are_no_vector() -> None:
    class Broken(torch.nn.Module):
        dtype = torch.float32

        def forward(self, patches: torch.Tensor, grids: object) -> torch.Tensor:
            return torch.full((len(patches) // 4, 8), torch.nan)

    with pytest.raises(EngineFailed, match="check the checkpoint"):
        Encoder(Broken(), CPU).pooled(make_image(0))  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Some pictures, and what looks like one."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "deep/c.webp")):
        image = Image.new("RGB", (112, 84), (90 * i, 40, 200 - 90 * i))
        ImageDraw.Draw(image).ellipse((10, 10, 40 + 20 * i, 60), fill=(200, 90 * i, 30))
        image.save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def configured(index: Path, folder: Path, **more: int) -> ClusterConfig:
    search = ImageSearchConfig(str(index), str(folder))
    config = PRESETS["tiny-mixed"](tiny_folder())
    (model,) = config.models
    return dataclasses.replace(
        config,
        models=(dataclasses.replace(model, **more),),
        api=ApiConfig(image_search=search, decode_processes=0),
    )


def index_of(folder: Path, out: Path) -> int:
    settings = {"models.0.preset": "tiny-mixed", "models.0.path": tiny_folder(), "api.decode_processes": "0"}
    sets = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
    return main(["index", str(folder), "--out", str(out), *sets])


async def inline(work: Callable[[], T]) -> T:
    return work()


def test_the_command_makes_what_the_server_searches(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "photos.index"
    assert index_of(photos, out) == 0
    first = out.read_bytes()
    said = capsys.readouterr()
    assert "3 pictures, 3 of them new, 1 files left out" in said.out
    assert "'broken.png' is left out" in said.err
    assert "4/4 pictures" in said.err
    assert index_of(photos, out) == 0
    assert "3 pictures, 0 of them new" in capsys.readouterr().out
    assert out.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("photos.index")] == ["photos.index"]

    config = configured(out, photos)
    searcher = make_searcher(config, {"tiny": make_processor(config, "tiny")})
    assert searcher is not None
    run: Callable[[Callable[[], T]], Awaitable[T]] = inline
    for name in ("a.png", "b.jpg", "deep/c.webp"):
        fetched = {("image", "http://x/"): (photos / name).read_bytes()}
        wanted = Search(Shown("http://x/"), 2)
        found = asyncio.run(
            searcher.find(wanted, fetched, b"", backend=Seeing(), run=run, timeout_s=9)  # type: ignore[arg-type]
        )
        best, second = found.result.details["found"]
        assert best == {"name": name, "score": pytest.approx(1.0, abs=1e-3)}
        assert second["score"] < best["score"]
        assert found.content["image", f"image-search:{name}"] == (photos / name).read_bytes()


def test_a_foreign_index_stops_the_start(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos.index"
    index_of(photos, out)
    for config, words in (
        (configured(out, photos, image_max_pixels=50_000), "max_pixels 50000"),
        (configured(tmp_path / "none", photos), "cannot be read"),
        (configured(out, tmp_path / "none"), r"api\.image_search\.folder: .*/none is no folder"),
    ):
        processor = make_processor(config, "tiny")
        with pytest.raises(ConfigError, match=words) as refused:
            make_searcher(config, {"tiny": processor})
        assert str(refused.value).startswith("api.image_search.")
    plain = dataclasses.replace(configured(out, photos), api=ApiConfig())
    assert make_searcher(plain, {}) is None


def test_the_command_does_not_mix_the_vectors_of_two_models(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "photos.index"
    index_of(photos, out)
    before = out.read_bytes()
    sets = ["--set", "models.0.preset=tiny-mixed", "--set", f"models.0.path={tiny_folder()}"]
    more = ["--set", "models.0.image_max_pixels=50000", "--set", "api.decode_processes=0"]
    assert main(["index", str(photos), "--out", str(out), *sets, *more]) == 2
    assert "made with pictures of" in capsys.readouterr().err
    assert out.read_bytes() == before
