"""Decode, fit, normalise and encode images: the only image code of the project.

Training data and requests take the same way, so a model never meets pixels that were prepared differently:
`decode` and `fit` serve preprocessing and inference, `normalise` serves training, evaluation and inference.
"""

from __future__ import annotations

import io
import math
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from bounds import FORMATS, ROOM, Data, ImageError, NoRoom, check_work, memory_of, opened

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

MAX_PIXELS = 100_000_000  # 300 MB once decoded; a larger header is refused before any pixel is read
BACKGROUND = (255, 255, 255)  # what transparent pixels are blended on
DEEP = (0, 65535)  # the least and the largest value of 16 bits, where nobody knows which of them are used

EXIF_IN = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # in Pillow's facts of an image then
# An entry of EXIF as it stands in the file, in either order of bytes.
_ORIENTATION = re.compile(rb"\x12\x01\x03\0\x01\0\0\0([\1-\x08])\0|\x01\x12\0\x03\0\0\0\x01\0([\1-\x08])")
_UNTURNED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda pixels: pixels[:, ::-1], 3: lambda pixels: pixels[::-1, ::-1], 4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1), 6: np.rot90, 7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, -1),
}  # fmt: skip  # the upright pixels as a picture of this EXIF orientation has them in its file
STRIP = 2**18  # pixels that are converted or scaled at a time, which saves memory and lets other threads work

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns or raises, by size; `decode` has one limit that raises

_constants: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # of `normalise`, by its arguments


