from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ernie_cluster.errors import CheckpointError, InvalidRequest
from ernie_cluster.inputs.data_url import parse_data_url
from ernie_cluster.inputs.images import (
    ImageLimits,
    PixelConfig,
    open_image,
    prepare_image,
    smart_resize,
    to_image,
    to_patches,
)
from ernie_cluster.inputs.thumbnail import MAX_SIDE, thumbnail_url
from ernie_cluster.request import MediaInput

Encoded = Callable[..., bytes]
LIMITS = ImageLimits()
TINY = PixelConfig(min_pixels=4 * 784, max_pixels=64 * 784, video_min_pixels=4 * 784, video_max_pixels=16 * 784)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one row of zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 + 3 * width)) if width < 10_000 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((28, 28), (56, 56)),  # below the minimum of 4 tokens
        ((100, 150), (112, 140)),
        ((98, 70), (112, 56)),  # 3.5 and 2.5 factors: halves go to even
        ((13, 300), (28, 308)),  # a side below half a factor is not rounded to nothing
        ((1080, 1920), (1092, 1932)),
        ((4000, 6000), (1792, 2688)),
        ((10, 5000), (28, 5600)),  # beyond a ratio of 200
        ((5000, 10), (5600, 28)),
        ((1, 1), (56, 56)),
    ],
)
def test_smart_resize(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert smart_resize(*size, 28, PixelConfig().min_pixels, PixelConfig().max_pixels) == resized


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([PixelConfig(), TINY]))
def test_resized_sides_are_whole_and_within_bounds(height: int, width: int, config: PixelConfig) -> None:
    h, w = smart_resize(height, width, config.factor, config.min_pixels, config.max_pixels)
    assert h % 28 == w % 28 == 0
    assert config.min_pixels <= h * w <= config.max_pixels
    assert smart_resize(width, height, config.factor, config.min_pixels, config.max_pixels) == (w, h)


