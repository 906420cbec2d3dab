"""Augmentation of whole batches, on the device: while the pixels are still uint8 as far as that goes.

What happens to a sample depends on (seed, epoch, sample) alone: not on the rank, the batch or the step, so a run on
two ranks sees what a run on one rank sees. Each augmentation has a random stream of its own (flips follow shifts in
theirs), so switching one on leaves the choices of the others as they were. Only `feed.mix` joins samples of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from training.config import Hyperparameters
from training.data import send

Moves = NDArray[np.floating[Any]]
LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue (ITU-R BT.601)
CROP_ASPECT = 4 / 3  # as in Szegedy et al. 2015, "Going deeper with convolutions"
# What TrivialAugment's operations do at full strength in its space "wide" (Müller and Hutter 2021): pixels, radians.
MOVES = (("shear_right", 0.99), ("shear_down", 0.99), ("right", 32.0), ("down", 32.0), ("turn", math.radians(135)))
CHANGE, BINS, OPERATIONS = 0.99, 31, 14  # of colours and sharpness; steps of strength; operations, with doing nothing
ERASED, ERASED_ASPECT = (0.02, 1 / 3), 10 / 3  # as in Zhong et al. 2017, "Random erasing data augmentation"


@dataclass(frozen=True)
class Augmentation:
    """The random choices of one epoch for every sample of the training split; arrays of length 0 where it is off."""

    flips: NDArray[np.bool_]  # (samples,)
    shifts: NDArray[np.int64]  # (samples, 2): pixels down, pixels right
    crops: NDArray[np.int64]  # (samples, 4), pixels: top, left, height, width
    turns: NDArray[np.float64]  # (samples,): radians
    operations: NDArray[np.int64]  # (samples,): see `_operate`
    strengths: NDArray[np.float64]  # (samples,): of the operations, -1 to 1
    colours: NDArray[np.float32]  # (samples, 3): factors of brightness, contrast, saturation
    holes: NDArray[np.int64]  # (samples, 4), as crops; height and width 0: nothing is erased
    fills: NDArray[np.uint8]  # (samples, 3): the colour of the hole

    def apply(self, images: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Augment a batch.

        Args:
            images: uint8 (N, height, width, 3), left as it is.
            rows: the samples that it holds.

        Returns:
            The same shape, 0 to 255: float32 after a change of colours, else uint8; `images` when all is off.
        """
        on_cpu = images.device.type == "cpu"
        if len(self.flips):
            flips = _send(self.flips[rows], images)
            images = torch.where(flips[:, None, None, None], images.flip(2), images)
        if len(self.shifts):
            shifts = self.shifts[rows]
            images = shift_by_copy(images, shifts) if on_cpu else warp(images, motion(*-shifts.T))
        if len(self.crops):
            images = (crop_by_resize if on_cpu else crop_by_gather)(images, self.crops[rows])
        if len(self.turns):
            images = warp(images, motion(turn=self.turns[rows]))
        if len(self.operations):
            images = _operate(images, self.operations[rows], self.strengths[rows])
        if len(self.colours):
            images = change_colours(images, self.colours[rows])
        if len(self.holes):
            images = (erase_by_copy if on_cpu else erase_by_mask)(images, self.holes[rows], self.fills[rows])
        return images


