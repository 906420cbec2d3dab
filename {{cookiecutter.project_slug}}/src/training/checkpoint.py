"""Save a run while it trains, and resume it where it stood: tensors as safetensors, the rest as JSON, no pickle.

A checkpoint is a folder `step-000000120/`, written under a temporary name by a thread of its own, checksummed, synced
and renamed when complete. It holds weights, averaged weights, the optimizer's state, the position inside the epoch and,
for every rank, random state and batch-norm buffers. The main rank writes; on resume it reads for all ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model import load_tensors
from training.distributed import World

logger = logging.getLogger("training")
WRITER = "checkpoint"  # the name of the thread that writes
KEEP = 2  # checkpoints: the older one is for when the newer one is damaged
NAME = re.compile(r"step-\d{9}")  # nothing else in the folder counts: SageMaker leaves its upload markers there
Tensors = dict[str, torch.Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and says why."""


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        position: steps done of the epoch that has begun.
        history: metrics of every evaluated epoch.
        choices: what was chosen by measuring when the run began, and must stay.
        scaler: of the losses in fp16; empty otherwise.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    choices: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def identity(hyperparameters: Mapping[str, Any], fingerprint: str) -> str:
    """What a checkpoint must agree with to be resumed: the hyperparameters that shape the result, and the data set."""
    return hashlib.sha256(json.dumps([dict(hyperparameters), fingerprint], sort_keys=True).encode()).hexdigest()


def choices(folder: Path, world: World) -> dict[str, Any]:
    """What the run in this folder chose when it began; empty when there is none. The same on every rank."""
    found: dict[str, Any] = {}
    for path in _candidates(folder) if world.is_main else []:
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))["choices"]
    return dict(world.send(found))


class Checkpoints:
    """The checkpoints of one run, seen from one rank.

    Args:
        folder: where they are kept.
        run: the `identity` of the run.
        world: all ranks.
        modules: by name, the modules whose weights and buffers belong to the state.
        optimizer: the optimizer.
    """

    def __init__(
        self, folder: Path, run: str, world: World, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
    ) -> None:
        self._folder, self._run, self._world = folder, run, world
        self._modules, self._optimizer = modules, optimizer
        self._writer: threading.Thread | None = None

    def save(self, progress: Progress, loss_sum: torch.Tensor, wait: bool = False) -> None:
        """Copy the state now, on every rank, and write it in the background, on the main one.

        Args:
            progress: of the run.
            loss_sum: of this rank, over the epoch that has begun.
            wait: return only when it is written; otherwise a save is left out while another one is being written.
        """
        ranks = self._world.gather(self._rank_state(loss_sum) if progress.position else {})
        if not self._world.is_main:
            return
        if wait:
            self.close()
        elif self._writer is not None and self._writer.is_alive():
            return
        tensors = {f"{name}.{key}": value for name, module in self._modules.items()
                   for key, value in module.state_dict().items()}  # fmt: skip
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        for rank, state in enumerate(ranks):
            tensors |= {f"rank{rank}.{key}": value for key, value in state.items()}
        copied = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        facts = {"run": self._run, "world_size": self._world.size} | vars(progress)
        self._writer = threading.Thread(target=_write, args=(self._folder, copied, json.dumps(facts)), name=WRITER)
        self._writer.start()
        if wait:
            self.close()

    def close(self) -> None:
        """Wait for the save that is being written."""
        if self._writer is not None:
            self._writer.join()

    def restore(self) -> tuple[Progress, torch.Tensor | None]:
        """Load the newest whole checkpoint in place, on every rank.

        Returns:
            The progress, all zero without a checkpoint, and this rank's sum of losses when an epoch had begun.

        Raises:
            CheckpointError: on every rank, when checkpoints exist and none is whole, or they belong to another run.
        """
        found: tuple[str, dict[str, Any], Tensors] = ("", {}, {})
        if self._world.is_main:
            try:
                found = ("", *_newest(self._folder, self._run))
            except CheckpointError as error:
                found = (str(error), {}, {})
        problem, facts, tensors = self._world.send(found)
        if problem:
            raise CheckpointError(problem)
        if not facts:
            return Progress(), None
        for name, module in self._modules.items():
            load_tensors(module, _with_prefix(tensors, f"{name}."))
        self._load_optimizer(_with_prefix(tensors, "optimizer."))
        progress = Progress(**{name: facts[name] for name in vars(Progress())})
        own = _with_prefix(tensors, f"rank{self._world.rank}.")
        if facts["world_size"] != self._world.size:
            if self._world.is_main:
                logger.warning("resumed with %d instead of %d processes: at the same position, but not bit for bit",
                               self._world.size, facts["world_size"])  # fmt: skip
            own = _with_prefix(tensors, "rank0.")
            own["loss_sum"] = _total_loss(tensors) / self._world.size
            own.pop("random", None)
        return progress, self._load_rank(own) if progress.position else None

    def _rank_state(self, loss_sum: torch.Tensor) -> Tensors:
        """What differs between ranks in the middle of an epoch."""
        state = {"loss_sum": loss_sum.detach(), "random": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self._world.device)
        if self._world.device.type == "mps":
            state["mps_random"] = torch.mps.get_rng_state()
        for name, module in self._modules.items():
            state |= {f"{name}.{key}": value for key, value in module.named_buffers()}
        return {key: value.detach().to("cpu", copy=True) for key, value in state.items()}

    def _load_rank(self, state: Tensors) -> torch.Tensor:
        if "random" in state:
            torch.set_rng_state(state["random"])
        if "cuda_random" in state and self._world.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self._world.device)
        if "mps_random" in state and self._world.device.type == "mps":
            torch.mps.set_rng_state(state["mps_random"])
        for name, module in self._modules.items():
            for key, buffer in module.named_buffers():
                buffer.copy_(state[f"{name}.{key}"])
        return state["loss_sum"].to(self._world.device)

    def _load_optimizer(self, tensors: Tensors) -> None:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        state: dict[int, Tensors] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            if value.ndim:  # fused optimizers read parameter and state side by side: same memory order
                value = torch.empty_like(parameters[int(index)]).copy_(value)
            state.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})


