"""Every family of torchvision's classifiers, and of timm's the usual ones: trained, written as an artifact, and asked.

python -m pytest tests/test_families.py        # minutes; timm's need: make setup ARGS="--group timm"
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from inference import inference
from inference.export import rehearse, write_artifact
from model import build_model
from tests.test_models import split
from training.config import Hyperparameters, resolve
from training.distributed import World
from training.loop import fit

TORCHVISION = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
    "wide_resnet50_2",
]  # fmt: skip
TIMM = [
    "convnext_atto", "deit_tiny_patch16_224", "edgenext_xx_small", "efficientnet_lite0", "ghostnet_050", "levit_128s",
    "mixer_s32_224", "mobilenetv3_small_050", "poolformer_s12", "regnety_002", "resnet10t.c3_in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "xcit_nano_12_p16_224",
]  # fmt: skip


@pytest.mark.parametrize("name", [*TORCHVISION, *(f"timm/{name}" for name in TIMM)])
def test_from_a_name_to_an_answer(name: str, tmp_path: Path) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    size = 299 if name == "inception_v3" else 224
    data, world = split(size), World(0, 1, torch.device("cpu"))
    settled = resolve(
        Hyperparameters(model=name, epochs=1, batch_size=4, compile=False, precision="fp32", deterministic=True),
        size,
        8,
    )
    torch.manual_seed(0)
    model = build_model(name, 3, size)
    rehearse(model, settled, data, False)
    trained, history = fit(model, data, data, settled, world)
    write_artifact(tmp_path, trained, settled, data, {"val_accuracy": history[-1]["val_accuracy"]}, None)
    classifier = inference.model_fn(str(tmp_path))
    answer = inference.predict_fn(list(data.pixels(np.arange(2))), classifier)
    assert len(answer["labels"]) == 2
    assert np.allclose(np.sum(answer["probabilities"], axis=1), 1)
