"""Start from weights that were trained before: a file in the channel `pretrained`, or those that were published."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import logging
import os
import re
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from model import MODELS, TIMM, ModelError, load_tensors

logger = logging.getLogger("training")
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
# Where the files that people have keep their weights, among other things.
INSIDE = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "model_ema", "ema",
          "state_dict_ema", "ema_state_dict")  # fmt: skip
_SCALAR = np.float64().__reduce__()[0]  # what numpy's pickles call, by its two names
# What usual scripts save beside weights, without a line of code: their options, and what numpy computed.
PLAIN: list[Any] = [argparse.Namespace, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
                    _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar")]  # fmt: skip
SECONDS, BYTES_A_SECOND = 10.0, 2**20  # a download ends after so long, unless it comes faster than this
Weights = dict[str, torch.Tensor]


def initialise(model: nn.Module, name: str, wanted: str, channel: Path | None) -> dict[str, str] | None:
    """Load what a run starts from.

    Args:
        model: is changed in place.
        name: of the model.
        wanted: none; auto: published weights, or none where they cannot be had; default: these, or fail.
        channel: goes before; it holds one file.

    Returns:
        The file's name and SHA-256; None when the model keeps its random weights.

    Raises:
        ModelError: for weights that cannot be read, do not fit, or must be had and cannot.
    """
    if channel:
        load_weights(model, read_weights(file := find_weights(channel)))
    else:
        try:
            source = published(name) if wanted != "none" else None
            if source is None and wanted == "default":
                raise OSError("there are none")
            if source is None:
                return None
            load_weights(model, read_weights(file := fetch(*source)))
        except (OSError, ModelError) as error:
            reason = f"the published weights of {name} cannot be had ({error})"
            if wanted == "default":
                raise ModelError(f"{reason}; give a file as data.pretrained, or set pretrained to none") from error
            logger.info("training from nothing: %s; give a file of weights as data.pretrained", reason)
            return None
    return {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def published(name: str) -> tuple[str, Path] | None:
    """Address of a model's published weights, and their file in torch's cache; None when there are none."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    if name.startswith(TIMM):
        import timm
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        facts = timm.get_pretrained_cfg(name.removeprefix(TIMM))
        if facts is None or not facts.hf_hub_id:
            return None
        file = folder / f"{name.replace('/', '-')}.safetensors"
        cached = try_to_load_from_cache(facts.hf_hub_id, "model.safetensors")
        return hf_hub_url(facts.hf_hub_id, "model.safetensors"), Path(cached) if isinstance(cached, str) else file
    if name in MODELS or "." in name:
        return None
    from torchvision import models

    weights: Any = models.get_model_weights(name)
    return (weights.DEFAULT.url, folder / weights.DEFAULT.url.rpartition("/")[2]) if len(weights) else None


def fetch(url: str, file: Path) -> Path:
    """The file in the cache; downloaded first when it is missing, whole or not at all.

    Raises:
        OSError: when it cannot be had in time; or at all, without a network.
    """
    if file.is_file():
        return file
    if os.environ.get("NETWORK_ISOLATION"):
        raise OSError("this job has no network")
    logger.info("downloading %s", url)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial, begun, size = file.with_name(f".{os.getpid()}-{file.name}"), time.monotonic(), 0
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer, partial.open("wb") as target:  # noqa: S310
            while piece := answer.read1(2**20):
                size += target.write(piece)
                digest.update(piece)
                if time.monotonic() - begun > SECONDS + size / BYTES_A_SECOND:
                    raise OSError(f"only {size / 1e6:.1f} MB came in {time.monotonic() - begun:.0f} s")
            if size != int(answer.headers.get("Content-Length") or size):
                raise OSError(f"only {size} bytes came")
        named = file.stem.rpartition("-")[2] if file.suffix == ".pth" and "-" in file.stem else ""
        if not digest.hexdigest().startswith(named):
            raise OSError("what came has another checksum than the one in its name")
        read_weights(partial)  # or the page of some network that wants a login would stay
        partial.replace(file)
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"what came is no file of weights: {str(error)[:200]}") from error
    finally:
        partial.unlink(missing_ok=True)
    return file


def find_weights(place: Path) -> Path:
    """The file of weights: `place` itself, or the one that the folder holds.

    Raises:
        ModelError: when there is none, or more than one.
    """
    held = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    files = held if len(held) == 1 else [path for path in held if path.suffix.lower() in SUFFIXES]
    if len(files) != 1:
        found = ", ".join(path.name for path in files[:3]) or "none"
        raise ModelError(f"{place} must hold one file of weights ({' '.join(SUFFIXES)}); found: {found}")
    return files[0]


