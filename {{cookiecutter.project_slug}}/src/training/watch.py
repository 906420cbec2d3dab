"""What is looked after beside the steps, without slowing them: stops, checkpoints that are due, and broken losses."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from training import interruption
from training.checkpoint import Checkpoints, Progress
from training.config import Hyperparameters
from training.distributed import World

MEETING_SECONDS = 1.0  # between two agreements of all ranks


class NonFiniteLoss(ArithmeticError):
    """The loss or its gradient is infinite or not a number; the message names the step and the images."""


def exported(history: Sequence[dict[str, Any]], hyperparameters: Hyperparameters) -> dict[str, Any]:
    """The metrics of the epoch whose weights are exported: of equal ones the lower loss counts, then the earlier."""
    if hyperparameters.keep == "last":
        return history[-1]
    return _best(history, hyperparameters)


def _best(history: Sequence[dict[str, Any]], hyperparameters: Hyperparameters) -> dict[str, Any]:
    name, sign = f"val_{hyperparameters.keep_by}", 1 if hyperparameters.keep_by == "loss" else -1
    return min(history, key=lambda epoch: (not math.isfinite(epoch["val_loss"]), sign * epoch[name], epoch["val_loss"]))


def over(progress: Progress, hyperparameters: Hyperparameters) -> bool:
    """Whether training has come to its end: all epochs are done, or patience is."""
    best = _best(progress.history, hyperparameters)["epoch"] if progress.history else 0
    waited = sum(epoch["epoch"] > best for epoch in progress.history)  # of those that were evaluated
    return progress.epoch >= int(hyperparameters.epochs) or 0 < hyperparameters.patience <= waited


class Watch:
    """Lets all ranks agree, about once a second and at the same step, whether to stop or to save.

    A step is one of training, or a batch of an evaluation.

    Args:
        world: all ranks.
        progress: of the run; the one that the loop moves on.
        checkpoints: of the run, if it keeps any.
        save_seconds: between saves.
        guard: whose scale belongs to the state.
    """

    def __init__(
        self, world: World, progress: Progress, checkpoints: Checkpoints | None, save_seconds: float, guard: Guard
    ) -> None:
        self._world, self._progress, self._checkpoints, self._guard = world, progress, checkpoints, guard
        self._save_seconds = save_seconds
        self._saved = self._met = time.perf_counter()
        self._steps = self._last = self._next = 0

    def due(self) -> bool:
        """Whether the ranks meet after this step: the same answer on all of them. Ask once a step."""
        self._steps += 1
        return self._steps >= self._next

    def soon(self) -> None:
        """Meet after the next step, as those that follow may take longer than those before."""
        self._next = 0

    def meet(self, loss_sum: torch.Tensor) -> None:
        """Agree, then save or stop. Every rank must come.

        Raises:
            Stopped: when one rank was asked to stop; the state is saved by then.
        """
        now = time.perf_counter()
        step_seconds = (now - self._met) / max(self._steps - self._last, 1)
        due = self._checkpoints is not None and now - self._saved > self._save_seconds
        stop, save, step_seconds = self._world.largest([float(interruption.asked()), float(due), step_seconds])
        self._met, self._last = now, self._steps
        self._next = self._steps + min(max(int(MEETING_SECONDS / step_seconds), 1), 1000)
        if stop:
            self.save(loss_sum, wait=True)
            raise interruption.Stopped
        if save:
            self.save(loss_sum)

    def save(self, loss_sum: torch.Tensor, wait: bool = False) -> None:
        """Save, in the background unless `wait`. Every rank must come."""
        if self._checkpoints is not None:
            self._progress.scaler = self._guard.scaler.state_dict()
            self._checkpoints.save(self._progress, loss_sum, wait)
            self._saved = time.perf_counter()


class Guard:
    """Keeps a loss that is not finite out of the weights, on all ranks at the same step.

    A rank whose loss is not finite scales it by NaN, and the average of gradients takes that to every rank. On a GPU
    the fused optimizer then skips its step by itself, so that nothing waits for the device (as with gradient scaling).

    In fp16 gradients may overflow, so the loss is scaled, and a step is skipped, by torch's `GradScaler`; there a loss
    is not finite when even a scale below 1 does not help.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, fp16: bool = False
    ) -> None:
        self.scaler, self._steps = torch.amp.GradScaler(device.type, enabled=fp16), 0
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = optimizer
        self._on_device = device.type == "cuda"
        self._bad = torch.zeros((), device=device)
        self._good_steps = torch.zeros((), device=device)

    def scale(self, loss: torch.Tensor, factor: float) -> torch.Tensor:
        """The loss times a factor, or NaN when it is not finite."""
        if self._on_device:
            return self.scaler.scale(loss * torch.where(torch.isfinite(loss.detach()), factor, math.nan))
        return self.scaler.scale(loss * (factor if math.isfinite(loss.item()) else math.nan))

    def unscale(self) -> None:
        """Undo what fp16 needs, after the last backward pass of a step."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self._optimizer)

    def allows_step(self) -> bool:
        """Look at all averaged gradients before the optimizer step. False: stop here. On a GPU `skipped` tells later.

        A norm of more than float32 holds counts as infinite: what a broken kernel leaves in a gradient may be finite.
        """
        if self.scaler.is_enabled():
            return True
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        total = torch.stack(torch._foreach_norm(gradients)).sum()
        if not self._on_device:
            return math.isfinite(total.item())
        self._bad = torch.maximum(self._bad, (~torch.isfinite(total)).float())
        self._good_steps += 1.0 - self._bad
        self._optimizer.found_inf, self._optimizer.grad_scale = self._bad, None  # type: ignore[attr-defined]
        return True

    def step(self) -> None:
        """The optimizer's step."""
        self._steps += 1
        self.scaler.step(self._optimizer)
        self.scaler.update()

    def skipped(self) -> int | None:
        """How many good steps came before the first skipped one; None when none was skipped. Waits for a GPU."""
        if self.scaler.is_enabled():
            return self._steps - 1 if self.scaler.get_scale() < 1 else None
        return int(self._good_steps.item()) if self._on_device and self._bad.item() else None
