from __future__ import annotations

import base64
import io
import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ernie_cluster.api.decoders import DecoderLimits, Decoders
from ernie_cluster.errors import ContextTooLong, InvalidRequest, ReplicaLost
from ernie_cluster.inputs.decoder import receive_answer
from ernie_cluster.inputs.frames import VideoConfig
from ernie_cluster.inputs.images import PixelConfig
from ernie_cluster.inputs.messages import Media, Picture, PromptLimits, Settings, Video
from tests.unit.api.traps import Burglar, Crash, Endless, Greedy

SETTINGS = Settings(PixelConfig(), VideoConfig(), PromptLimits(), 10_000)


def picture(colour: str = "red", size: tuple[int, int] = (112, 84)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def film() -> bytes:
    frames, out = [Image.new("RGB", (84, 56), (9 * i, 50, 50)) for i in range(6)], io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return out.getvalue()


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    pool = Decoders(2, DecoderLimits(timeout_s=300.0))
    yield pool
    pool.close()


def test_what_comes_back_is_what_would_have_been_made_here(decoders: Decoders) -> None:
    inline = "data:image/png;base64," + base64.b64encode(picture("blue")).decode()
    media: list[Media] = [Picture("a", "", picture()), Video("b", "", content=film()), Picture("c", inline)] * 2
    for there, here in zip(decoders.map(SETTINGS, media), map(SETTINGS, media), strict=True):
        assert np.array_equal(there.patches, here.patches)
        assert (there.kind, there.grid_thw, there.media_hash) == (here.kind, here.grid_thw, here.media_hash)
        assert there.num_tokens == here.num_tokens


@pytest.mark.parametrize(
    "media",
    [
        Picture("p", "", b"junk"),
        Picture("p", "data:image/png;base64,?"),
        Picture("p", "", b"BM junk"),
        Video("p", "", content=film(), fps=-1.0),
        Video("p", "", content=film(), source_fps=1.0),
    ],
)
def test_refusals_are_the_same(decoders: Decoders, media: Media) -> None:
    with pytest.raises(InvalidRequest) as here:
        SETTINGS(media)
    with pytest.raises(InvalidRequest) as there:
        list(decoders.map(SETTINGS, [media]))
    assert there.value.args == here.value.args


def test_too_long_stays_too_long(decoders: Decoders) -> None:
    with pytest.raises(ContextTooLong, match="the context holds 1"):
        list(decoders.map(replace(SETTINGS, max_tokens=1), [Video("p", "", content=film())]))


def test_one_request_has_few_under_way(decoders: Decoders) -> None:
    taken = []
    media = (taken.append(i) or Picture("p", "", picture()) for i in count())  # type: ignore[func-returns-value]
    answers = decoders.map(SETTINGS, media)
    for i in range(4):
        next(answers)
        assert len(taken) == i + 2
    answers.close()  # type: ignore[attr-defined]


def test_a_process_that_dies_is_replaced_and_the_picture_tried_again(decoders: Decoders, tmp_path: Path) -> None:
    once = Crash("p", str(tmp_path / "was here"), picture())
    assert [made.num_tokens for made in decoders.map(SETTINGS, [once])] == [12]
    with pytest.raises(ReplicaLost, match="died twice over p"):
        list(decoders.map(SETTINGS, [Crash("p", "")]))
    assert len(list(decoders.map(SETTINGS, [Picture("p", "", picture())] * 3))) == 3


def test_memory_ends_where_the_limit_is(decoders: Decoders) -> None:
    with pytest.raises(InvalidRequest, match="takes more memory to decode") as caught:
        list(decoders.map(SETTINGS, [Greedy("p", "")]))
    assert (caught.value.param, caught.value.code) == ("p.url", "image_too_large")


def test_time_ends_where_the_limit_is() -> None:
    pool = Decoders(1, DecoderLimits(timeout_s=0.3))
    try:
        for _ in range(2):  # the second one meets a new process
            with pytest.raises(InvalidRequest, match=r"takes longer to decode than 0\.3 s") as caught:
                list(pool.map(SETTINGS, [Endless("p", "")]))
        assert (caught.value.param, caught.value.code) == ("p.url", "image_too_large")
    finally:
        pool.close()


def test_a_decoder_has_no_secrets_and_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE_SECRET", "the key")
    pool = Decoders(1, DecoderLimits(timeout_s=300.0))
    try:
        with pytest.raises(InvalidRequest, match="found nothing, wrote nothing"):
            list(pool.map(SETTINGS, [Burglar("p", str(tmp_path / "ERNIE_SECRET"))]))
    finally:
        pool.close()


def test_a_decoder_ends_with_the_process_that_started_it() -> None:
    code = """
import os
from ernie_cluster.api.decoders import DecoderLimits, Decoders
decoder = Decoders(1, DecoderLimits())._idle.get()
decoder._await_start()
print(decoder._process.pid, flush=True)
input()
os._exit(1)  # no farewell
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        decoder = os.pidfd_open(int(parent.stdout.readline()))
        assert select.select([decoder], [], [], 0)[0] == []
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert select.select([decoder], [], [], 60)[0] == [decoder]
        os.close(decoder)


def answer(head: object, patches: bytes = b"") -> bytes:
    content = json.dumps(head).encode()
    return struct.pack(">Q", len(content)) + content + patches


GOOD = {"grid": [1, 2, 2], "hash": "00" * 32, "num_tokens": 1}


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (answer(GOOD, bytes(4 * 588)), None),
        (answer(GOOD, bytes(4 * 588 - 1)), EOFError),
        (b"", EOFError),
        (answer({**GOOD, "grid": [10**6, 10**6, 2]}), ValueError),
        (answer({**GOOD, "grid": [-1, -2, 2]}), ValueError),
        (answer({**GOOD, "grid": [1, 2]}), ValueError),
        (answer({**GOOD, "hash": "00"}), ValueError),
        (answer({}), KeyError),
        (answer({"error": "ConfigError"}), KeyError),
        (answer([]), TypeError),
        (b"\xff" * 8, ValueError),
        (struct.pack(">Q", 3) + b"\x80\x05.", ValueError),  # a pickle
    ],
)
def test_an_answer_is_taken_for_no_more_than_it_is(sent: bytes, error: type[Exception] | None) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(sent)
        if error is None:
            assert receive_answer(ours, SETTINGS, Picture("p", ""), 10**6).grid_thw == (1, 2, 2)
            return
        with pytest.raises(error):
            receive_answer(ours, SETTINGS, Picture("p", ""), 10**6)
