"""Decode, fit, normalise and encode images: the only image code of the project.

Training data and requests take the same way, so a model never meets pixels that were prepared differently:
`decode` and `fit` serve preprocessing and inference, `normalise` serves training, evaluation and inference.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 100_000_000  # 300 MB once decoded; a larger header is refused before any pixel is read
AGAIN = "save it again with another program"
BACKGROUND = (255, 255, 255)  # what transparent pixels are blended on

# What a picture may ask of a decoder, far above what cameras and editors write: a few kB can ask for hours. A request
# may hold many pictures, so each limit follows the picture's size in bytes or pixels, or costs little beside them.
MAX_READS = 4000  # by which Pillow takes a header apart, and one more for each so many bytes of the rest:
BYTES_A_READ = 128
MAX_PASSES = 20  # of a progressive JPEG, where ten are usual; up to five times as many of a small one
MAX_STRIPS, BYTES_A_STRIP = 512, 64  # or tiles of a TIFF that is not compressed; more, if each has so many bytes
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")  # others can be bombs, and change no pixel, but
PNG_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # these may say which side is up

_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # of JPEG; 0 and the restart markers belong to the pixels
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip  # what makes a picture of this EXIF orientation upright

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns or raises, by size; `decode` has one limit that raises

_constants: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # of `normalise`, by its arguments


class ImageError(ValueError):
    """The bytes are not an image that this project can read; the message says why."""


class _Metered(io.BytesIO):
    """Bytes that can be read so many times only: whatever loop over the parts of a file Pillow has, it ends."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads, self.bytes = MAX_READS, 4 * len(data) + 2**20  # what is left of them

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.reads, self.bytes = self.reads - 1, self.bytes - len(data)
        if self.reads < 0 or self.bytes < 0:
            raise ImageError(f"the image consists of too many parts; {AGAIN}")
        return data


