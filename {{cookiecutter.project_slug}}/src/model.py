"""Build a classifier by name: the small convolutional network, or any classifier of torchvision.

This file travels inside the artifact (`code/model.py`), so it imports nothing else of the project, and
torchvision, which takes seconds to import, only where one of its models is asked for.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

CNN = "cnn"


class ModelError(ValueError):
    """The model cannot be built; the message says why and what to do."""


class SmallCNN(nn.Sequential):
    """Pairs of 3x3 convolutions; each next pair at half the size and twice the width, down to 4 pixels a side.

    Input (N, 3, size, size), output (N, num_classes). At 8 pixels a side it has 38 thousand parameters.
    """

    def __init__(self, num_classes: int, image_size: int, width: int = 24) -> None:
        layers: list[nn.Module] = []
        channels = 3
        while True:
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
                channels = width
            if image_size < 8 or width >= 384:
                break
            layers.append(nn.MaxPool2d(2))
            image_size //= 2
            width *= 2
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def build_model(name: str, num_classes: int, image_size: int) -> nn.Module:
    """Build a classifier with random weights.

    Args:
        name: `cnn`, or a classifier's name in torchvision.
        num_classes: width of the output.
        image_size: pixels a side of the input.

    Returns:
        A module from float (N, 3, image_size, image_size) to logits (N, num_classes).

    Raises:
        ModelError: for an unknown name, or when torchvision is needed and missing.
    """
    if name == CNN:
        return SmallCNN(num_classes, image_size)
    try:
        from torchvision import models
    except ImportError as error:
        raise ModelError(
            f"model {name!r} comes from torchvision, which cannot be imported here ({error}); "
            f"add torchvision to the image's packages, or set model to {CNN}"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see torchvision.models.list_models()"
        raise ModelError(f"unknown model {name!r}: neither {CNN} nor a torchvision classifier; {hint}")
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # one output, as every other model has
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    try:
        model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
        return model
    except (ValueError, AssertionError) as error:
        raise ModelError(f"model {name!r} cannot take {image_size}x{image_size} images: {error}") from error


def best_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
