"""Optimizer, learning-rate schedule and weight averaging."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable

import torch
from torch import nn

from training.config import Hyperparameters


def build_optimizer(model: nn.Module, hyperparameters: Hyperparameters) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum; fused; weight decay on matrices and filters only.

    AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": hyperparameters.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    if hyperparameters.optimizer == "adamw":
        return _eager(torch.optim.AdamW)(groups, lr=0.0, fused=fused)
    momentum = hyperparameters.momentum
    return _eager(torch.optim.SGD)(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=fused)


def _eager(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer without the wrappers that keep torch.compile out of it: they import it, which takes 3 s."""
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(inspect.unwrap(kind.step))})


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up, then cosine decay to nearly zero: a pure function of the step, so nothing to save or restore.

    Cosine decay: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, without restarts.

    Args:
        step: 0 for the first optimizer step.
        total_steps: of the whole run.
        peak: the highest learning rate.
        warmup_fraction: share of the run that rises.
    """
    warmup = round(warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup + 0.5) / (total_steps - warmup)))


class WeightAverage:
    """Exponential moving average (EMA) of weights and floating-point buffers; evaluated and exported in their place."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval() if decay else model
        self._decay = decay
        self._targets = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        self._sources = [value for value in model.state_dict().values() if value.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present state by one step."""
        if self._decay:
            torch._foreach_lerp_(self._targets, self._sources, 1.0 - self._decay)
