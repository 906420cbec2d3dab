"""Augmentation of whole batches, on the device, while the pixels are still uint8.

What happens to a sample depends on (seed, epoch, sample) alone: not on the rank, the batch or the step, so a run on
two ranks sees what a run on one rank sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Augmentation:
    """The random choices of one epoch for every sample of the training split."""

    shifts: NDArray[np.int64]  # (samples, 2): pixels down, pixels right
    flips: NDArray[np.bool_]  # (samples,)

    def apply(self, images: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Augment the uint8 batch (N, height, width, 3) that holds the samples `rows`."""
        if self.flips.any():
            flips = torch.from_numpy(self.flips[rows]).to(images.device)
            images = torch.where(flips[:, None, None, None], images.flip(2), images)
        if self.shifts.any():
            shifts = self.shifts[rows]
            images = shift_by_copy(images, shifts) if images.device.type == "cpu" else shift_by_gather(images, shifts)
        return images


def draw(samples: int, image_size: int, translate: float, flip: bool, seed: int, epoch: int) -> Augmentation:
    """Draw an epoch's choices: shifts up to `translate * image_size` pixels, a horizontal flip for one half."""
    random = np.random.default_rng([seed, epoch, 1])
    reach = min(round(translate * image_size), image_size - 1)
    shifts = random.integers(-reach, reach, size=(samples, 2), endpoint=True)
    flips = random.random(samples) < 0.5 if flip else np.zeros(samples, dtype=np.bool_)
    return Augmentation(shifts=shifts, flips=flips)


def shift_by_copy(images: torch.Tensor, shifts: NDArray[np.int64]) -> torch.Tensor:
    """Move each image, filling with zeros: one slice copy an image, the fastest way on a CPU."""
    source = images.numpy()
    moved = np.zeros_like(source)
    height, width = source.shape[1:3]
    for index, (down, right) in enumerate(shifts.tolist()):
        moved[index, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = source[
            index, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
        ]
    return torch.from_numpy(moved)


def shift_by_gather(images: torch.Tensor, shifts: NDArray[np.int64]) -> torch.Tensor:
    """Move each image, filling with zeros: one gather a batch, the fastest way on an accelerator."""
    count, height, width, _ = images.shape
    offsets = torch.from_numpy(shifts).to(images.device, non_blocking=True)
    rows = torch.arange(height, device=images.device) - offsets[:, :1]
    columns = torch.arange(width, device=images.device) - offsets[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    sample = torch.arange(count, device=images.device)[:, None, None]
    moved = images[sample, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return moved * inside[..., None]
