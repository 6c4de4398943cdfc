from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ernie_cluster.cli.tiny_checkpoint import Form, write_tiny_checkpoint
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.messages import PromptLimits
from ernie_cluster.inputs.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint in either form."""
    forms: tuple[Form, ...] = ("flat", "nested")
    return {form: write_tiny_checkpoint(tmp_path_factory.mktemp(form), form=form) for form in forms}


@pytest.fixture(scope="session")
def tokenizer(folders: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_folder(folders["flat"])


@pytest.fixture(scope="session", params=["flat", "nested"])
def processor(request: pytest.FixtureRequest, folders: dict[str, Path]) -> ChatProcessor:
    return ChatProcessor.from_folder(folders[request.param], served_name="tiny", limits=PromptLimits(max_images=4))


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """File content of a picture."""

    def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def data_url(encoded: Callable[..., bytes]) -> Callable[..., str]:
    """Data URL of a one-coloured picture of a size (width, height)."""

    def url(size: tuple[int, int] = (112, 84), colour: str = "red") -> str:
        content = encoded(Image.new("RGB", size, colour))
        return "data:image/png;base64," + base64.b64encode(content).decode()

    return url


@pytest.fixture(scope="session")
def gif_url(encoded: Callable[..., bytes]) -> Callable[..., str]:
    """Data URL of an animated GIF of frames of a size (width, height), a tenth of a second each."""

    def url(num_frames: int = 4, size: tuple[int, int] = (84, 56)) -> str:
        frames = [Image.new("RGB", size, (9 * i, 50, 50)) for i in range(num_frames)]
        content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
        return "data:image/gif;base64," + base64.b64encode(content).decode()

    return url
