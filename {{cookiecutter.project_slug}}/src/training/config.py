"""The hyperparameters: one dataclass from which the command line, the YAML file and the checks all follow.

They arrive as `--name value` arguments (SageMaker's script drivers), or in the JSON variable `SM_HPS` when there are
no arguments. Standard library only: the laptop imports this module too.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal

Auto = Literal["auto"]
SMALL_IMAGE = 64  # pixels a side up to which the small convolutional network is the automatic choice
TORCHVISION_SIZE = 224  # pixels a side for larger pictures
GPU_INSTANCE = re.compile(r"ml\.[gp]\d")  # types of SageMaker's instances that have one


class ConfigurationError(ValueError):
    """A hyperparameter is unknown, mistyped or out of range; the message names it, its value and the fix."""


def _option(default: Any, text: str, shapes_result: bool = True) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": text, "shapes_result": shapes_result})
    return field(default=default, metadata={"help": text, "shapes_result": shapes_result})


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What a training run can be told. `auto` is settled by `resolve` from the data set."""

    model: str = _option("auto", "cnn, one of torchvision's such as resnet18, timm/<name>, or <file>.<Class> in src/")
    model_options: dict[str, Any] = _option({}, "more arguments for the model, as JSON")
    image_size: int | Auto = _option("auto", "pixels a side; auto takes what the data set was packed at")
    epochs: int | Auto = _option("auto", "passes over the training split")
    batch_size: int = _option(64, "images per optimizer step, over all ranks together")
    optimizer: Literal["adamw", "sgd"] = _option("adamw", "adamw, or sgd with Nesterov momentum")
    learning_rate: float | Auto = _option("auto", "peak, after warm-up; auto follows model and optimizer")
    momentum: float = _option(0.9, "of sgd")
    weight_decay: float = _option(0.05, "not applied to biases and normalisation")
    warmup_fraction: float = _option(0.25, "share of all steps with a rising learning rate; cosine decay after it")
    label_smoothing: float = _option(0.1, "0 to below 1")
    ema_decay: float = _option(0.9, "per step, of the averaged weights that are evaluated and exported; 0 = off")
    translate: float = _option(0.125, "augmentation: largest shift, as a share of image_size")
    horizontal_flip: bool = _option(False, "augmentation: true when a mirror image keeps its class")
    crop_scale: float = _option(1.0, "augmentation: smallest share of the area that a random crop keeps; 1 = off")
    colour_jitter: float = _option(0.0, "augmentation: largest relative change of brightness, contrast, saturation")
    erase: float = _option(0.0, "augmentation: probability that a rectangle is erased")
    mixup: float = _option(0.0, "alpha of the Beta distribution that two images are blended by; 0 = off")
    cutmix: float = _option(0.0, "the same for a rectangle pasted from another image; with mixup each step picks one")
    augment: Literal["none", "trivial"] = _option("none", "trivial: one random operation an image (TrivialAugment)")
    rotate: float = _option(0.0, "augmentation: largest turn, in degrees")
    sampling: Literal["shuffled", "balanced"] = _option("shuffled", "balanced: an epoch has as many of each class")
    class_weights: Literal["none", "balanced"] = _option("none", "balanced: the loss of rare classes counts more")
    pretrained: Literal["auto", "none", "default"] = _option(
        "auto", "weights to start from: published ones where they can be had; default: or fail; a channel goes before"
    )
    frozen_stages: int = _option(0, "first stages of the model whose weights stay as they are")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _option(
        "auto", "of autocast; auto: bf16 where the hardware has it, else fp16 on GPUs that are fast in it"
    )
    compile: bool | Auto = _option("auto", "torch.compile; auto: when the run is long enough to repay it")
    shuffle_gigabytes: float = _option(8.0, "a larger data set is shuffled in windows of this size")
    accumulate: int = _option(1, "parts that a batch is computed in, one after the other, to save memory")
    clip_gradients: float = _option(0.0, "largest norm of all gradients together; 0 = off")
    sync_batch_norm: bool = _option(False, "batch normalisation over the batch of all ranks instead of each rank's own")
    deterministic: bool = _option(False, "only operations that give the same bytes every time; slower on GPUs")
    evaluate_every: int = _option(1, "epochs between evaluations; the last one is always evaluated")
    keep: Literal["best", "last"] = _option("best", "the epoch whose weights are exported")
    keep_by: Literal["accuracy", "loss", "f1"] = _option("accuracy", "what best means, on the validation split")
    patience: int = _option(0, "evaluations in a row without a better one that end training; 0 = off")
    seed: int = _option(0, "of initial weights, sample order and augmentation")
    checkpoint_minutes: float = _option(5.0, "between checkpoints inside an epoch", shapes_result=False)
    max_restarts: int = _option(0, "of all ranks after one has died, on one host", shapes_result=False)
    peer_timeout_seconds: float = _option(600.0, "a rank waits for the others, then fails", shapes_result=False)

    def __post_init__(self) -> None:
        # A quote would break the SDK's environment file.
        if "'" in json.dumps(self.model_options):
            raise ConfigurationError(f"model_options is {shown(self.model_options)}; it must hold no single quote")
        if not re.fullmatch(r"(timm/)?\w[\w.-]*", self.model, re.ASCII):
            raise ConfigurationError(f"model is {shown(self.model)}; it must be letters, digits, dots and underscores")
        for name, most in {"image_size": 4096, "epochs": 10**6, "batch_size": 10**6, "accumulate": 1024,
                           "evaluate_every": 10**6}.items():  # fmt: skip
            value = getattr(self, name)
            if value != "auto" and not 1 <= value <= most:
                raise ConfigurationError(f"{name} is {value}; it must be at least 1 and at most {most}")
        ranges: dict[str, tuple[float, float]] = {
            "momentum": (0, 1),
            "weight_decay": (0, 1000),
            "label_smoothing": (0, 1),
            "ema_decay": (0, 1),
            "warmup_fraction": (0, 1),
            "translate": (0, 1),
            "rotate": (0, 181),
            "mixup": (0, 100),
            "cutmix": (0, 100),
            "clip_gradients": (0, 10**6),
            "frozen_stages": (0, 1000),
            "shuffle_gigabytes": (1e-6, 10**6),
            "checkpoint_minutes": (0, 10**6),
            "patience": (0, 10**6),
            "max_restarts": (0, 100),
            "peer_timeout_seconds": (1, 10**6),
            "seed": (0, 2**32),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value < high:
                raise ConfigurationError(f"{name} is {value}; it must be at least {low} and below {high}")
        for name, least in {"crop_scale": 0.01, "colour_jitter": 0, "erase": 0}.items():
            value = getattr(self, name)
            if not least <= value <= 1:
                raise ConfigurationError(f"{name} is {value}; it must be at least {least} and at most 1")
        if self.class_weights == self.sampling == "balanced":
            raise ConfigurationError(
                "sampling and class_weights are both balanced, which counts rare classes twice; choose one of the two"
            )
        if self.learning_rate != "auto" and not 0 < self.learning_rate < 1000:
            raise ConfigurationError(f"learning_rate is {self.learning_rate}; it must be above 0 and below 1000")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the fields."""
        return asdict(self)

    def shaping(self) -> dict[str, Any]:
        """Those values that shape the result: a resumed run must keep them."""
        return {option.name: getattr(self, option.name) for option in fields(self) if option.metadata["shapes_result"]}


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known ones, or all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(choices)}"


def shown(value: object) -> str:
    """A value as messages show it: on one line, of bounded length."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"


def parse(values: Mapping[str, object]) -> Hyperparameters:
    """Build the hyperparameters from names and values, text included (`"true"`, `"None"`, `"1e-3"`).

    Raises:
        ConfigurationError: for an unknown name or a value that does not fit.
    """
    kinds = typing.get_type_hints(Hyperparameters)
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds:
            word = shown(name).strip("'")
            raise ConfigurationError(f"{word} is no hyperparameter (value {shown(value)}); {nearest(word, kinds)}")
        parsed[name] = _convert(name, value, kinds[name])
    return Hyperparameters(**parsed)


def _convert(name: str, value: object, kind: Any) -> object:
    """Fit one value to the type of its field; text counts as the value that it spells."""
    text = str(value).strip()
    accepted: list[str] = []
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    for choice in typing.get_args(kind) if union else (kind,):
        if typing.get_origin(choice) is Literal:
            names = typing.get_args(choice)
            if text.lower() in names:
                return text.lower()
            accepted.extend(names)
        elif choice is bool:
            if text.lower() in ("true", "1", "yes"):
                return True
            if text.lower() in ("false", "0", "no"):
                return False
            accepted.extend(["true", "false"])
        elif typing.get_origin(choice) is dict:
            with contextlib.suppress(ValueError):
                found = value if isinstance(value, dict) else json.loads(text)
                if isinstance(found, dict):
                    return found
            accepted.append("a JSON object")
        elif choice is str:
            if text and isinstance(value, str):
                return text
            accepted.append("text")
        else:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if math.isfinite(number) and (choice is float or number.is_integer()):
                return choice(number)
            accepted.append("a whole number" if choice is int else "a number")
    raise ConfigurationError(f"{name} is {shown(value)}; it must be {' or '.join(accepted)}")


def from_command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> Hyperparameters:
    """Read `--name value` arguments; without any, the JSON object in `SM_HPS`.

    Raises:
        ConfigurationError: for an unknown name, a missing value or one that does not fit.
    """
    if not arguments:
        given = json.loads(environment.get("SM_HPS") or "{}")  # a tuner adds names of its own to them
        return parse({name: value for name, value in given.items() if not name.startswith(("sagemaker_", "_"))})
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, description="Train an image classifier.")
    for option in fields(Hyperparameters):
        text = f"{option.metadata['help']} (default: {'{}' if option.default is MISSING else option.default})"
        parser.add_argument(f"--{option.name}", metavar="VALUE", default=argparse.SUPPRESS, help=text)
    try:
        known, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigurationError(str(error)) from None
    if unknown:
        names = [option.name for option in fields(Hyperparameters)]
        raise ConfigurationError(f"unknown argument {unknown[0]!r}; {nearest(unknown[0].lstrip('-'), names)}")
    return parse(vars(known))


