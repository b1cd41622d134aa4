"""Every kind of picture file becomes the right 8-bit RGB, or is refused with a reason; the crop is ADM's."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_sf.data.decode import BadPictureError, adm_crop, decode_picture, load_picture
from tests.helpers import PARITY

PREPROCESS = np.load(PARITY / "preprocess.npz")
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (24, 32), dtype=np.uint16)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("i", range(8))
@pytest.mark.parametrize("size", [32, 64])
def test_crop_equals_the_reference(i: int, size: int) -> None:
    assert np.array_equal(adm_crop(Image.fromarray(PREPROCESS[f"in_{i}"]), size), PREPROCESS[f"out_{i}_{size}"])
    png = encoded(Image.fromarray(PREPROCESS[f"in_{i}"]), "PNG")
    assert np.array_equal(load_picture(png, size), PREPROCESS[f"out_{i}_{size}"])


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (24, 8), (5, 7)])
@pytest.mark.parametrize("shape", [(24, 32), (90, 40), (13, 64), (3, 3)])
def test_rectangles_are_covered_and_cut_from_the_middle(size: tuple[int, int], shape: tuple[int, int]) -> None:
    assert adm_crop(Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)), size).shape == (*size, 3)
    y, x = np.mgrid[: shape[0], : shape[1]]
    ramp = np.stack([255 * y / (shape[0] - 1), 255 * x / (shape[1] - 1), 0 * x], axis=-1).astype(np.uint8)
    crop = adm_crop(Image.fromarray(ramp), size)
    for axis in (0, 1):  # what is cut off is cut off on both sides; what is not reaches from edge to edge
        edges = crop[..., axis].astype(int).take([0, -1], axis).mean(1 - axis)
        assert abs(edges.sum() - 254) < 255 * 2 / size[axis]
    spans = [np.ptp(crop[..., axis].astype(int).mean(1 - axis)) for axis in (0, 1)]
    assert max(spans) > 254 * (1 - 1.5 / min(size))


def test_a_rectangle_of_equal_sides_is_the_square() -> None:
    image = Image.fromarray(PREPROCESS["in_0"])
    assert np.array_equal(adm_crop(image, (32, 32)), adm_crop(image, 32))


def test_plain_modes() -> None:
    image = Image.fromarray(RGB)
    for mode, kind in (("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("CMYK", "TIFF"), ("LAB", "TIFF")):
        converted = image.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", image.size)
        got = decode_picture(encoded(converted, kind))
        assert got.mode == "RGB"
        if mode in ("RGB", "L", "1", "CMYK"):
            assert np.array_equal(np.asarray(got), np.asarray(converted.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    want = np.round(GREY16 * (255 / 65535)).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        got = np.asarray(decode_picture(encoded(Image.fromarray(GREY16), kind)))
        assert np.array_equal(got, np.repeat(want[:, :, None], 3, axis=2))
    floats = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    assert np.asarray(decode_picture(encoded(floats, "TIFF"))).max() == 255


def test_transparency_is_laid_over_white() -> None:
    rgba = np.dstack([RGB, np.zeros((24, 32), np.uint8)])
    rgba[:12, :, 3] = 255
    png = encoded(Image.fromarray(rgba), "PNG")
    got = np.asarray(decode_picture(png))
    assert np.array_equal(got[:12], RGB[:12])
    assert (got[12:] == 255).all()
    assert np.array_equal(np.asarray(decode_picture(png, "reference")), RGB)  # alpha ignored, as published
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (np.asarray(decode_picture(encoded(palette, "PNG", transparency=1))) == 255).all()


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    png = encoded(image, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode_picture(png)), np.rot90(RGB, -1))
    assert np.array_equal(np.asarray(decode_picture(png, "reference")), RGB)


def test_tiny_pictures_are_enlarged() -> None:
    assert load_picture(encoded(Image.fromarray(RGB[:1, :1]), "PNG"), 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (encoded(Image.fromarray(RGB), "PNG")[:200], "truncated"),
        (encoded(Image.fromarray(RGB), "JPEG")[:300], "Truncated"),
        (encoded(Image.new("RGB", (4, 2000)), "PNG"), "too long and thin"),
        (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "nan"),
    ],
)
def test_bad_pictures_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadPictureError, match=reason):
        load_picture(data, 8)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadPictureError, match="No such file"):
        load_picture(tmp_path / "gone.png", 8)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]),
    cut=st.integers(0, 3000),
    changes=st.lists(st.tuples(st.integers(0, 2999), st.integers(0, 255)), max_size=8),
)
def test_damaged_files_give_a_picture_or_a_reason(kind: str, cut: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(Image.fromarray(RGB), kind)[:cut])
    for position, value in changes:
        if position < len(data):
            data[position] = value
    try:
        assert load_picture(bytes(data), 8).shape == (8, 8, 3)
    except BadPictureError as e:
        assert str(e)