def read_weights(file: Path) -> Weights:
    """Tensors by name, from where files of the usual kinds have them. Pickles are read as plain values only.

    Raises:
        ModelError: when the file holds something else.
    """
    try:
        with torch.serialization.safe_globals(PLAIN):
            content: Any = (
                load_file(file)
                if file.suffix.lower() == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
    except Exception as error:  # both libraries raise kinds of their own
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"{file} holds no weights that can be read: {reason}; where you trust it, load it with torch and save "
            f"model.state_dict()"
        ) from error
    found = _tensors(content)
    if found is None:
        raise ModelError(f"{file} holds no tensors by name; save a model's state_dict")
    if found[0]:
        logger.info("%s: the weights are taken from %s", file.name, ".".join(found[0]))
    return found[1]


def _tensors(content: Any, depth: int = 3) -> tuple[list[str], Weights] | None:
    """The most tensors by name in one place of what a file holds, and the keys that lead there."""
    if not isinstance(content, Mapping) or not content:
        return None
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    found: list[tuple[list[str], Weights]] = [([], tensors)]
    keys = [*INSIDE, *content] if depth else []
    for key in {id(content.get(key)): key for key in keys}.values():
        if inner := _tensors(content.get(key), depth - 1):
            found.append(([str(key), *inner[0]], inner[1]))
    best = max(found, key=lambda each: len(each[1]))  # of equals the first
    return best if best[1] else None


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load all that fits; the head may differ when the classes do, and starts anew then.

    Raises:
        ModelError: when anything but the head does not fit.
    """
    own = model.state_dict()
    weights = _renamed(weights, list(own))
    head = list(dict(model.named_parameters()))[-1].rpartition(".")[0]
    misfits = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    misfits = [name for name in misfits if not name.endswith("num_batches_tracked")]
    strange = [name for name in misfits if name.rpartition(".")[0] != head]
    if strange:
        theirs = list(weights[strange[0]].shape) if strange[0] in weights else "missing"
        raise ModelError(
            f"the weights do not fit the model: {len(strange)} of {len(own)} tensors differ, the first is {strange[0]} "
            f"({theirs}, wanted {list(own[strange[0]].shape)}); set model to the one that they were trained for"
        )
    fitting = {name: weights.get(name, value) for name, value in own.items() if name not in misfits}
    load_tensors(model, fitting, strict=False)
    anew = f"; a new head for {own[misfits[0]].shape[0]} classes ({', '.join(misfits)})" if misfits else ""
    logger.info("pretrained weights: %d of %d tensors%s", len(own) - len(misfits), len(own), anew)


def _renamed(weights: Weights, names: list[str]) -> Weights:
    """Without what a wrapper put before all names (`module.`, `_orig_mod.`, `model.`): what makes most of them fit."""
    # Torchvision's files of densenets are older than its names.
    weights = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)", r"\1", name): value
               for name, value in weights.items()}  # fmt: skip
    before = {name.removesuffix(own) for own in names[:1] + names[-3:] for name in weights if name.endswith(f".{own}")}
    wanted = set(names)
    fits = {prefix: sum(name.removeprefix(prefix) in wanted for name in weights if name.startswith(prefix))
            for prefix in ("", *sorted(before))}  # fmt: skip
    best = max(fits, key=lambda prefix: fits[prefix])
    if best:
        logger.info("the names of the weights are taken without %r", best)
    return {name.removeprefix(best): value for name, value in weights.items() if name.startswith(best)}


def freeze(model: nn.Module, stages: int) -> None:
    """Keep the weights of the first stages as they are: a stage is a child of the model (or of its one trunk).

    Raises:
        ModelError: when nothing would be left to train.
    """
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    if len(children) == 2 and isinstance(children[0], nn.Sequential):  # features and classifier
        children = [child for child in children[0] if any(True for _ in child.parameters())] + children[1:]
    if stages >= len(children):
        raise ModelError(f"frozen_stages is {stages}, but the model has {len(children)} stages; freeze fewer")
    for child in children[:stages]:
        child.requires_grad_(False)
    if stages:
        for parameter in model.parameters(recurse=False):  # what a transformer adds before its first blocks
            parameter.requires_grad_(False)
        frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        logger.info("frozen: %d of %d stages, %s parameters", stages, len(children), f"{frozen:,}")


def train_mode(model: nn.Module) -> None:
    """Training mode, but for what is frozen: its batch norm keeps its statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
