"""Photographs that nobody prepared: mixed sizes, orientations and colour modes, from a raw folder to a prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 JPEGs in three classes."""
    folder = tmp_path_factory.mktemp("photos") / "holiday photos"
    random = np.random.default_rng(0)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for number in range(100):
            store(photo(kind, random), folder / kind / f"IMG {number}.JPG", number)
    return folder


def accuracy(project: Project) -> float:
    project.make("evaluate")
    result = json.loads((project.path / "artifacts" / "latest" / "evaluation.json").read_text())
    assert result["images"] == 45
    assert result["classes"] == sorted(CLASSES)
    return float(result["metrics"]["accuracy"]["value"])


def test_raw_photos_through_the_container(ready: Project, photos: Path, engine: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in photos.rglob("*")}
    done = ready.make("train-local", f"DATA={photos}", "LOCAL_MODE=container", f"ARGS={SETTINGS}")
    assert "packed 3 classes at 32 pixels: 210 train, 45 validation, 45 test" in done.stdout
    assert json.loads((ready.path / "artifacts" / "latest" / "run.json").read_text())["mode"] == "container"
    assert accuracy(ready) >= FLOOR
    for kind in CLASSES:
        answer = ready.make("predict", f"IMAGE={photos / kind / 'IMG 1.JPG'}", "ARGS=--json").stdout
        probabilities = json.loads(answer)["probabilities"][0]
        assert len(probabilities) == 3
    assert {path: path.stat().st_mtime_ns for path in photos.rglob("*")} == before
    assert engine


def test_an_untrained_model_is_below_the_floor(ready: Project, photos: Path) -> None:
    settings = SETTINGS.replace("epochs=25", "epochs=1") + " --set training.learning_rate=1e-9"
    ready.make("train-local", f"DATA={photos}", "LOCAL_MODE=process", f"ARGS={settings}")
    assert accuracy(ready) < FLOOR


def test_large_photos_choose_a_torchvision_model(ready: Project, photos: Path) -> None:
    done = ready.make("train-local", f"DATA={photos}", "LOCAL_MODE=process", "ARGS=--set training.epochs=1")
    assert "packed 3 classes at 224 pixels" in done.stdout
    assert "model=resnet18 image_size=224" in done.stdout
