"""Photographs that nobody prepared: mixed sizes, orientations and colour modes in a raw folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from tests.conftest import Project

CLASSES = ("Stripes down", "stripes across", "dots")
FLOOR = 0.85  # chance is 0.33
SETTINGS = "--set training.model=cnn --set training.image_size=32 --set training.epochs=25"


def photo(kind: str, random: np.random.Generator) -> Image.Image:
    """A noisy picture of 60 to 400 pixels a side. Only upright it shows which way its stripes run."""
    width, height = (int(side) for side in random.integers(60, 400, 2))
    y, x = np.mgrid[:height, :width] * (2 * np.pi * 5 / min(width, height))
    phase = random.uniform(0, 6.3, 2)
    wave = {
        "Stripes down": np.sin(x + phase[0]),
        "stripes across": np.sin(y + phase[0]),
        "dots": np.sin(x + phase[0]) * np.sin(y + phase[1]),
    }[kind]
    colour = random.uniform(0.5, 1.0, 3)
    pixels = 128 + 70 * wave[..., None] * colour + random.normal(0, 25, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def store(image: Image.Image, path: Path, number: int) -> None:
    """Write a JPEG: every third turned with an EXIF orientation that undoes it, in RGB, grey or CMYK."""
    exif = Image.Exif()
    turned = {0: (Image.Transpose.ROTATE_90, 6), 1: (Image.Transpose.ROTATE_270, 8)}.get(number % 3)
    if turned:
        image = image.transpose(turned[0])
        exif[0x0112] = turned[1]
    image.convert(("RGB", "L", "CMYK")[number % 5 % 3]).save(path, quality=85, exif=exif)


def store_all(folder: Path) -> None:
    """300 JPEGs in three classes."""
    random = np.random.default_rng(0)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for number in range(100):
            store(photo(kind, random), folder / kind / f"IMG {number}.JPG", number)


def accuracy(project: Project) -> float:
    """Of the newest run, on the test split of `store_all`."""
    project.make("evaluate")
    result = json.loads((project.path / "artifacts" / "latest" / "evaluation.json").read_text())
    assert result["images"] == 45
    assert result["classes"] == sorted(CLASSES)
    return float(result["metrics"]["accuracy"]["value"])


INSECTS = {"ants": (3, 0), "bees": (3, 24)}  # parts of the body, and how much their stripes stand out
SHAPES = {
    f"{parts} parts{' striped' * bool(stripes)}": (parts, stripes) for parts in (1, 2, 3, 4) for stripes in (0, 80)
}


def insect(parts: int, stripes: float, noise: tuple[float, float], random: np.random.Generator) -> Image.Image:
    """A body of some parts, anywhere and turned, before noise that falls with its frequency as nature's does."""
    height, width = (int(side) for side in random.integers(150, 260, 2))
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    strength = np.maximum(np.hypot(fx, fy), 1 / max(height, width)) ** -1.2
    phases = np.exp(2j * np.pi * random.random((3, *strength.shape)))
    waves = np.stack([np.fft.irfft2(strength * phase, (height, width)) for phase in phases], axis=-1)
    waves = 0.35 * waves + waves.mean(axis=-1, keepdims=True)
    pixels = random.uniform(90, 150) + random.uniform(*noise) * waves / waves.std()
    length, turn = random.uniform(0.5, 0.8) * min(height, width), random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width] - np.array([height, width])[:, None, None] * random.uniform(0.35, 0.65, (2, 1, 1))
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    colour = random.uniform(10, 90, 3) if random.random() < 0.7 else random.uniform(160, 240, 3)
    body = colour + random.normal(0, 10, pixels.shape) + stripes * (np.sin(along * 18 * np.pi / length) > 0)[..., None]
    for number in range(parts):
        place, thick = (number + 0.5 - parts / 2) * length / parts, random.uniform(0.08, 0.12) * length
        inside = ((along - place) / (0.52 * length / parts)) ** 2 + (across / thick) ** 2 < 1
        pixels = np.where(inside[..., None], body, pixels)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def store_insects(folder: Path, kinds: dict[str, tuple[int, int]], each: int, noise: tuple[float, float]) -> None:
    """So many JPEGs of each kind."""
    random = np.random.default_rng(each)
    for kind, (parts, stripes) in kinds.items():
        (folder / kind).mkdir(parents=True)
        for number in range(each):
            insect(parts, stripes, noise, random).save(folder / kind / f"{number}.jpg", quality=88)
