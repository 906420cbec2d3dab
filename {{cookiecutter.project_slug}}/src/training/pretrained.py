"""Start from weights that were trained before: a file in the channel `pretrained`, or torchvision's published ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from model import CNN, ModelError

logger = logging.getLogger("training")
SUFFIXES = (".safetensors", ".pth", ".pt")


def find_weights(place: Path) -> Path:
    """The file of weights: `place` itself, or the one that the folder holds.

    Raises:
        ModelError: when there is none, or more than one.
    """
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.suffix in SUFFIXES)
    if len(files) != 1:
        found = ", ".join(path.name for path in files[:3]) or "none"
        raise ModelError(f"{place} must hold one file of weights ({' '.join(SUFFIXES)}); found: {found}")
    return files[0]


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name. Pickles are read as tensors only.

    Raises:
        ModelError: when the file holds something else.
    """
    try:
        content: Any = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # both libraries raise kinds of their own
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{file} holds no weights that can be read: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ModelError(f"{file} holds no tensors by name; save a model's state_dict")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def published_weights(name: str) -> dict[str, torch.Tensor]:
    """Torchvision's `DEFAULT` weights of a classifier, downloaded or from its cache.

    Raises:
        ModelError: when the model has none or they cannot be had.
    """
    if name == CNN:
        raise ModelError(f"model {CNN} has no published weights; set pretrained to none, or model to resnet18")
    from torchvision import models

    try:
        weights: Any = models.get_model_weights(name).DEFAULT
        state: dict[str, torch.Tensor] = weights.get_state_dict(progress=False, check_hash=True)
        return state
    except (OSError, AttributeError) as error:
        raise ModelError(
            f"the published weights of {name} cannot be had ({error}); give a file of weights as data.pretrained"
        ) from error


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load all that fits; the head may differ when the classes do, and starts anew then.

    Raises:
        ModelError: when anything but the head does not fit.
    """
    own = model.state_dict()
    head = list(dict(model.named_parameters()))[-1].rpartition(".")[0]
    misfits = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    misfits = [name for name in misfits if not name.endswith("num_batches_tracked")]
    strange = [name for name in misfits if name.rpartition(".")[0] != head]
    if strange:
        theirs = list(weights[strange[0]].shape) if strange[0] in weights else "missing"
        raise ModelError(
            f"the weights do not fit the model: {len(strange)} of {len(own)} tensors differ, the first is {strange[0]} "
            f"({theirs}, wanted {list(own[strange[0]].shape)}); set model to the one that they were trained for"
        )
    fitting = {name: weights.get(name, value) for name, value in own.items() if name not in misfits}
    model.load_state_dict(fitting, strict=False)
    anew = f"; a new head for {own[misfits[0]].shape[0]} classes ({', '.join(misfits)})" if misfits else ""
    logger.info("pretrained weights: %d of %d tensors%s", len(own) - len(misfits), len(own), anew)


def freeze(model: nn.Module, stages: int) -> None:
    """Keep the weights of the first stages as they are: a stage is a child of the model (or of its one trunk).

    Raises:
        ModelError: when nothing would be left to train.
    """
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    if len(children) == 2 and isinstance(children[0], nn.Sequential):  # features and classifier
        children = [child for child in children[0] if any(True for _ in child.parameters())] + children[1:]
    if stages >= len(children):
        raise ModelError(f"frozen_stages is {stages}, but the model has {len(children)} stages; freeze fewer")
    for child in children[:stages]:
        child.requires_grad_(False)
    if stages:
        frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        logger.info("frozen: %d of %d stages, %s parameters", stages, len(children), f"{frozen:,}")


def train_mode(model: nn.Module) -> None:
    """Training mode, but for what is frozen: its batch norm keeps its statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
