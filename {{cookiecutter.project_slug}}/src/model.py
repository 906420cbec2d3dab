"""Build a classifier by name: the small convolutional network, your own, or any classifier of torchvision or timm.

This file travels inside the artifact (`code/model.py`), so it imports nothing else of the project, and
torchvision and timm, which take seconds to import, only where one of their models is asked for.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

CNN = "cnn"
TIMM = "timm/"


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


# Your own models by the name that the setting `model` has; called with num_classes, image_size and model_options.
# One in a file of its own beside this one needs no line here: `model: my_net.MyNet` is the class MyNet of my_net.py.
MODELS: dict[str, Callable[..., nn.Module]] = {CNN: SmallCNN}


def build_model(name: str, num_classes: int, image_size: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a classifier with random weights.

    Args:
        name: of `MODELS`, `file.Class`, a classifier's name in torchvision, or timm/ and one in timm.
        num_classes: width of the output.
        image_size: pixels a side of the input.
        options: more arguments for the model.

    Returns:
        A module from float (N, 3, image_size, image_size) to logits (N, num_classes).

    Raises:
        ModelError: for an unknown name, options that do not fit, or when a package is needed and missing.
    """
    more = dict(options or {})
    try:
        if name.startswith(TIMM):
            return _timm(name.removeprefix(TIMM), num_classes, image_size, more)
        if name in MODELS or "." in name:
            return (MODELS.get(name) or _beside(name))(num_classes, image_size, **more)
        return _torchvision(name, num_classes, image_size, more)
    except ModelError:
        raise
    except Exception as error:
        package = "timm" if name.startswith(TIMM) else "torchvision"
        if not isinstance(error, ImportError) or name in MODELS or own_file(name):
            given, size = f" with model_options {more}" if more else "", f"{image_size}x{image_size}"
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(f"model {name!r}{given} cannot be built for {size} images: {reason}") from error
        fix = 'make setup ARGS="--group timm"' if package == "timm" else "add it to the image's packages"
        raise ModelError(
            f"model {name!r} comes from {package}, which cannot be imported here ({error}); {fix}, "
            f"or set model to {CNN}"
        ) from error


def own_file(name: str) -> Path | None:
    """The file beside this one that `file.Class` names; None for every other model."""
    return Path(__file__).with_name(f"{name.partition('.')[0]}.py") if "." in name and TIMM not in name else None


def _beside(name: str) -> Callable[..., nn.Module]:
    file, class_name = own_file(name), name.partition(".")[2]
    spec = importlib.util.spec_from_file_location(f"own_{name.partition('.')[0]}", file) if file else None
    if file is None or not file.is_file() or spec is None or spec.loader is None:
        raise ModelError(f"unknown model {name!r}: there is no file {file}; or add a line to MODELS in model.py; "
                         "timm's are called timm/<name>")  # fmt: skip
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    sys.path.insert(0, str(file.parent))  # for files beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    if not hasattr(module, class_name):
        raise ModelError(f"unknown model {name!r}: {file.name} has no class {class_name}")
    build: Callable[..., nn.Module] = getattr(module, class_name)
    return build


def _timm(name: str, num_classes: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        known = [f"{TIMM}{model}" for model in timm.list_models()]
        raise ModelError(unknown(f"{TIMM}{name}", known, "timm.list_models()"))
    create = functools.partial(timm.create_model, name, num_classes=num_classes, **options)
    try:
        model: nn.Module = create(img_size=image_size)  # those whose weights depend on the size
    except TypeError:
        model = create()
    return model


def _torchvision(name: str, num_classes: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(unknown(name, [*known, *MODELS], "torchvision.models.list_models(), or timm/<name>"))
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True} | options  # one output, as every other model has
    elif name.startswith("vit_"):
        options = {"image_size": image_size} | options
    elif name.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)} | options
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if name.startswith("squeezenet"):  # it ends with a ReLU, below which a class gets no gradient ever again
        model.set_submodule("classifier.2", nn.Identity())
    return model


def unknown(name: str, known: list[str], place: str) -> str:
    """What is said of a name that is not known."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"unknown model {name!r}; " + (f"did you mean {' or '.join(close)}?" if close else f"see {place}")


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], strict: bool = True) -> None:
    """Load tensors by name, with the versions of the model's layers: files lack them, and MNASNet asks for its own."""
    state = model.state_dict()
    state.clear()
    state.update(tensors)
    model.load_state_dict(state, strict=strict)


def best_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