def draw(samples: int, image_size: int, hyperparameters: Hyperparameters, epoch: int) -> Augmentation:
    """Draw an epoch's choices for all `samples` of a split with images of `image_size` pixels a side."""
    seed = hyperparameters.seed
    random = np.random.default_rng([seed, epoch, 1])
    reach = min(round(hyperparameters.translate * image_size), image_size - 1)
    shifts = random.integers(-reach, reach, size=(samples, 2), endpoint=True)
    flips = random.random(samples if hyperparameters.horizontal_flip else 0) < 0.5

    random = np.random.default_rng([seed, epoch, 2])
    scale = hyperparameters.crop_scale
    crops = _rectangles(random, samples if scale < 1 else 0, image_size, (scale, 1.0), CROP_ASPECT)

    random = np.random.default_rng([seed, epoch, 7])
    turned = samples if hyperparameters.rotate else 0
    turns = np.radians(hyperparameters.rotate) * random.uniform(-1, 1, size=turned)

    random = np.random.default_rng([seed, epoch, 8])
    trivial = samples if hyperparameters.augment == "trivial" else 0
    operations = random.integers(0, OPERATIONS, size=trivial)
    strengths = random.integers(0, BINS, size=trivial) / (BINS - 1) * random.choice((-1, 1), size=trivial)

    random = np.random.default_rng([seed, epoch, 3])
    strength = hyperparameters.colour_jitter
    colours = 1 + strength * random.uniform(-1, 1, size=(samples if strength else 0, 3))

    random = np.random.default_rng([seed, epoch, 4])
    erasable = samples if hyperparameters.erase else 0
    holes = _rectangles(random, erasable, image_size, ERASED, ERASED_ASPECT)
    fills = random.integers(0, 256, size=(erasable, 3), dtype=np.uint8)
    holes[random.random(erasable) >= hyperparameters.erase, 2:] = 0
    moved = shifts if reach else shifts[:0]
    return Augmentation(flips, moved, crops, turns, operations, strengths, colours.astype(np.float32), holes, fills)


def _rectangles(
    random: np.random.Generator, samples: int, size: int, shares: tuple[float, float], aspect: float
) -> NDArray[np.int64]:
    """Draw rectangles inside a square of `size` pixels.

    Their areas are uniform between two shares of the square, their aspect ratios log-uniform between 1 / aspect and
    aspect: of those that fit into the square, so none has to be drawn again.

    Returns:
        (samples, 4), pixels: top, left, height, width; at least one pixel high and wide.
    """
    areas = random.uniform(*shares, size=samples)
    stretch = random.uniform(-0.5, 0.5, size=samples) * np.minimum(math.log(aspect), -np.log(areas))
    sides = np.sqrt(areas) * np.exp([stretch, -stretch])
    extents = np.clip(np.rint(sides.T * size), 1, size).astype(np.int64)
    corners = random.integers(0, size - extents, endpoint=True)
    return np.concatenate([corners, extents], axis=1)


def _send(array: Any, images: torch.Tensor) -> torch.Tensor:
    """To the device of `images`; a tensor is there."""
    return array if isinstance(array, torch.Tensor) else send(torch.from_numpy(array), images.device)


