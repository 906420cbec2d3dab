"""Choices that only a measurement can make: the memory order of a CPU's tensors, and whether compiling pays.

They are made once, when a run begins, stored in its checkpoints and kept on resume.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from training.config import Hyperparameters
from training.distributed import World

logger = logging.getLogger("training")
STEPS = 3  # timed, after one that warms up
IMAGES = 32  # at most, in a timed step
MARGIN = 0.97  # channels_last stays unless the other order is clearly faster
COMPILE_SECONDS = 300.0  # of expected training, from which on compiling (tens of seconds) pays


def choose(
    model: nn.Module,
    images: torch.Tensor,
    hyperparameters: Hyperparameters,
    steps: int,
    world: World,
    cast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> dict[str, bool]:
    """Decide `channels_last` and `compile`, the same on every rank.

    Args:
        model: untrained; left as it is.
        images: a normalised batch on the device, (N, 3, size, size).
        hyperparameters: of the run.
        steps: of the whole run, with as many images a rank as `images` has.
        world: all ranks.
        cast: makes the context of the forward pass.
    """
    measure = (
        len(images) > 1
        and not hyperparameters.deterministic
        and (world.device.type == "cpu" or hyperparameters.compile == "auto")
    )
    if not measure:
        return {"channels_last": True, "compile": hyperparameters.compile is True}
    part = images[:IMAGES]
    seconds = {True: _step_seconds(model, part, True, world.device, cast)}
    if world.device.type == "cpu":
        seconds[False] = _step_seconds(model, part, False, world.device, cast)
    channels_last = MARGIN * seconds[True] <= seconds.get(False, seconds[True])
    expected = min(seconds.values()) * len(images) / max(len(part), 1) * steps
    able = world.device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++")))
    compiled = expected > COMPILE_SECONDS and able if hyperparameters.compile == "auto" else hyperparameters.compile
    choices = {"channels_last": channels_last, "compile": bool(compiled)}
    return dict(world.send(choices))


def _step_seconds(
    model: nn.Module, images: torch.Tensor, channels_last: bool, device: torch.device,
    cast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> float:  # fmt: skip
    """Seconds of one forward and backward pass: the fastest of a few."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    trial = copy.deepcopy(model).to(memory_format=order).train()
    best = float("inf")
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        with cast():
            output = trial(images)  # in the order that the loop gives them: channels last
        output.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
