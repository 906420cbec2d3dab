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
MARGIN = 0.97  # the usual way stays unless the other one is clearly faster
COMPILE_SECONDS = 600.0  # of expected training, from which on it pays to try (tens of seconds) whether compiling does


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
        and (world.device.type == "cpu" or (world.device.type == "cuda" and hyperparameters.compile == "auto"))
    )
    if not measure:
        return {"channels_last": world.device.type != "mps", "compile": hyperparameters.compile is True}
    part = images[:IMAGES]
    seconds = {True: _step_seconds(model, part, True, False, world.device, cast)}
    if world.device.type == "cpu":
        seconds[False] = _step_seconds(model, part, False, False, world.device, cast)
    channels_last = MARGIN * seconds[True] <= seconds.get(False, seconds[True])
    compiled = hyperparameters.compile is True
    expected = seconds[channels_last] * len(images) / len(part) * steps
    able = world.device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++")))
    if hyperparameters.compile == "auto" and expected > COMPILE_SECONDS and able:
        if world.is_main:
            logger.info("timing a compiled step, as training may take %.0f minutes", expected / 60)
        trial = _step_seconds(model, part, channels_last, True, world.device, cast)
        compiled = trial < MARGIN * seconds[channels_last]
    choices = {"channels_last": channels_last, "compile": compiled}
    return dict(world.send(choices))


def _step_seconds(
    model: nn.Module, images: torch.Tensor, channels_last: bool, compiled: bool, device: torch.device,
    cast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> float:  # fmt: skip
    """Seconds of one forward and backward pass: the fastest of a few."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    trial = copy.deepcopy(model).to(memory_format=order).train()
    if compiled:
        trial.compile()
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
