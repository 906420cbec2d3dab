"""Make probabilities true: one temperature, found on the validation split, that all logits are divided by.

Temperature scaling: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. It changes no prediction.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import imaging
from training.data import Split
from training.distributed import World

BATCH = 64
LOWEST, HIGHEST, HALVINGS = 0.05, 20.0, 40


def temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature at which the cross-entropy is lowest.

    In its inverse the cross-entropy is convex, so the sign of the slope says on which side the minimum lies. The labels
    count as right in all cases but one of two more, as in Platt's "Probabilistic Outputs for Support Vector Machines"
    (1999): no mistake on a few images is no certainty.

    Args:
        logits: float, (N, classes).
        labels: int64, (N,).
    """
    logits, labels = logits.double().cpu(), labels.cpu()
    doubt = 1 / (len(labels) + 2)
    truth = functional.one_hot(labels, logits.shape[1]) * (1 - doubt)
    truth += (1 - functional.one_hot(labels, logits.shape[1])) * doubt / max(logits.shape[1] - 1, 1)
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        slope = (((logits * middle).softmax(1) - truth) * logits).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / middle


def answers(model: nn.Module, split: Split, world: World) -> torch.Tensor:
    """The logits of every image of a split, float32 (N, classes), on the main rank; each rank asks for its share.

    Batches are the same on any number of ranks, and so is what is found from their logits.
    """
    model.eval().to(memory_format=torch.channels_last)
    firsts, own = range(0, len(split), BATCH), []
    eager: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:  # a model was compiled: no shape is worth that now
        eager = torch.compiler.set_stance("force_eager")
    with torch.inference_mode(), eager:
        for first in firsts[world.rank :: world.size]:
            pixels, _ = split.batch(np.arange(first, min(first + BATCH, len(split))), world.device)
            images = imaging.normalise(pixels, split.info["mean"], split.info["std"])
            own.append(model(images).float().cpu())
    shares = world.gather(own)
    found = [shares[n % world.size][n // world.size] for n in range(len(firsts))] if shares else [torch.empty(0)]
    return torch.cat(found)