def decode(data: bytes, max_pixels: int = MAX_PIXELS, max_aspect: float = math.inf) -> NDArray[np.uint8]:
    """Decode one encoded image to upright RGB.

    Args:
        data: the bytes of a JPEG, PNG, WebP, BMP or TIFF file. Of several frames the first counts.
        max_pixels: the largest accepted width times height.
        max_aspect: the largest accepted ratio of the longer to the shorter side.

    Returns:
        uint8 array of shape (height, width, 3). EXIF orientation is applied, 16-bit grey is scaled to 8 bits,
        transparency is blended on white.

    Raises:
        ImageError: when the bytes are no such image, are damaged, or hold too many pixels.
    """
    try:
        with opened(data) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"the image has {width}x{height} pixels, more than the limit of {max_pixels}")
            if max(width, height) > max_aspect * min(width, height):
                raise ImageError(f"the image has {width}x{height} pixels, more than {max_aspect} times as long as wide")
            _check_work(image, data)
            image.load()
            turn = _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            return np.ascontiguousarray(_to_rgb(image if turn is None else image.transpose(turn)))
    except ImageError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError(f"{len(data)} bytes that are not a readable image (formats: {known})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, MemoryError and more
        raise ImageError(f"the image is damaged: {error}") from error


@contextmanager
def opened(data: bytes) -> Iterator[ImageFile.ImageFile]:
    """Pillow's image of which the header is read: its size is known, and no pixel is decoded.

    Raises:
        Exception: as `Image.open` does, and an ImageError when the header alone would be too much work.
    """
    if data.startswith(b"\x89PNG"):
        data = _without_extras(data)
    elif data[:2] in (b"II", b"MM"):
        _check_directory(data)
    stream = _Metered(data)
    with Image.open(stream, formats=FORMATS) as image:
        if len(image.tile) > max(MAX_STRIPS, len(data) // BYTES_A_STRIP):
            raise ImageError(f"the image has {len(image.tile)} strips or tiles in {len(data)} bytes; {AGAIN}")
        stream.reads += len(data) // BYTES_A_READ + 4 * len(image.tile)
        yield image


def _without_extras(data: bytes) -> bytes:
    """A PNG file with nothing but what its pixels need."""
    kept, place, texts = [data[:8]], 8, 4
    for _ in range(MAX_READS + len(data) // BYTES_A_READ):
        end, name = place + 12 + int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        texts -= (text := texts > 0 and data.startswith(PNG_TEXTS, place + 8))
        if text or name in PNG_CHUNKS:
            kept.append(data[place:end])
        if (place := end) >= len(data) or name == b"IEND":
            return b"".join(kept)
    raise ImageError(f"the image consists of too many parts; {AGAIN}")


def _check_directory(data: bytes) -> None:
    """Refuse a TIFF whose first directory Pillow would not read as libtiff does, or names very many strips or tiles."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+"
    offset, first, field = (f"{order}Q", 8, f"{order}HHQ8x") if big else (f"{order}L", 4, f"{order}HHL4x")
    try:
        (start,) = struct.unpack_from(offset, data, first)
        (count,) = struct.unpack_from(offset if big else f"{order}H", data, start)
    except (struct.error, OverflowError):
        return  # for Pillow to refuse
    start, size = start + (8 if big else 2), struct.calcsize(field)
    fields = data[start : start + min(count, MAX_READS) * size]
    entries = [*struct.iter_unpack(field, fields[: len(fields) // size * size])]
    if len({tag for tag, _, _ in entries}) < len(entries):  # one takes the first of them, the other the last
        raise ImageError(f"the image has a field twice; {AGAIN}")
    if any(number > 2**16 for tag, _, number in entries if tag in (273, 324)):
        raise ImageError(f"the image has more than {2**16} strips or tiles; {AGAIN}")


def _check_work(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse what would keep a decoder busy for long although the image is small enough."""
    if image.tile and image.tile[0].codec_name == "bmp_rle":  # Pillow decodes it in Python, pixel by pixel
        raise ImageError(f"a BMP with run-length encoding is not supported; {AGAIN}")
    pixels, tags = image.width * image.height, getattr(image, "tag_v2", {})
    part = tags[322] * tags[323] if 322 in tags else min(tags.get(278, image.height), image.height) * image.width
    if part > max(pixels, 2**20):  # a tile may be larger than its image
        raise ImageError(f"the image has tiles of {part} pixels; {AGAIN}")
    if image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression")):
        limit = MAX_PASSES * min(max(2**18 // part, 1), 5) * math.ceil(pixels / part)
        if (_scans_of_strips(data, tags) if tags else _scans(data, limit)) > limit:
            raise ImageError(f"the image has more than {limit} passes over {part} pixels; {AGAIN}")


def _scans(data: bytes, limit: int) -> int:
    """How many passes a JPEG has: scans outside of other segments, and before what may follow the image."""
    scans, place = 0, 2
    while scans <= limit and (marker := _MARKER.search(data, place)):
        code, place = marker[1][0], marker.end()
        if code == 0xD9 and scans:  # the end of the image
            break
        scans += code == 0xDA
        if code >= 0xC0 and code not in (0xD8, 0xD9):  # others have no segment
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


def _scans_of_strips(data: bytes, tags: Mapping[int, Any]) -> int:
    """How many passes the strips or tiles of a TIFF's first image have at most; other pages do not count."""
    places, sizes = ([*tags.get(strips, ()), *tags.get(tiles, ())] for strips, tiles in ((273, 324), (279, 325)))
    if len(places) != len(sizes) or 0 in sizes or sum(sizes) > 2 * len(data):  # each may be anything
        return len(places) * data.count(b"\xff\xda")
    return sum(data.count(b"\xff\xda", place, place + size) for place, size in zip(places, sizes, strict=True))


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageError(f"pixel mode {image.mode!r} has values outside 0 to 65535; save it as 8 or 16 bits")
        grey = (values.astype(np.uint32) >> 8).astype(np.uint8)  # convert("RGB") would clip all of it to white
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return _on_background(image)
    return np.asarray(image.convert("RGB"))


def _on_background(image: Image.Image) -> NDArray[np.uint8]:
    """Blend strip by strip: the blending lets no other thread work meanwhile."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        canvas = Image.new("RGBA", strip.size, (*BACKGROUND, 255))
        canvas.alpha_composite(strip)
        pixels[top : top + rows] = np.asarray(canvas.convert("RGB"))
    return pixels


def fit(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Cut the largest centred square and scale it, with antialiasing, to `size` pixels a side.

    Args:
        image: uint8 array of shape (height, width, 3).
        size: pixels of a side of the result.

    Returns:
        uint8 array of shape (size, size, 3).
    """
    height, width, _ = image.shape
    if height == width == size:
        return image
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = image[top : top + side, left : left + side]
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BILINEAR))


def normalise(batch: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Turn stored pixels into the model's input.

    Args:
        batch: uint8 tensor of shape (N, height, width, 3).
        mean, std: per channel, of pixels scaled to 0..1.

    Returns:
        float32 tensor of shape (N, 3, height, width) with zero mean and unit deviation over the data set,
        in channels_last memory order (not on Apple's GPUs).
    """
    pixels = batch.flatten(2).float()  # whole lines: a vector of 3 channels is no work for vector instructions
    width = batch.shape[2]
    key = (*mean, *std, width, pixels.device)
    if key not in _constants:  # once: a copy from the host would wait for the device
        scale = pixels.new_tensor([1.0 / (255.0 * deviation) for deviation in std] * width)
        _constants[key] = scale, pixels.new_tensor([-m / s for m, s in zip(mean, std, strict=True)] * width)
    scale, offset = _constants[key]
    images = pixels.mul_(scale).add_(offset).view(batch.shape).permute(0, 3, 1, 2)
    # There the backward pass of batch normalisation fails in channels_last order (torch's pull request 188371, 2026).
    return images.contiguous() if images.device.type == "mps" else images


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a uint8 array of shape (height, width, 3) without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def image_statistics(pixels: NDArray[Any]) -> dict[str, list[float]]:
    """Brightness and contrast: mean and deviation of each image of a batch, as shares of the range of its pixels."""
    scale, axes = 255 if pixels.dtype == np.uint8 else 1, (1, 2, 3)
    means, deviations = pixels.mean(axis=axes) / scale, pixels.std(axis=axes) / scale
    return {"brightness": means.tolist(), "contrast": deviations.tolist()}


def counted(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many values are in each bin; those outside of all count for the first or the last."""
    return [int(count) for count in np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]]
