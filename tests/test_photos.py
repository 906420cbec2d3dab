"""Photographs that nobody prepared, where no engine answers; `test_generated.py` trains on them in a container."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Project
from tests.photos import FLOOR, SETTINGS, accuracy


def test_an_untrained_model_is_below_the_floor(ready: Project, photos: Path) -> None:
    settings = SETTINGS.replace("epochs=25", "epochs=1") + " --set training.learning_rate=1e-9"
    ready.make("train-local", f"DATA={photos}", "LOCAL_MODE=process", f"ARGS={settings}")
    assert accuracy(ready) < FLOOR


def test_large_photos_choose_a_torchvision_model(ready: Project, photos: Path) -> None:
    done = ready.make("train-local", f"DATA={photos}", "LOCAL_MODE=process", "ARGS=--set training.epochs=1")
    assert "packed 3 classes at 224 pixels" in done.stdout
    assert "model=resnet18 model_options={} image_size=224" in done.stdout
