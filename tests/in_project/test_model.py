"""Models by name: the small network at any size, and every classifier of torchvision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models

from model import ModelError, SmallCNN, build_model

CLASSIFIERS = sorted(set(models.list_models(module=models)) - {"regnet_y_128gf"})  # 2.6 GB of weights


@pytest.mark.parametrize("size", [1, 5, 8, 28, 32, 64, 100])
def test_small_network_takes_any_size(size: int) -> None:
    model = build_model("cnn", 7, size).eval()
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_small_network_is_small() -> None:
    assert sum(parameter.numel() for parameter in SmallCNN(10, 8).parameters()) == 37_714


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_torchvision_classifier_trains(name: str) -> None:
    size = 299 if name == "inception_v3" else 224
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet computes its widths with tensors
        model = build_model(name, 5, size).to("meta")
    logits = model(torch.zeros(2, 3, size, size, device="meta"))
    nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device="meta")).backward()
    assert logits.shape == (2, 5)


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'resnet19'.*did you mean resnet"):
        build_model("resnet19", 2, 224)
    with pytest.raises(ModelError, match="model 'vit_b_16' cannot be built for 100x100 images"):
        build_model("vit_b_16", 2, 100)


def test_missing_torchvision_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ModelError, match="'resnet18' comes from torchvision, which cannot be imported here"):
        build_model("resnet18", 2, 224)