def resolve(hyperparameters: Hyperparameters, image_size: int, train_images: int) -> Hyperparameters:
    """Settle every `auto` from the packed data set.

    Args:
        hyperparameters: as given.
        image_size: pixels a side of the packed images.
        train_images: rows of the training split.

    Raises:
        ConfigurationError: when `image_size` was given and is not the size of the packed images.
    """
    if hyperparameters.image_size not in ("auto", image_size):
        raise ConfigurationError(
            f"image_size is {hyperparameters.image_size}, but the data set was packed at {image_size}; "
            f"pack it again (`make data`) or set image_size to auto"
        )
    model = hyperparameters.model
    if model == "auto":
        model = "cnn" if image_size <= SMALL_IMAGE else "resnet18"
    epochs = hyperparameters.epochs
    if epochs == "auto":  # about 40,000 images seen: enough for a small set, a first look at a large one
        epochs = min(max(round(40_000 / train_images), 10), 60 if model == "cnn" else 30)
    learning_rate = hyperparameters.learning_rate
    if learning_rate == "auto":
        learning_rate = 0.1 if hyperparameters.optimizer == "sgd" else 0.02 if model == "cnn" else 0.001
    return replace(hyperparameters, model=model, image_size=image_size, epochs=epochs, learning_rate=learning_rate)
