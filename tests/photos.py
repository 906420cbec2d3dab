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
