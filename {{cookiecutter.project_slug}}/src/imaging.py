"""Decode, fit, normalise and encode images: the only image code of the project.

Training data and requests take the same way, so a model never meets pixels that were prepared differently:
`decode` and `fit` serve preprocessing and inference, `normalise` serves training, evaluation and inference.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 100_000_000  # 300 MB once decoded; a larger header is refused before any pixel is read
BACKGROUND = (255, 255, 255)  # what transparent pixels are blended on

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns or raises, by size; `decode` has one limit that raises

_constants: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # of `normalise`, by its arguments


class ImageError(ValueError):
    """The bytes are not an image that this project can read; the message says why."""


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
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"the image has {width}x{height} pixels, more than the limit of {max_pixels}")
            if max(width, height) > max_aspect * min(width, height):
                raise ImageError(f"the image has {width}x{height} pixels, more than {max_aspect} times as long as wide")
            image.load()
            return np.ascontiguousarray(_to_rgb(ImageOps.exif_transpose(image)))
    except ImageError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError(f"{len(data)} bytes that are not a readable image (formats: {known})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, MemoryError and more
        raise ImageError(f"the image is damaged: {error}") from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageError(f"pixel mode {image.mode!r} has values outside 0 to 65535; save it as 8 or 16 bits")
        grey = (values.astype(np.uint32) >> 8).astype(np.uint8)  # convert("RGB") would clip all of it to white
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return np.asarray(image.convert("RGB"))


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