def shift_by_copy(images: torch.Tensor, shifts: NDArray[np.int64]) -> torch.Tensor:
    """Move each image, filling with zeros: as `warp`, but one slice copy an image, the fastest way on a CPU."""
    source = images.numpy()
    moved = np.zeros_like(source)
    height, width = source.shape[1:3]
    for index, (down, right) in enumerate(shifts.tolist()):
        moved[index, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = source[
            index, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
        ]
    return torch.from_numpy(moved)


def crop_by_resize(images: torch.Tensor, crops: NDArray[np.int64]) -> torch.Tensor:
    """Enlarge a part of each image to the whole, bilinearly: one resize an image, the fastest way on a CPU.

    Torch resizes uint8 with vector instructions: 20 times as fast as grid_sample at 224 pixels, as fast at 32.
    """
    result = torch.empty_like(images)
    size = images.shape[1:3]
    for index, (top, left, height, width) in enumerate(crops.tolist()):
        part = images[index : index + 1, top : top + height, left : left + width].permute(0, 3, 1, 2)
        large = functional.interpolate(part, size, mode="bilinear", align_corners=False)
        result[index] = large[0].permute(1, 2, 0)
    return result


def crop_by_gather(images: torch.Tensor, crops: NDArray[np.int64]) -> torch.Tensor:
    """Enlarge a part of each image to the whole, bilinearly: rows, then columns, in a few kernels for the batch."""
    count, height, width, _ = images.shape
    part = _send(crops, images)
    sample = torch.arange(count, device=images.device)[:, None]
    low, high, weight = _neighbours(part[:, :1], part[:, 2:3], height)
    tall = torch.lerp(images[sample, low].float(), images[sample, high].float(), weight[:, :, None, None])
    sample, row = sample[:, None], torch.arange(height, device=images.device)[:, None]
    low, high, weight = _neighbours(part[:, 1:2], part[:, 3:], width)
    whole = torch.lerp(tall[sample, row, low[:, None]], tall[sample, row, high[:, None]], weight[:, None, :, None])
    return whole.round_().to(torch.uint8)


def _neighbours(start: torch.Tensor, length: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """For `size` pixels spread over a part (N, 1) of a line: both stored neighbours and the weight of the second."""
    centres = (torch.arange(size, device=start.device) + 0.5) * length / size - 0.5
    place = torch.minimum(centres.clamp(min=0), length - 1)
    low = place.long()
    return start + low, start + torch.minimum(low + 1, length - 1), place - low


def motion(down: Any = 0.0, right: Any = 0.0, shear_down: Any = 0.0, shear_right: Any = 0.0, turn: Any = 0.0) -> Moves:
    """Matrices (N, 2, 3) for `warp`: from the place of a pixel about the centre to the place that it comes from."""
    cos, sin, *rest = np.broadcast_arrays(np.cos(turn), np.sin(turn), down, right, shear_down, shear_right)
    down, right, shear_down, shear_right = rest
    matrices = np.array([[cos, sin + shear_down, down], [shear_right - sin, cos, right]], dtype=np.float32)
    return matrices.transpose(2, 0, 1)


def warp(images: torch.Tensor, moves: Moves) -> torch.Tensor:
    """Turn, shear and move each image, to the nearest pixel, filling with zeros: one gather a batch."""
    count, height, width, _ = images.shape
    down, right = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    matrices = _send(moves, images)[..., None, None]
    middle = (height - 1) / 2, (width - 1) / 2
    places = matrices[:, :, 0] * (down - middle[0]) + matrices[:, :, 1] * (right - middle[1]) + matrices[:, :, 2]
    rows, columns = (places[:, 0] + middle[0]).round().long(), (places[:, 1] + middle[1]).round().long()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    sample = torch.arange(count, device=images.device)[:, None, None]
    return images[sample, rows.clamp(0, height - 1), columns.clamp(0, width - 1)] * inside[..., None]


def _operate(images: torch.Tensor, operations: NDArray[np.int64], strengths: NDArray[np.float64]) -> torch.Tensor:
    """Change each uint8 image by the one operation that was drawn for it; the last one is to leave it as it is."""
    changed = images.clone()
    for number in np.unique(operations[operations < OPERATIONS - 1]):
        some = np.flatnonzero(operations == number)
        place, strength = _send(some, images), strengths[some]
        if number < len(MOVES):
            name, most = MOVES[number]
            result = warp(images[place], motion(**{name: min(most, images.shape[1]) * strength}))
        elif number < len(MOVES) + 3:  # brightness, contrast, saturation
            factors = np.ones((len(some), 3), dtype=np.float32)
            factors[:, number - len(MOVES)] += CHANGE * strength
            result = change_colours(images[place], factors)
        else:
            result = OTHERS[number - len(MOVES) - 3](images[place], strength)
        changed[place] = result.round().to(torch.uint8) if result.is_floating_point() else result
    return changed


def sharpen(images: torch.Tensor, strengths: NDArray[np.float64]) -> torch.Tensor:
    """Away from, or towards, the smoothed image, whose border is as it was."""
    pixels = images.permute(0, 3, 1, 2).float()
    smooth, inner = pixels.clone(), pixels[..., 1:-1, 1:-1]
    if inner.numel():
        smooth[..., 1:-1, 1:-1] = (9 * functional.avg_pool2d(pixels, 3, 1) + 4 * inner) / 13
    factors = _send((1 + CHANGE * strengths).astype(np.float32), images)[:, None, None, None]
    return smooth.lerp(pixels, factors).clamp(0, 255).permute(0, 2, 3, 1)


def posterise(images: torch.Tensor, strengths: NDArray[np.float64]) -> torch.Tensor:
    """Keep the 8 to 2 highest bits."""
    lost = np.rint(6 * np.abs(strengths)).astype(np.int64)
    return images & _send((256 - 2**lost).astype(np.uint8), images)[:, None, None, None]


def solarise(images: torch.Tensor, strengths: NDArray[np.float64]) -> torch.Tensor:
    """Invert what is brighter than a threshold."""
    threshold = _send((255 * (1 - np.abs(strengths))).astype(np.float32), images)[:, None, None, None]
    return torch.where(images >= threshold, 255 - images, images)


def stretch(images: torch.Tensor, _: object) -> torch.Tensor:
    """Spread each channel over 0 to 255."""
    low, high = images.amin((1, 2), keepdim=True).float(), images.amax((1, 2), keepdim=True).float()
    return torch.where(high > low, (images - low) * 255 / (high - low).clamp(min=1), images.float())


def equalise(images: torch.Tensor, _: object) -> torch.Tensor:
    """Give each channel a histogram as even as can be, by the arithmetic of Pillow."""
    flat = images.permute(0, 3, 1, 2).flatten(0, 1).flatten(1).long()  # a line for each channel of each image
    line = torch.arange(len(flat), device=images.device)[:, None]
    counts = torch.bincount((flat + 256 * line).flatten(), minlength=256 * len(flat)).view(-1, 256)
    step = (flat.shape[1] - counts.gather(1, flat.amax(1, keepdim=True))) // 255
    table = ((counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    levels = torch.where(step > 0, table.gather(1, flat), flat).to(torch.uint8)
    return levels.view(len(images), 3, *images.shape[1:3]).permute(0, 2, 3, 1)


OTHERS = (sharpen, posterise, solarise, stretch, equalise)


def change_colours(images: torch.Tensor, factors: NDArray[np.float32]) -> torch.Tensor:
    """Scale brightness, then contrast about the image's mean grey, then saturation about each pixel's grey.

    The three are linear, so they are one pass here, and what leaves 0 to 255 is clamped once, at the end.

    Args:
        images: uint8 (N, height, width, 3).
        factors: (N, 3), of brightness, contrast, saturation; 1 changes nothing.

    Returns:
        float32 of the same shape, 0 to 255.
    """
    brightness, contrast, saturation = _send(factors, images)[:, :, None, None].unbind(1)
    pixels = images.float()
    grey = pixels @ send(torch.tensor(LUMA), images.device)
    mean = grey.mean((1, 2), keepdim=True)
    offset = brightness * (contrast * (1 - saturation) * grey + (1 - contrast) * mean)
    return pixels.mul_((brightness * contrast * saturation)[..., None]).add_(offset[..., None]).clamp_(0, 255)


def erase_by_copy(images: torch.Tensor, holes: NDArray[np.int64], fills: NDArray[np.uint8]) -> torch.Tensor:
    """Paint a rectangle of each image in one colour: one slice assignment an image, the fastest way on a CPU."""
    erased = images.numpy().copy()
    for index, (top, left, height, width) in enumerate(holes.tolist()):
        erased[index, top : top + height, left : left + width] = fills[index]
    return torch.from_numpy(erased)


def erase_by_mask(images: torch.Tensor, holes: NDArray[np.int64], fills: NDArray[np.uint8]) -> torch.Tensor:
    """Paint a rectangle of each image in one colour: one selection a batch, the fastest way on an accelerator."""
    top, left, height, width = _send(holes, images)[:, :, None].unbind(1)
    rows = torch.arange(images.shape[1], device=images.device) - top
    columns = torch.arange(images.shape[2], device=images.device) - left
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    colours = _send(fills, images).to(images.dtype)
    return torch.where(inside[..., None], colours[:, None, None], images)
