"""What is looked after beside the steps, without slowing them: stops, checkpoints that are due, and broken losses."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from training import interruption
from training.checkpoint import Checkpoints, Progress
from training.distributed import World

MEETING_SECONDS = 1.0  # between two agreements of all ranks


class NonFiniteLoss(ArithmeticError):
    """The loss or its gradient is infinite or not a number; the message names the step and the images."""


class Watch:
    """Lets all ranks agree, about once a second and at the same step, whether to stop or to save.

    Args:
        world: all ranks.
        progress: of the run; the one that the loop moves on.
        checkpoints: of the run, if it keeps any.
        save_seconds: between saves.
    """

    def __init__(self, world: World, progress: Progress, checkpoints: Checkpoints | None, save_seconds: float) -> None:
        self._world, self._progress, self._checkpoints = world, progress, checkpoints
        self._save_seconds = save_seconds
        self._saved = self._met = time.perf_counter()
        self._last = self._next = progress.step

    def due(self) -> bool:
        """Whether the ranks meet after this step: the same answer on all of them."""
        return self._progress.step >= self._next

    def meet(self, loss_sum: torch.Tensor) -> None:
        """Agree, then save or stop. Every rank must come.

        Raises:
            Stopped: when one rank was asked to stop; the state is saved by then.
        """
        now = time.perf_counter()
        step_seconds = (now - self._met) / max(self._progress.step - self._last, 1)
        due = self._checkpoints is not None and now - self._saved > self._save_seconds
        stop, save, step_seconds = self._world.largest([float(interruption.asked()), float(due), step_seconds])
        self._met, self._last = now, self._progress.step
        self._next = self._progress.step + min(max(int(MEETING_SECONDS / step_seconds), 1), 1000)
        if stop:
            self.save(loss_sum, wait=True)
            raise interruption.Stopped
        if save:
            self.save(loss_sum)

    def save(self, loss_sum: torch.Tensor, wait: bool = False) -> None:
        """Save, in the background unless `wait`. Every rank must come."""
        if self._checkpoints is not None:
            self._checkpoints.save(self._progress, loss_sum, wait)
            self._saved = time.perf_counter()


class Guard:
    """Keeps a loss that is not finite out of the weights, on all ranks at the same step.

    A rank whose loss is not finite scales it by NaN, and the average of gradients takes that to every rank. On a GPU
    the fused optimizer then skips its step by itself, so that nothing waits for the device (as with gradient scaling).
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._parameter = [parameter for parameter in model.parameters() if parameter.requires_grad][-1]
        self._optimizer = optimizer
        self._on_device = device.type == "cuda"
        self._bad = torch.zeros((), device=device)
        self._good_steps = torch.zeros((), device=device)

    def scale(self, loss: torch.Tensor, factor: float) -> torch.Tensor:
        """The loss times a factor, or NaN when it is not finite."""
        if self._on_device:
            return loss * torch.where(torch.isfinite(loss.detach()), factor, math.nan)
        return loss * (factor if math.isfinite(loss.item()) else math.nan)

    def allows_step(self) -> bool:
        """Look at the averaged gradient before the optimizer step. False: stop here. On a GPU `skipped` tells later."""
        gradient = self._parameter.grad
        assert gradient is not None
        total = gradient.sum()
        if not self._on_device:
            return math.isfinite(total.item())
        self._bad = torch.maximum(self._bad, (~torch.isfinite(total)).float())
        self._good_steps += 1.0 - self._bad
        self._optimizer.found_inf, self._optimizer.grad_scale = self._bad, None  # type: ignore[attr-defined]
        return True

    def skipped(self) -> int | None:
        """How many good steps came before the first skipped one; None when none was skipped. Waits for a GPU."""
        return int(self._good_steps.item()) if self._on_device and self._bad.item() else None