def decode(
    data: Data, max_pixels: int = MAX_PIXELS, max_aspect: float = math.inf, patience: float | None = None
) -> NDArray[Any]:
    """Decode one encoded image to upright RGB. All that are decoded at a time, or not yet done with, share `ROOM`.

    Args:
        data: the bytes of a JPEG, PNG, WebP, BMP or TIFF file. Of several frames the first counts.
        max_pixels: the largest accepted width times height.
        max_aspect: the largest accepted ratio of the longer to the shorter side.
        patience: seconds to wait for room; None: as long as it takes.

    Returns:
        uint8 array of shape (height, width, 3), upright, with transparency blended on white; of 16 bits, uint16 of
        this shape, or (height, width) where it is grey, for `fit` to scale.

    Raises:
        ImageError: when the bytes are no such image, are damaged, or hold too many pixels.
        NoRoom: when there is too little memory.
    """
    taken = kept = 0
    try:
        with opened(data) as image:
            width, height = image.size
            low = [_low_bytes(tile) for tile in image.tile] or [None]  # WebP has no such parts
            if width * height * (1 + all(low)) > max_pixels:
                bits = " of 16 bits, which count twice" * all(low)
                raise ImageError(f"the image has {width}x{height} pixels{bits}, more than the limit of {max_pixels}")
            if max(width, height) > max_aspect * min(width, height):
                raise ImageError(f"the image has {width}x{height} pixels, more than {max_aspect} times as long as wide")
            check_work(image, data)
            size = memory_of(image, data, all(low))
            ROOM.take(size, patience)
            taken = size
            pixels = _pixels(image)
            done = not all(low) or (image.has_transparency_data and image.histogram()[-1] < width * height)
        if not done:
            with opened(data) as image:
                image.tile = low
                wide = np.left_shift(pixels, 8, dtype=np.uint16)
                lows = _pixels(image, lambda part: np.asarray(part.convert("RGB")))  # whatever the low bytes of alpha
                pixels = np.bitwise_or(wide, lows[..., 1:2] if low[0].args[0] == "RGBA" else lows, out=wide)
        kept = pixels.nbytes
        weakref.finalize(pixels, ROOM.give, kept)
        return pixels
    except (ImageError, NoRoom):
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{len(data)} bytes that are not a readable image (formats: {', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, MemoryError and more
        raise ImageError(f"the image is damaged: {error}") from error
    finally:
        ROOM.give(taken - kept)


def _pixels(image: ImageFile.ImageFile, rgb: Callable[[Image.Image], NDArray[Any]] | None = None) -> NDArray[Any]:
    """Load an image, and turn it upright."""
    if image.format != "TIFF":  # Pillow turns these while it loads them; of PNG, EXIF may follow the pixels
        image.load()
    orientation = _orientation(image)
    image.load()
    depth: tuple[type[Any], list[int]] = (np.uint16, []) if _is_deep(image) else (np.uint8, [3])
    width, height = image.im.size  # `image.size` of a TIFF is that of the upright picture already
    pixels = np.empty([*((width, height) if 4 < orientation < 9 else (height, width)), *depth[1]], depth[0])
    lines = _UNTURNED[orientation](pixels) if orientation in _UNTURNED else pixels
    for top in range(0, height, rows := max(1, STRIP // width)):
        lines[top : top + rows] = (rgb or _to_rgb)(image.crop((0, top, width, min(top + rows, height))))
    return pixels


def _low_bytes(tile: Any) -> Any:
    """A part of a colour image with 16 bits so that Pillow, which keeps the high bytes, takes the low ones; or None."""
    raw, *more = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    if raw == "LA;16B":  # both bytes of grey, and both of alpha
        return tile._replace(args=("RGBA", *more))
    low = str(raw)[:-1] + ("L" if str(raw).endswith("B") else "B")
    return tile._replace(args=(low, *more)) if low.startswith(("RGB;16", "RGBA;16")) else None


def _orientation(image: Image.Image) -> int:
    """Read this tag, and forget EXIF: whatever else is in there, or broken, is nobody's business."""
    if image.format != "TIFF" and EXIF_IN.isdisjoint(image.info):
        return 1
    with suppress(Exception):
        tags, value = [*(exif := image.getexif())], exif.get(ExifTags.Base.Orientation, 1)
        for tag in tags:
            del exif[tag]
        if tags:
            return int(value[0] if isinstance(value, tuple) else value)
    found = _ORIENTATION.search(bytes(image.info.get("exif", b"")))
    return max(found[1] or found[2]) if found else 1


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _to_rgb(image: Image.Image) -> NDArray[Any]:
    if _is_deep(image):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageError(f"pixel mode {image.mode!r} has values outside 0 to 65535 or fractions; save 8 or 16 bits")
        return values  # convert("RGB") would clip all of it to white
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return np.asarray(image.convert("RGB"))


def fit(image: NDArray[Any], size: int, deep: Sequence[int] = DEEP) -> NDArray[np.uint8]:
    """Cut the largest centred square of what `decode` gives, and scale it, with antialiasing, to `size` pixels a side.

    The least and the largest value that 16-bit pictures of the data set have, `deep`, become 0 and 255.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = image[top : top + side, left : left + side]
    if height == width == size and image.dtype == np.uint8:
        return square
    low, high = deep
    grey = ((np.clip(np.arange(65536), low, high) - low) * 256 // (high - low + 1)).astype(np.uint8)
    narrow = np.empty((side, size, 3), np.uint8)  # as Pillow does it: first the lines, rounded, and then the columns
    for first in range(0, side, rows := max(1, STRIP // side)):
        lines = square[first : first + rows]
        if image.dtype == np.uint16:
            lines = grey[lines] if lines.ndim > 2 else np.repeat(grey[lines][:, :, None], 3, axis=2)
        strip = Image.fromarray(lines)
        narrow[first : first + rows] = strip.resize((size, strip.height), Image.Resampling.BILINEAR)
    return np.asarray(Image.fromarray(narrow).resize((size, size), Image.Resampling.BILINEAR))


def normalise(batch: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Turn stored pixels, uint8 (N, height, width, 3), into the model's input, float32 (N, 3, height, width).

    By the mean and deviation of each channel, of pixels scaled to 0..1, these become 0 and 1 over the data set. The
    order in memory is channels_last (not on Apple's GPUs).
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
