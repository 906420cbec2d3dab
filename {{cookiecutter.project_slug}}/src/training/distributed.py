"""The few facts of data-parallel training: which rank this process is, its device, and sums over ranks.

`WORLD_SIZE` in the environment (set by torchrun) decides. Without it there is one rank, no process group and no
wrapper around the model. NCCL joins GPUs, gloo joins CPUs.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.model import best_device

TIMEOUT = timedelta(minutes=10)  # a rank that waits longer for the others fails instead of hanging


@dataclass(frozen=True)
class World:
    """This process among all ranks of the job."""

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

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def start() -> World:
    """Join the process group that torchrun describes, if there is one."""
    if "WORLD_SIZE" not in os.environ:
        return World(rank=0, size=1, device=best_device())
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        # SDK V3's driver names the cloud's interface in a local container too, where it does not exist.
        if not Path("/sys/class/net", os.environ.get("NCCL_SOCKET_IFNAME", "none")).exists():
            os.environ.pop("NCCL_SOCKET_IFNAME", None)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return World(rank=rank, size=size, device=device)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
