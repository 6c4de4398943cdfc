"""Pictures of a folder: all that are below it, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.errors import ConfigError, InvalidRequest
from ernie_cluster.inputs.image_folder import ImageFolder, is_plain


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Beside a file outside, to which links lead."""
    inside = tmp_path / "inside"
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "deep/d.gif", "notes.txt", "deep/e.png.bak"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(name.encode())
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(b"secret")
    (inside / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (inside / "way").symlink_to(tmp_path / "outside")
    return ImageFolder(str(inside), max_bytes=20)


def test_names_are_sorted_and_relative(folder: ImageFolder) -> None:
    assert folder.names() == ["a.JPG", "b.png", "deep/d.gif", "deep/er/c.webp", "link.png"]
    assert folder.read("deep/er/c.webp") == b"deep/er/c.webp"


@pytest.mark.parametrize("name", ["link.png", "way/secret.png", "none.png", "deep", "b.png/x"])
def test_links_and_what_is_no_file_are_not_read(name: str, folder: ImageFolder) -> None:
    with pytest.raises(InvalidRequest, match="no such plain file"):
        folder.read(name)


def test_a_large_file_is_not_read(folder: ImageFolder) -> None:
    (Path(folder.path) / "b.png").write_bytes(b"x" * 21)
    with pytest.raises(InvalidRequest, match="more than 20 bytes"):
        folder.read("b.png")


def test_a_folder_that_is_not_there() -> None:
    gone = ImageFolder("/no/such/folder", max_bytes=20)
    with pytest.raises(ConfigError, match="/no/such/folder: cannot be listed"):
        gone.names()
    with pytest.raises(InvalidRequest, match="not there"):
        gone.read("a.png")


@given(st.text("a./\\\0\n é", max_size=8))
def test_a_plain_name_stays_below(name: str) -> None:
    if is_plain(name):
        parts = name.split("/")
        assert Path("/folder", name).parts == ("/", "folder", *parts)
        assert ".." not in parts
