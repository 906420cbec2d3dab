"""Hyperparameters and settings: every way in gives the same run, and every mistake one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipelines import ROOT
from pipelines.config import load
from pipelines.terminal import UserError
from training.config import ConfigurationError, Hyperparameters, from_command_line, parse, resolve


def test_arguments_json_and_plain_values_give_the_same_hyperparameters() -> None:
    wanted = Hyperparameters(model="resnet18", epochs=3, learning_rate=0.001, horizontal_flip=True, precision="fp32")
    values = {"model": "resnet18", "epochs": 3, "learning_rate": 1e-3, "horizontal_flip": True, "precision": "fp32"}
    arguments = ["--model", "resnet18", "--epochs", "3", "--learning_rate", "1e-3", "--horizontal_flip", "true"]
    assert parse(values) == wanted
    assert from_command_line([*arguments, "--precision", "fp32"], {}) == wanted
    assert from_command_line([], {"SM_HPS": json.dumps(values)}) == wanted
    assert parse({name: str(value) for name, value in values.items()}) == wanted  # the tuner sends all as text


@pytest.mark.parametrize(("text", "value"), [("True", True), ("TRUE", True), ("1", True), ("False", 0), ("no", 0)])
def test_booleans_in_any_case(text: str, value: bool) -> None:
    assert parse({"horizontal_flip": text}).horizontal_flip is bool(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "epoch is no hyperparameter (value 3); did you mean epochs"),
        ({"epochs": "three"}, "epochs is 'three'; it must be a whole number or auto"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number or auto"),
        ({"epochs": True}, "epochs is True"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1 and at most 1000000"),
        ({"epochs": 10**7}, "epochs is 10000000; it must be at least 1 and at most 1000000"),
        ({"batch_size": None}, "batch_size is None; it must be a whole number"),
        ({"learning_rate": -1}, "learning_rate is -1.0; it must be above 0 and below 1000"),
        ({"learning_rate": "nan"}, "learning_rate is 'nan'; it must be a number or auto"),
        ({"ema_decay": 1}, "ema_decay is 1.0; it must be at least 0 and below 1"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; it must be adamw or sgd"),
        ({"horizontal_flip": "maybe"}, "horizontal_flip is 'maybe'; it must be true or false"),
        ({"model": "it's"}, 'model is "it\'s"; it must be letters, digits, dots and underscores'),
    ],
)
def test_wrong_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse(values)
    assert message in str(error.value)


def test_an_unknown_argument_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown argument '--lr'; known: .*learning_rate"):
        from_command_line(["--lr", "0.1"], {})
    with pytest.raises(ConfigurationError, match="--epochs"):
        from_command_line(["--epochs"], {})


def test_auto_is_settled_by_the_data_set() -> None:
    small = resolve(Hyperparameters(), image_size=28, train_images=1250)
    large = resolve(Hyperparameters(), image_size=224, train_images=1250)
    assert (small.model, small.image_size, small.epochs, small.learning_rate) == ("cnn", 28, 32, 0.02)
    assert (large.model, large.image_size, large.epochs, large.learning_rate) == ("resnet18", 224, 30, 0.001)
    assert resolve(Hyperparameters(optimizer="sgd"), 28, 10**6).learning_rate == 0.1
    with pytest.raises(ConfigurationError, match="image_size is 64, but the data set was packed at 28"):
        resolve(Hyperparameters(image_size=64), image_size=28, train_images=10)


def test_the_files_override_order() -> None:
    environment = {"TRAINING__EPOCHS": "7", "IMAGES__BUILD_OPTIONS": '["--network", "host"]', "training__seed": "x"}
    settings = load(["training.seed=5", "data.source=a=b"], environment)
    assert (settings.training.epochs, settings.training.seed, settings.data.source) == (7, 5, "a=b")
    assert settings.images.build_options == ["--network", "host"]
    assert load(["training.epochs=2"], environment).training.epochs == 2
    assert settings.training.as_dict() == load((), {}).training.as_dict() | {"epochs": 7, "seed": 5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "unknown key 'epoch' in training; did you mean epochs"),
        ("trainin.epochs=3", "unknown section 'trainin'; did you mean training"),
        ("training.epochs", "has no value"),
        ("training.epochs=0", "configs: training.epochs is 0; it must be at least 1"),
        ("training.epochs=many", "configs: training.epochs is 'many'"),
        ("compute.local_instances=0", "configs: compute.local_instances is 0"),
        ("compute.local_mode=docker", "configs: compute.local_mode is 'docker'"),
        ("images.packages=torch", "configs: images.packages is 'torch'"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load([override], {})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("training.yaml", "epoch: 3\n", "training.epoch is no hyperparameter (value 3); did you mean epochs"),
        ("training.yaml", "- 1\n", "must hold keys and values"),
        ("training.yaml", "a: [\n", "is not valid YAML"),
        ("infrastructure.yaml", "aws: {regoin: x}\n", "unknown key aws.regoin (value 'x'); did you mean region"),
        ("infrastructure.yaml", "awz: {region: x}\n", "unknown key awz"),
        ("infrastructure.yaml", "aws: {}\n", "aws.region is missing"),
        ("infrastructure.yaml", None, "cannot be read"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    for name in ("training.yaml", "infrastructure.yaml"):
        whole = (ROOT / "configs" / name).read_text(encoding="utf-8")
        if name != file:
            (tmp_path / name).write_text(whole)
        elif text is not None:
            document = yaml.safe_load(whole)
            extra = yaml.safe_load(text) if text.endswith("\n") and "[" not in text else None
            merged = document | extra if isinstance(extra, dict) else None
            (tmp_path / name).write_text(yaml.safe_dump(merged) if merged else text)
    with pytest.raises(UserError) as error:
        load((), {}, tmp_path)
    assert message in str(error.value)
