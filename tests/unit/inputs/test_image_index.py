"""The index of a folder: an exact search, whatever the order of its pictures, and files that are whole or refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.errors import ConfigError
from ernie_cluster.inputs.image_index import FORMAT, Entry, ImageIndex, Maker, Vector

MAKER = Maker("e" * 64, "max_pixels 1000")
Row = tuple[Entry, Vector]


def unit(numbers: list[float]) -> Vector:
    vector = np.array(numbers, np.float32)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def rows_of(vectors: list[Vector]) -> list[Row]:
    return [(Entry(f"{i:03}.png", hashlib.sha256(b"%d" % i).hexdigest()), v) for i, v in enumerate(vectors)]


NUMBERS = st.lists(st.integers(-3, 3), min_size=4, max_size=4).filter(any)  # few values: many ties
VECTORS = st.builds(unit, NUMBERS)
SOME_ROWS = rows_of([unit([1, i, -i, 2]) for i in range(5)])


@settings(max_examples=50)
@given(st.lists(VECTORS, min_size=1, max_size=12), VECTORS, st.integers(1, 14))
def test_the_nearest_are_those_of_a_naive_search(vectors: list[Vector], query: Vector, count: int) -> None:
    rows = rows_of(vectors)
    hits = ImageIndex(MAKER, rows).nearest(query, count)
    exact = {entry: sum(float(a) * float(b) for a, b in zip(query, v, strict=True)) for entry, v in rows}
    assert len({hit.entry for hit in hits}) == len(hits) == min(count, len(rows))
    assert all(abs(hit.score - exact[hit.entry]) < 1e-5 for hit in hits)
    assert all(a.score >= b.score and (a.score > b.score or a.entry < b.entry) for a, b in itertools.pairwise(hits))
    left_out = [score for entry, score in exact.items() if entry not in {hit.entry for hit in hits}]
    assert all(score < hits[-1].score + 1e-5 for score in left_out)


@settings(max_examples=20)
@given(st.permutations(SOME_ROWS))
def test_the_order_of_the_pictures_makes_no_difference(rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, some in (("a", SOME_ROWS), ("b", rows)):
            ImageIndex(MAKER, some).save(Path(folder) / name)
        assert (Path(folder) / "a").read_bytes() == (Path(folder) / "b").read_bytes()
        assert sorted(path.name for path in Path(folder).iterdir()) == ["a", "b"]


def test_what_is_saved_loads_back_equal(tmp_path: Path) -> None:
    index = ImageIndex(MAKER, SOME_ROWS)
    index.save(tmp_path / "x")
    loaded = ImageIndex.load(tmp_path / "x", MAKER)
    assert (loaded.entries, loaded.maker, loaded.width) == (index.entries, MAKER, 4)
    assert loaded.vectors.tolist() == index.vectors.tolist()
    assert loaded.known.keys() == {entry.sha256 for entry, _ in SOME_ROWS}


def test_a_damaged_file_is_refused_or_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x"
    index = ImageIndex(MAKER, SOME_ROWS)
    index.save(path)
    whole = path.read_bytes()
    num_refused = 0
    positions = range(0, len(whole), 7)
    for i in positions:
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :]):
            path.write_bytes(damaged)
            try:
                loaded = ImageIndex.load(path, MAKER)
            except ConfigError:
                num_refused += 1
                continue
            assert loaded.entries == index.entries
            assert loaded.vectors.tolist() == index.vectors.tolist()
    assert num_refused >= 1.5 * len(positions)  # all that were cut off, and those hit where it matters


@pytest.mark.parametrize(
    ("maker", "words"),
    [
        (replace(MAKER, encoder="f" * 64), "vision encoder of another model"),
        (replace(MAKER, pixels="max_pixels 999"), "made with pictures of max_pixels 1000, not max_pixels 999"),
    ],
)
def test_another_model_s_index_is_refused(maker: Maker, words: str, tmp_path: Path) -> None:
    ImageIndex(MAKER, SOME_ROWS).save(tmp_path / "x")
    with pytest.raises(ConfigError, match=words):
        ImageIndex.load(tmp_path / "x", maker)


def test_no_index_is_refused_and_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(ConfigError, match="cannot be read"):
        ImageIndex.load(path, MAKER)
    with path.open("wb") as file:
        np.savez(file, about=np.array([{}], dtype=object), vectors=np.zeros((1, 2), np.float32))
    with pytest.raises(ConfigError, match="allow_pickle=False"):
        ImageIndex.load(path, MAKER)


GOOD: dict[str, Any] = {
    "format": FORMAT,
    "maker": {"encoder": "e" * 64, "pixels": "max_pixels 1000"},
    "entries": [["a.png", "0" * 64]],
}
ENTRIES = [
    [["../a.png", "0" * 64]], [["/a.png", "0" * 64]], [["b/../../a.png", "0" * 64]], [["b//a.png", "0" * 64]],
    [["./a.png", "0" * 64]], [["", "0" * 64]], [["a\n.png", "0" * 64]], [["a\0.png", "0" * 64]],
    [["..\\a.png", "0" * 64]], [["\udc80.png", "0" * 64]], [["a.png", "0" * 63]], [["a.png"]], [[7, 7]], ["a.png"], [],
    [["a.png", "0" * 64], ["b.png", "0" * 64]],
]  # fmt: skip


def write(path: Path, about: object, vectors: Any) -> None:
    with path.open("wb") as file:
        np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), vectors=vectors)


@pytest.mark.parametrize(
    "about", [{**GOOD, "entries": entries} for entries in ENTRIES]
    + [{**GOOD, "format": "2"}, {**GOOD, "maker": {}}, {**GOOD, "maker": None}, {}, [], 7],
)  # fmt: skip
def test_whoever_wrote_it_no_name_leads_out_of_the_folder_and_nothing_is_missing(about: Any, tmp_path: Path) -> None:
    vectors = np.array([[0.6, 0.8]], np.float32)
    write(tmp_path / "good", GOOD, vectors)
    assert len(ImageIndex.load(tmp_path / "good", MAKER).entries) == 1
    write(tmp_path / "bad", about, vectors)
    with pytest.raises(ConfigError, match="no index of pictures, or a broken one"):
        ImageIndex.load(tmp_path / "bad", MAKER)


@pytest.mark.parametrize("vectors", [[[0.6, 0.9]], [[float("nan"), 1.0]], [[0.0, 0.0]], [1.0], [[[1.0]]], [], [["a"]]])
def test_vectors_have_length_1(vectors: Any, tmp_path: Path) -> None:
    write(tmp_path / "bad", GOOD, np.array(vectors))
    with pytest.raises(ConfigError, match="a broken one"):
        ImageIndex.load(tmp_path / "bad", MAKER)


def test_a_name_stands_once(tmp_path: Path) -> None:
    twice = {**GOOD, "entries": [["a.png", "0" * 64]] * 2}
    write(tmp_path / "bad", twice, np.array([[0.6, 0.8]] * 2, np.float32))
    with pytest.raises(ConfigError, match="twice"):
        ImageIndex.load(tmp_path / "bad", MAKER)
