"""`ernie-cluster index`: what an earlier run has done is taken over, and makes no difference to the result."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from ernie_cluster.cli import index
from ernie_cluster.cli.index import Builder, Embed, choose, vectors_in
from ernie_cluster.cli.main import main
from ernie_cluster.cli.progress import Bar
from ernie_cluster.config.presets import PRESETS
from ernie_cluster.errors import ConfigError, InvalidRequest, UnknownModel
from ernie_cluster.inputs.image_folder import ImageFolder
from ernie_cluster.inputs.image_index import ImageIndex, Maker, Vector
from tests.fakes import vector_of

MAKER = Maker("e" * 64, "")


class Eyes:
    """Makes a vector of a file's content; of what begins with a question mark none."""

    def __init__(self, patience: int = 1000) -> None:
        self.looked_at: list[bytes] = []
        self.patience = patience

    def __call__(self, content: bytes) -> Vector:
        if content.startswith(b"?"):
            raise InvalidRequest("no picture")
        if len(self.looked_at) == self.patience:
            raise KeyboardInterrupt
        self.looked_at.append(content)
        return vector_of(hashlib.sha256(content).digest())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("a", "b", "c", "deep/a", "deep/d"):
        (tmp_path / "photos" / f"{name}.png").write_bytes(name[-1].encode())
    return tmp_path / "photos"


def run(folder: Path, out: Path, embed: Embed) -> Builder:
    """What the command does, with other eyes."""
    draft = Path(f"{out}.part")
    known = {**vectors_in(draft, MAKER), **vectors_in(out, MAKER)}
    pictures = ImageFolder(str(folder), 1000)
    builder = Builder(pictures, MAKER, known, embed, draft)
    try:
        builder.add(pictures.names(), Bar("pictures", len(pictures.names()), io.StringIO()))
    except KeyboardInterrupt:
        builder.save_draft()
    else:
        ImageIndex(MAKER, builder.rows).save(out)
    return builder


def test_an_index_that_was_brought_up_to_date_equals_a_fresh_one(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "old", Eyes())
    (folder / "b.png").unlink()
    (folder / "a.png").rename(folder / "z.png")
    (folder / "c.png").write_bytes(b"changed")
    (folder / "deep" / "new.png").write_bytes(b"new")
    again, fresh = Eyes(), Eyes()
    builder = run(folder, tmp_path / "old", again)
    run(folder, tmp_path / "fresh", fresh)
    assert (tmp_path / "old").read_bytes() == (tmp_path / "fresh").read_bytes()
    assert again.looked_at == [b"changed", b"new"]
    assert builder.num_new == 2
    assert sorted(fresh.looked_at) == [b"a", b"changed", b"d", b"new"]  # the same content once


def test_a_run_that_was_broken_off_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, Eyes(patience=2))
    assert not out.exists()
    rest = Eyes()
    run(folder, out, rest)
    run(folder, tmp_path / "fresh", Eyes())
    assert len(rest.looked_at) == 2
    assert out.read_bytes() == (tmp_path / "fresh").read_bytes()


def test_a_draft_is_kept_from_time_to_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SAVE_S", -1.0)
    run(folder, tmp_path / "out", Eyes())
    assert len(ImageIndex.load(tmp_path / "out.part", MAKER).entries) == 5


def test_what_is_no_picture_is_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    (folder / "q.png").write_bytes(b"?")
    (folder / "odd\n.png").write_bytes(b"x")
    (folder / "large.png").write_bytes(b"x" * 1001)
    pictures, said = ImageFolder(str(folder), 1000), io.StringIO()
    builder = Builder(pictures, MAKER, {}, Eyes(), tmp_path / "draft")
    builder.add(pictures.names(), Bar("pictures", 8, said))
    assert (builder.num_skipped, len(builder.rows)) == (3, 5)
    for words in ("'q.png' is left out: no picture", r"'odd\n.png' is left out: its name", "more than 1000 bytes"):
        assert words in said.getvalue()


def test_an_empty_index_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for name, words in (("photos", "would be empty"), ("none", "cannot be listed")):
        assert main(["index", str(tmp_path / name), "--out", str(tmp_path / "x")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_model_that_sees_is_chosen() -> None:
    config = PRESETS["tiny"]("/nowhere")
    assert choose(config, None) == choose(config, "tiny") == config.models[0]
    with pytest.raises(UnknownModel):
        choose(config, "other")
    (model,) = config.models
    blind = type(model)(model.name, model.path, tuple(p for p in model.pools if p.role != "vision"), model.engine)
    with pytest.raises(ConfigError, match="no vision pool"):
        choose(type(config)((blind,)), None)


def test_the_bar_shows_how_far_it_is() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    times = iter([0.0, 30.0, 60.0])
    bar = Bar("pictures", 4, out := Terminal(), lambda: next(times))
    bar.step()
    bar.step()
    bar.close()
    lines = out.getvalue().split("\r\x1b[K")
    assert lines[1] == "[########......................] 1/4 pictures, 1:30 to go"
    assert lines[2] == "[###############...............] 2/4 pictures, 1:00 to go\n"
    many = Bar("pictures", 1000, plain := io.StringIO(), lambda: 0.0)
    for _ in range(1000):
        many.step()
    assert len(plain.getvalue().splitlines()) == 10