def naive_patches(frames: list[Image.Image], size: tuple[int, int]) -> list[list[int]]:
    """Patch by patch and number by number."""
    width, height = size
    rows = []
    for frame in frames:
        pixels = np.asarray(frame.resize(size, Image.Resampling.BICUBIC))
        for block_y in range(height // 28):
            for block_x in range(width // 28):
                for y in (0, 1):
                    for x in (0, 1):
                        top, left = 14 * (2 * block_y + y), 14 * (2 * block_x + x)
                        rows.append(
                            [pixels[top + i, left + j, c] for c in range(3) for i in range(14) for j in range(14)]
                        )
    return rows


@pytest.mark.parametrize(("size", "grid", "num_frames"), [((112, 84), (6, 8), 1), ((90, 60), (4, 6), 2)])
def test_patches_equal_a_naive_loop(size: tuple[int, int], grid: tuple[int, int], num_frames: int) -> None:
    frames = [noise(size, seed) for seed in range(num_frames)]
    patches, (t, h, w) = to_patches(frames, TINY)
    assert (t, h, w) == (num_frames, *grid)
    assert patches.dtype == np.uint8
    assert patches.tolist() == naive_patches(frames, (14 * w, 14 * h))


def test_normalising_patches_equals_normalising_the_picture() -> None:
    """Mean and deviation are per channel, and a patch's row holds the channels one after the other."""
    image = noise((56, 56))
    patches, _ = to_patches([image], TINY)
    per_value = [np.repeat(np.float32(values), 14 * 14) for values in (TINY.mean, TINY.std)]
    normalised = (patches / np.float32(255) - per_value[0]) / per_value[1]
    pixels = (np.asarray(image) / np.float32(255) - np.float32(TINY.mean)) / np.float32(TINY.std)
    np.testing.assert_allclose(normalised[0].reshape(3, 14, 14), pixels[:14, :14].transpose(2, 0, 1), rtol=1e-6)
    np.testing.assert_allclose(normalised[-1].reshape(3, 14, 14), pixels[42:, 42:].transpose(2, 0, 1), rtol=1e-6)


def test_prepared_image(encoded: Encoded) -> None:
    media = prepare_image(encoded(noise((112, 84))), TINY, LIMITS)
    assert (media.kind, media.grid_thw, media.num_tokens, media.patches.shape) == ("image", (1, 6, 8), 12, (48, 588))
    assert len(media.media_hash) == 32
    other = prepare_image(encoded(noise((112, 84), seed=1)), TINY, LIMITS)
    assert other.media_hash != media.media_hash


def colour_at(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return image.getpixel((x, y))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_accepted_formats(encoded: Encoded, kind: str) -> None:
    image = open_image(encoded(Image.new("RGB", (40, 30), (200, 100, 50)), kind), LIMITS)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.subtract(colour_at(image, 20, 15), (200, 100, 50))).max() <= 4


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), (255, 127, 127)),
        (Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)),
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 0x8040, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((8, 8), 0xFFFF, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 0x00FF, np.uint16)), (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(encoded: Encoded, image: Image.Image, colour: tuple[int, int, int]) -> None:
    assert colour_at(open_image(encoded(image), LIMITS), 4, 4) == colour


def test_transparent_palette_is_white(encoded: Encoded) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert colour_at(open_image(encoded(image), LIMITS), 0, 0) == (10, 20, 30)
    assert colour_at(open_image(encoded(image, transparency=1), LIMITS), 0, 0) == (255, 255, 255)


def test_a_colour_may_stand_for_transparency(encoded: Encoded) -> None:
    """PNG's tRNS chunk for pictures without an alpha channel."""
    assert colour_at(open_image(encoded(Image.new("RGB", (8, 8), "blue"), transparency=(0, 0, 255)), LIMITS), 4, 4) == (
        255,
        255,
        255,
    )
    assert colour_at(open_image(encoded(Image.new("L", (8, 8), 9), transparency=9), LIMITS), 4, 4) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_parts_lie_on_white(encoded: Encoded, mode: str, kind: str) -> None:
    """Against the definition: colour * alpha + white * (1 - alpha), pixel by pixel."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)).convert("LA" if mode == "LA" else "RGBA")
    if mode == "PA":
        image = image.quantize(16)
    content = encoded(image, kind, lossless=True, exact=True)
    rgba = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    np.testing.assert_allclose(open_image(content, LIMITS), rgba[..., :3] * alpha + 255 * (1 - alpha), atol=1)


def test_cmyk_jpeg(encoded: Encoded) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red ink
    assert np.abs(np.subtract(colour_at(open_image(encoded(image, "JPEG"), LIMITS), 8, 8), (255, 0, 0))).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(encoded: Encoded, orientation: int) -> None:
    """Row 0 and column 0 of the stored pixels lie where the tag's definition puts them."""
    upright = noise((6, 4))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encoded(stored, exif=exif), LIMITS)
    assert np.array_equal(np.asarray(opened), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_may_lie_on_their_side_too(encoded: Encoded, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(encoded(noise((6, 4)), kind, exif=exif, lossless=True), LIMITS)
    assert np.array_equal(np.asarray(opened), np.rot90(np.asarray(noise((6, 4))), -1))


def test_the_first_picture_of_a_phones_several(encoded: Encoded) -> None:
    """Cameras put a second picture behind a JPEG's end and call it MPO."""
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    opened = open_image(encoded(red, "MPO", save_all=True, append_images=[blue]), LIMITS)
    assert np.abs(np.subtract(colour_at(opened, 4, 4), (255, 0, 0))).max() <= 4


def test_broken_exif_is_ignored(encoded: Encoded) -> None:
    opened = open_image(encoded(noise((6, 4)), exif=b"Exif\0\0broken"), LIMITS)
    assert opened.size == (6, 4)


def test_first_frame_of_an_animation(encoded: Encoded) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind in ("GIF", "WEBP", "PNG"):
        content = encoded(red, kind, save_all=True, append_images=[blue], lossless=True)
        assert colour_at(open_image(content, LIMITS), 4, 4) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(60_000, 60_000), (10_000, 9_000), (8_000, 8_000), (21_000, 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(InvalidRequest) as caught:
        open_image(png_header(*size), LIMITS)
    assert caught.value.code == "image_too_large"
    assert "50000000" in caught.value.message


def test_bytes_are_bounded(encoded: Encoded) -> None:
    content = encoded(noise((20, 20)))
    with pytest.raises(InvalidRequest, match=f"{len(content)} bytes, the limit is 100"):
        open_image(content, ImageLimits(max_bytes=100))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_cut_off_files_are_refused(encoded: Encoded, kind: str) -> None:
    """Unless all pixels are there, and nothing is missing but the mark of the end."""
    content = encoded(noise((24, 16)), kind)
    whole = np.asarray(open_image(content, LIMITS))
    for end in range(len(content)):
        try:
            found = np.asarray(open_image(content[:end], LIMITS))
        except InvalidRequest:
            continue
        assert np.array_equal(found, whole)


@pytest.mark.parametrize("prefix", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7\n", b"<svg>", b"PK\x03\x04", b"<script>"])
def test_files_that_are_two_things_are_refused(encoded: Encoded, prefix: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot be decoded|not served as pictures"):
        open_image(prefix + encoded(noise((20, 20)), "JPEG"), LIMITS)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000", "AVIF", "PDF", "EPS"])
def test_other_formats_are_refused(encoded: Encoded, kind: str) -> None:
    with pytest.raises(InvalidRequest, match="PNG, JPEG, WEBP, GIF") as caught:
        open_image(encoded(noise((20, 20)), kind), LIMITS)
    names = {"BMP", "TIFF", "ICO", "AVIF", "PDF"}
    assert (f"{kind} files are not served" in caught.value.message) == (kind in names)


def test_no_memory_is_no_broken_file(encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(MemoryError):
        open_image(encoded(noise((20, 20))), LIMITS)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"BM"]))
def test_no_bytes_raise_anything_else(content: bytes, magic: bytes) -> None:
    try:
        outcome = open_image(magic + content, LIMITS).mode
    except InvalidRequest as e:
        outcome = e.message
    assert outcome == "RGB" or "0x" not in outcome


def test_data_url() -> None:
    content = bytes(range(256))
    encoded = base64.b64encode(content).decode()
    assert parse_data_url(f"data:image/PNG;base64,{encoded}") == ("image/png", content)
    assert parse_data_url(f"data:image/png;name=a.png;base64,{encoded}", max_bytes=256) == ("image/png", content)
    with pytest.raises(InvalidRequest, match="more than 200 bytes"):
        parse_data_url(f"data:image/png;base64,{encoded}", max_bytes=200)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://example.org/a.png",
        "data:image/png,abc",
        "data:;base64,QUJD",
        "data:image/png;base64,QUJ",
        "data:image/png;base64,QU JD",
        "data:image/png;base64,QUI=QUI=",
        "data:image/png;base64,QUJD\n",
        "data:image/png;base64,QU_-",
        "data:image/png;base64,QUJDé",
    ],
)
def test_data_urls_are_strict(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_data_url(url)
    assert caught.value.code == "invalid_image"


def test_pixel_config_in_every_form(tmp_path: Path) -> None:
    assert PixelConfig.from_folder(tmp_path) == PixelConfig()
    path = tmp_path / "preprocessor_config.json"
    path.write_text(
        json.dumps({"min_pixels": 1, "max_pixels": 2, "video_min_pixels": 3, "image_mean": [0.1, 0.2, 0.3]})
    )
    expected = PixelConfig(min_pixels=1, max_pixels=2, video_min_pixels=3, mean=(0.1, 0.2, 0.3))
    assert PixelConfig.from_folder(tmp_path) == expected
    path.write_text(json.dumps({"size": {"shortest_edge": 1, "longest_edge": 2}, "patch_size": 16, "merge_size": 4}))
    (tmp_path / "video_preprocessor_config.json").write_text('{"size": {"longest_edge": 4}}')
    expected = PixelConfig(min_pixels=1, max_pixels=2, video_max_pixels=4, patch_size=16, merge_size=4)
    assert PixelConfig.from_folder(tmp_path) == expected
    both = {"image_processor": {"size": {"min_pixels": 5}}, "video_processor": {"max_pixels": 6}}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    assert PixelConfig.from_folder(tmp_path).min_pixels == 5
    assert PixelConfig.from_folder(tmp_path).video_max_pixels == 6


@pytest.mark.parametrize("content", ["{", "[]", '{"image_mean": [1, 2]}', '{"min_pixels": "many"}'])
def test_unusable_pixel_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        PixelConfig.from_folder(tmp_path)


# Regions, and the way back


def test_a_region_is_cut_from_the_full_picture_before_it_is_resized(encoded: Encoded) -> None:
    image = noise((900, 700))
    quarter, inner = (0.0, 0.0, 500.0, 500.0), (500.0, 0.0, 1000.0, 1000.0)
    zoomed = prepare_image(encoded(image), TINY, LIMITS, (quarter, inner))
    cropped = prepare_image(encoded(image.crop((225, 0, 450, 350))), TINY, LIMITS)
    assert zoomed.media_hash == cropped.media_hash
    assert zoomed.grid_thw == cropped.grid_thw
    assert prepare_image(encoded(image), TINY, LIMITS).media_hash != zoomed.media_hash


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2)])
def test_a_region_of_a_picture_of_hardly_any_pixels(size: tuple[int, int], encoded: Encoded) -> None:
    tiny = (999.0, 999.0, 1000.0, 1000.0)
    assert prepare_image(encoded(noise(size)), TINY, LIMITS, (tiny, tiny)).num_tokens >= 4


@pytest.mark.parametrize("size", [(56, 84), (112, 56)])
def test_patches_can_be_looked_at(size: tuple[int, int]) -> None:
    image = noise(size)
    patches, grid = to_patches([image], TINY)
    assert to_image(patches, grid, TINY).tobytes() == image.tobytes()


def test_a_thumbnail_is_small() -> None:
    patches, grid = to_patches([Image.new("RGB", (1120, 280), "red")], PixelConfig())
    url = thumbnail_url(MediaInput("image", b"", grid, 0, 1, patches), PixelConfig())
    mime, content = parse_data_url(url)
    shown = Image.open(io.BytesIO(content))
    assert (mime, shown.format, shown.size) == ("image/jpeg", "JPEG", (MAX_SIDE, MAX_SIDE // 4))
    assert shown.convert("RGB").getpixel((9, 9)) == pytest.approx((254, 0, 0), abs=3)