def _write(folder: Path, tensors: Tensors, facts: str) -> None:
    """Write one checkpoint whole or not at all, and drop all but the newest. A full disk costs the checkpoint only."""
    step = json.loads(facts)["step"]
    name, temporary = f"step-{step:09d}", folder / f".step-{step:09d}.tmp"
    try:
        for litter in folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
            shutil.rmtree(litter, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "state.safetensors")
        digest = hashlib.sha256((temporary / "state.safetensors").read_bytes()).hexdigest()
        text = json.dumps(json.loads(facts) | {"sha256": digest})
        (temporary / "checkpoint.json").write_text(text, encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        _sync(folder)
        for old in _candidates(folder)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # safetensors raises its own kind for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        logger.warning("checkpoint of step %d NOT WRITTEN: %s; training goes on, and would resume from an older one",
                       step, error)  # fmt: skip


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _candidates(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name)) if folder.is_dir() else []


def _newest(folder: Path, run: str) -> tuple[dict[str, Any], Tensors]:
    """Facts and tensors of the newest whole checkpoint; both empty when there is none at all."""
    candidates = _candidates(folder)
    for path in reversed(candidates):
        try:
            facts = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
            if hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest() != facts["sha256"]:
                raise ValueError("its checksum does not fit")
        except (OSError, ValueError, KeyError) as error:
            logger.warning("checkpoint %s is damaged (%s) and passed over", path.name, error)
            continue
        if facts["run"] != run:
            raise CheckpointError(
                f"{path} was written with other hyperparameters or another data set; "
                f"resume with the same ones, or start a new run"
            )
        return facts, load_file(path / "state.safetensors")
    if candidates:
        raise CheckpointError(f"none of the {len(candidates)} checkpoints in {folder} is whole; start a new run")
    return {}, {}


def _total_loss(tensors: Tensors) -> torch.Tensor:
    """The sum of all ranks' losses."""
    parts = [value for key, value in tensors.items() if re.fullmatch(r"rank\d+\.loss_sum", key)]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
