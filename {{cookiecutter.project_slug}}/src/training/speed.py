"""Choices that only a measurement can make: the memory order of a CPU's tensors, and whether compiling pays.

They are made once, when a run begins, stored in its checkpoints and kept on resume. What the hardware alone decides,
the precision, is here too.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from training.config import Hyperparameters
from training.distributed import World

logger = logging.getLogger("training")
EVALUATION_BATCH = 256  # images a rank, at most
EVALUATED_PIXELS = 64 * 64 * EVALUATION_BATCH
STEPS = 3  # timed, after one that warms up
IMAGES = 32  # at most, in a step that is timed on a CPU; on a GPU all of them, as its time is not in proportion
MARGIN = 0.97  # the usual way stays unless the other one is clearly faster
GRAPHS = "reduce-overhead"  # torch's name for what records a step and launches it as one
SHORT_SECONDS = 0.01  # of a compiled step, up to which launching its kernels may be what takes the time
COMPILE_SECONDS = 600.0  # of expected training, from which on it pays to try (tens of seconds) whether compiling does


def choose(
    model: nn.Module,
    images: torch.Tensor,
    hyperparameters: Hyperparameters,
    steps: int,
    world: World,
    cast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> dict[str, Any]:
    """Decide `channels_last` and `compile`, the same on every rank; the latter may be a mode of torch's compiler.

    Args:
        model: untrained; left as it is.
        images: a normalised batch on the device, (N, 3, size, size).
        hyperparameters: of the run.
        steps: of the whole run, with as many images a rank as `images` has.
        world: all ranks.
        cast: makes the context of the forward pass.
    """
    wanted, seconds = hyperparameters.compile is True, {True: 0.0}
    part = images if world.device.type == "cuda" else images[:IMAGES]
    on_cpu, varied = world.device.type == "cpu", len(images) > 1 and not hyperparameters.deterministic
    if varied and (on_cpu or (world.device.type == "cuda" and hyperparameters.compile == "auto")):
        seconds[True] = _step_seconds(model, part, True, False, world.device, cast)
        if on_cpu:
            seconds[False] = _step_seconds(model, part, False, False, world.device, cast)
    channels_last = world.device.type != "mps" and MARGIN * seconds[True] <= seconds.get(False, seconds[True])
    expected = seconds.get(channels_last, 0.0) * len(images) / len(part) * steps
    able = world.device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++")))
    long = hyperparameters.compile == "auto" and expected > COMPILE_SECONDS and able
    channels_last, long = world.send((channels_last, long))
    if not long and not wanted:
        return {"channels_last": channels_last, "compile": False}
    if long and world.is_main:
        logger.info("timing a compiled step, as training may take %.0f minutes", expected / 60)
    trial = math.inf
    try:  # of all images where it is wanted anyway: the loop's own compiling then finds its results
        trial = _step_seconds(model, images if wanted else part, channels_last, True, world.device, cast)
    except Exception as error:  # of a compiler
        if world.is_main:
            reason = str(error).strip().partition("\n")[0]
            logger.info("not compiled, as that does not work here: %s: %s", type(error).__name__, reason[:200])
    slowest = world.largest([trial])[0]  # without end where it works on some ranks only
    compiled: bool | str = slowest < (math.inf if wanted else MARGIN * seconds[channels_last])
    alone = world.size == 1 and hyperparameters.accumulate == 1  # gradients that stay for another pass are not recorded
    if compiled and alone and world.device.type == "cuda" and slowest < SHORT_SECONDS:
        with contextlib.suppress(Exception):  # of a model that cannot be recorded
            recorded = _step_seconds(model, images, channels_last, GRAPHS, world.device, cast)
            compiled = GRAPHS if recorded < MARGIN * slowest else compiled
    return {"channels_last": channels_last, "compile": world.send(compiled)}


def _step_seconds(
    model: nn.Module, images: torch.Tensor, channels_last: bool, compiled: bool | str, device: torch.device,
    cast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> float:  # fmt: skip
    """Seconds of one forward and backward pass: the fastest of a few."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    trial = copy.deepcopy(model).to(memory_format=order).train()
    if compiled:
        trial.compile(mode=mode(compiled))
    best = float("inf")
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        with cast():
            output = trial(images)  # in the order that the loop gives them: channels last
        output.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        if device.type == "cuda":  # what a graph has written it writes again
            trial.zero_grad(set_to_none=True)
    return best


def mode(compiled: bool | str) -> str | None:
    """The argument of torch's compiler for a choice."""
    return compiled if isinstance(compiled, str) else None


def words(compiled: bool | str) -> str:
    """A choice as the log says it."""
    return "compiled, in CUDA graphs" if compiled == GRAPHS else "compiled" if compiled else "not compiled"


def settle(hyperparameters: Hyperparameters, device: torch.device, share: int, image_size: int) -> dict[str, Any]:
    """What nothing has to be measured for.

    Args:
        hyperparameters: of the run.
        device: of this rank.
        share: images that a rank trains on at a time.
        image_size: pixels a side.

    Returns:
        `precision`; `cudnn_benchmark`, which is switched here: the search for the fastest convolutions pays, as all
        steps have one shape, but need not find the same ones again; `evaluation_batch`, images that a rank evaluates
        at a time: 256 small ones, or of large ones no more than it trains on.
    """
    torch.backends.cudnn.benchmark = device.type == "cuda" and not hyperparameters.deterministic
    return {
        "precision": format_of(hyperparameters.precision, device),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "evaluation_batch": min(max(share, EVALUATED_PIXELS // image_size**2), EVALUATION_BATCH),
    }


def format_of(precision: str, device: torch.device) -> str:
    """The `precision` of a run, with auto settled: what the hardware multiplies fast."""
    if precision != "auto":
        return precision
    if has_fast_bf16(device):
        return "bf16"
    # Such as the T4; before tensor cores fp16 gained nothing.
    return "fp16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass."""
    chosen = format_of(precision, device)
    if chosen == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if chosen == "bf16" else torch.float16)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32 here: recent GPUs, and CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
