"""Save a run after every epoch and resume it: tensors as safetensors, the rest as JSON, no pickle.

A checkpoint is a folder `epoch-0003/`, written under a temporary name and renamed when complete. Order, augmentation
and dropout are functions of (seed, epoch), so a resumed run ends as an uninterrupted one would have.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

KEEP = 2


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and says why."""


def identity(hyperparameters: Mapping[str, Any], fingerprint: str) -> str:
    """What a checkpoint must agree with to be resumed: all hyperparameters and the data set."""
    return hashlib.sha256(json.dumps([dict(hyperparameters), fingerprint], sort_keys=True).encode()).hexdigest()


def save(
    folder: Path,
    run: str,
    history: list[dict[str, Any]],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state after the newest finished epoch and drop all but the newest checkpoints.

    Args:
        folder: where checkpoints are kept.
        run: the `identity` of the run.
        history: the metrics of every finished epoch.
        modules: by name, the modules whose weights and buffers belong to the state.
        optimizer: the optimizer.
    """
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    name = f"epoch-{len(history):04d}"
    temporary = folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / "state.safetensors")
    digest = hashlib.sha256((temporary / "state.safetensors").read_bytes()).hexdigest()
    (temporary / "checkpoint.json").write_text(json.dumps({"run": run, "sha256": digest, "history": history}))
    for path in (*temporary.iterdir(), temporary):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(folder / name, ignore_errors=True)
    temporary.rename(folder / name)
    for old in sorted(folder.glob("epoch-*"))[:-KEEP]:
        shutil.rmtree(old)


def restore(
    folder: Path, run: str, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Load the newest whole checkpoint in place.

    Returns:
        The metrics of every finished epoch; empty when there is no checkpoint.

    Raises:
        CheckpointError: when checkpoints exist and none is whole, or they belong to another run.
    """
    candidates = sorted(folder.glob("epoch-*"), reverse=True)
    for path in candidates:
        try:
            facts = json.loads((path / "checkpoint.json").read_text())
            whole = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest() == facts["sha256"]
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            continue
        if facts["run"] != run:
            raise CheckpointError(
                f"{path} was written with other hyperparameters or another data set; "
                f"resume with the same ones, or start a new run"
            )
        tensors = load_file(path / "state.safetensors")
        for name, module in modules.items():
            module.load_state_dict(_with_prefix(tensors, f"{name}."))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in _with_prefix(tensors, "optimizer.").items():
            index, name = key.split(".", 1)
            if value.ndim:  # fused optimizers read parameter and state side by side: same memory order
                value = torch.empty_like(parameters[int(index)]).copy_(value)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return list(facts["history"])
    if candidates:
        raise CheckpointError(f"none of the {len(candidates)} checkpoints in {folder} is whole; start a new run")
    return []


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
