"""Images in every mode come out as upright 8-bit RGB, or are refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import imaging


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(height: int = 20, width: int = 30) -> Image.Image:
    """Left half dark red, right half light blue."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2] = (120, 20, 20)
    pixels[:, width // 2 :] = (150, 180, 240)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG"])
def test_every_format_gives_the_same_picture(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    decoded = imaging.decode(encoded(picture(), kind, **options))
    assert decoded.dtype == np.uint8
    assert decoded.shape == (20, 30, 3)
    tolerance = 12 if kind == "JPEG" else 0
    assert np.abs(decoded[:, :10].astype(int) - (120, 20, 20)).max() <= tolerance
    assert np.abs(decoded[:, 20:].astype(int) - (150, 180, 240)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Image.Transpose that turns the upright picture into the stored one
    stored = picture().transpose(Image.Transpose(undo[orientation])) if orientation > 1 else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = imaging.decode(encoded(picture(), "PNG"))
    assert np.array_equal(imaging.decode(encoded(stored, "PNG", exif=exif)), upright)


def grey16() -> NDArray[np.uint16]:
    return np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(kind: str) -> None:
    decoded = imaging.decode(encoded(Image.fromarray(grey16()), kind))
    assert np.array_equal(decoded[..., 0], (grey16() >> 8).astype(np.uint8))
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_transparency_is_blended_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert imaging.decode(encoded(clear))[0, 0].tolist() == [255, 255, 255]
    assert imaging.decode(encoded(half))[0, 0].tolist() == pytest.approx([227, 127, 127], abs=1)
    assert imaging.decode(encoded(Image.new("LA", (4, 4), (50, 0))))[0, 0].tolist() == [255, 255, 255]
    assert imaging.decode(encoded(palette, transparency=1))[0, 0].tolist() == [255, 255, 255]
    assert imaging.decode(encoded(palette))[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("mode", "colour"), [("1", 1), ("L", 99), ("CMYK", (0, 255, 255, 0)), ("YCbCr", (128, 128, 128))]
)
def test_other_modes_become_rgb(mode: str, colour: int | tuple[int, ...]) -> None:
    image = Image.new(mode, (5, 5), colour)
    kind = "PNG" if mode in ("1", "L") else "JPEG"
    decoded = imaging.decode(encoded(image, kind))
    wanted = np.asarray(image.convert("RGB"))
    assert np.abs(decoded.astype(int) - wanted).max() <= 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes that are not a readable image"),
        (b"plain text", "10 bytes that are not a readable image"),
        (encoded(Image.new("L", (8, 8)), "GIF"), "not a readable image"),
        (encoded(picture(), "JPEG")[:400], "damaged"),
        (encoded(Image.new("F", (8, 8), 0.5), "TIFF")[:], None),
        (encoded(Image.new("1", (10001, 10001)), "PNG"), "10001x10001 pixels, more than the limit"),
    ],
    ids=["empty", "text", "gif", "truncated", "float", "too large"],
)
def test_bad_images_are_refused(data: bytes, message: str | None) -> None:
    with pytest.raises(imaging.ImageError, match=message):
        imaging.decode(data)


def test_fit_takes_the_centred_square() -> None:
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, 10:20] = 200
    assert (imaging.fit(image, 5) == 200).all()
    assert imaging.fit(image[:, 10:20], 10) is not None
    assert imaging.fit(np.full((1, 4000, 3), 7, dtype=np.uint8), 16).shape == (16, 16, 3)


def test_normalise_gives_zero_mean_and_unit_deviation() -> None:
    batch = torch.randint(0, 256, (8, 6, 6, 3), dtype=torch.uint8)
    mean = (batch.float() / 255).mean((0, 1, 2))
    std = (batch.float() / 255).std((0, 1, 2), correction=0)
    out = imaging.normalise(batch, mean.tolist(), std.tolist())
    assert out.shape == (8, 3, 6, 6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_png_round_trip_is_exact() -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert np.array_equal(imaging.decode(imaging.encode_png(image)), image)
