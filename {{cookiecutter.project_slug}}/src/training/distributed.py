"""The few facts of data-parallel training: which rank this process is, its device, and sums over ranks.

`WORLD_SIZE` in the environment (set by launch.py or torchrun) decides. Without it there is one rank, no process group
and no wrapper around the model. NCCL joins GPUs, gloo joins CPUs.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model import best_device
from training.config import GPU_INSTANCE, ConfigurationError

DRIVER = Path("/proc/driver/nvidia/version")


def check_gpus(environment: Mapping[str, str]) -> None:
    """Refuse to train on the processors of a host whose GPUs bill: by the job's `SM_*` variables it has some.

    Raises:
        ConfigurationError: torch cannot use them; an empty CUDA_VISIBLE_DEVICES says that it need not.
    """
    kind = environment.get("SM_CURRENT_INSTANCE_TYPE") or "this host"
    promised = int(environment.get("SM_NUM_GPUS") or 0) > 0 or GPU_INSTANCE.match(kind)
    if promised and environment.get("CUDA_VISIBLE_DEVICES") != "" and not torch.cuda.is_available():
        driver = re.search(r"\d+\.[\d.]+", DRIVER.read_text(encoding="utf-8")) if DRIVER.is_file() else None
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise ConfigurationError(
            f"{kind} has GPUs, and torch {torch.__version__}, which is built {build}, cannot use them "
            f"({f'the driver is {driver[0]}' if driver else 'there is no NVIDIA driver'}); set images.torch to a build "
            "that this driver runs, or choose an instance type without a GPU"
        )


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
                    first = buffer.clone()
                    dist.broadcast(first, 0)
                    change = buffer - first  # exactly nothing where the ranks agree, as on what is frozen
                    dist.all_reduce(change)
                    buffer.copy_(first + change / self.size)

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

    def first(self, do: Callable[[], Any]) -> Any:
        """What a function gives on the main rank, on every rank; also a ValueError, so that no rank waits in vain."""
        result: Any = None
        if self.is_main:
            try:
                result = do()
            except ValueError as error:
                result = error
        result = self.send(result)
        if isinstance(result, ValueError):
            raise result
        return result

    def share(self, model: nn.Module) -> None:
        """Give every rank the main one's weights and buffers."""
        if self.size > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, 0)

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
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise ConfigurationError(
                f"process {local_rank + 1} of this host has no GPU of its own: torch sees {gpus}, with "
                f"CUDA_VISIBLE_DEVICES {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')!r}; start at most {gpus} here"
            )
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
        if not self.training or self.running_mean is None:
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce

        values = input.float()
        count = torch.tensor(float(values.numel() // values.shape[1]), device=values.device)
        dist.all_reduce(count)
        mean = all_reduce(values.sum((0, 2, 3))) / count
        centred = values - mean[None, :, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
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


def synchronise_batch_norm(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """The model with every batch normalisation over the batch of all ranks; all that it holds stays, frozen or not."""
    on_gpu = device is not None and device.type == "cuda"
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:  # others may do more than to normalise, as timm's do
            module.__class__ = nn.SyncBatchNorm if on_gpu else SyncedBatchNorm  # type: ignore[assignment]
            module.process_group = None  # type: ignore[assignment]  # of nn.SyncBatchNorm: all ranks
    return model


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
