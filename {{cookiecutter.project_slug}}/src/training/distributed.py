"""The few facts of data-parallel training: which rank this process is, its device, and sums over ranks.

`WORLD_SIZE` in the environment (set by launch.py or torchrun) decides. Without it there is one rank, no process group
and no wrapper around the model. NCCL joins GPUs, gloo joins CPUs.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model import best_device


@dataclass(frozen=True)
class World:
    """This process among all ranks of the job.

    Attributes:
        rank: of this process, from 0, over all hosts.
        size: number of ranks.
        device: that this rank computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that logs and writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over ranks; the model itself when there is one rank."""
        if self.size == 1:
            return model
        parallel = nn.parallel.DistributedDataParallel
        # Buffers are averaged once an epoch instead of sent before every forward; torch 2.15 renamed the option.
        renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        devices = [self.device] if self.device.type == "cuda" else None
        return parallel(model, device_ids=devices, gradient_as_bucket_view=True, **options)

    def without_sync(self, parallel: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Backward passes in here keep their gradients for the next one outside, which averages the sum."""
        if isinstance(parallel, nn.parallel.DistributedDataParallel):
            return parallel.no_sync()
        return contextlib.nullcontext()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum of `values` over all ranks."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def average_buffers(self, model: nn.Module) -> None:
        """Give every rank the mean of the floating-point buffers: each saw its own share of every batch."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.size

    def largest(self, values: list[float]) -> list[float]:
        """The element-wise maximum of a few numbers over all ranks."""
        if self.size == 1:
            return values
        agreed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return [float(value) for value in agreed.tolist()]

    def gather(self, state: Any) -> list[Any]:
        """What every rank holds, in the order of ranks, on the main rank; nothing on the others."""
        if self.size == 1:
            return [state]
        states: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(state, states)
        return states or []

    def send(self, state: Any) -> Any:
        """What the main rank holds, on every rank."""
        box = [state]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def start(timeout_seconds: float) -> World:
    """Join the process group that the environment describes, if there is one.

    Args:
        timeout_seconds: a rank that waits longer for the others fails instead of hanging.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if "WORLD_SIZE" not in os.environ:
        return World(rank=0, size=1, device=best_device())
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    return World(rank=rank, size=size, device=device)


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batch of all ranks, on any device (PyTorch's own needs GPUs)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (the name in torch)
        """Normalise (N, channels, height, width); ranks may hold unequal N."""
        if not self.training:
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce

        values = input.float()
        count = torch.tensor(float(values.numel() // values.shape[1]), device=values.device)
        dist.all_reduce(count)
        mean = all_reduce(values.sum((0, 2, 3))) / count
        centred = values - mean[None, :, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            rate = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), rate)
            self.num_batches_tracked += 1
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = 0.0 if self.bias is None else self.bias[None, :, None, None]
        normal: torch.Tensor = centred * scale[None, :, None, None] + shift
        return normal.to(input.dtype)


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """The model with every batch normalisation over the batch of all ranks; weights and their names stay."""
    if isinstance(model, nn.BatchNorm2d):
        synced = SyncedBatchNorm(model.num_features, model.eps, model.momentum, model.affine)
        synced.load_state_dict(model.state_dict())
        return synced.to(next(model.buffers()).device)
    for name, child in model.named_children():
        setattr(model, name, synchronise_batch_norm(child))
    return model


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
