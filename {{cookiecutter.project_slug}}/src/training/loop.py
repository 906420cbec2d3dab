"""The training loop: forward, backward, step, and an exact evaluation after every epoch.

Plain PyTorch from top to bottom; `src/training/train.py` is its entry. Read `fit` first.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import imaging
from training import augment, checkpoint
from training.config import ConfigurationError, Hyperparameters
from training.data import Split, epoch_order
from training.distributed import World
from training.optim import WeightAverage, build_optimizer, learning_rate_at

logger = logging.getLogger("training")
EVALUATION_BATCH = 256  # images a rank
PROGRESS_SECONDS = 5.0  # between progress lines inside an epoch


@dataclass(frozen=True)
class Evaluation:
    """Sums over a whole split, each image counted once on any number of ranks."""

    loss: float
    accuracy: float
    images: int


def fit(
    model: nn.Module,
    train: Split,
    validation: Split,
    hyperparameters: Hyperparameters,
    world: World,
    checkpoints: Path | None = None,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train `model` in place.

    Args:
        model: on `world.device`, the same on every rank.
        train, validation: splits of one packed data set.
        hyperparameters: with every `auto` resolved.
        world: this rank among all ranks.
        checkpoints: folder for checkpoints, resumed from when it holds some; None: none are written.
        on_epoch: called on the main rank after each epoch, with the metrics of all finished epochs.

    Returns:
        The averaged model (the trained one when `ema_decay` is 0), which is what was evaluated, and the metrics of
        all epochs (on the main rank).
    """
    epochs, seed = int(hyperparameters.epochs), hyperparameters.seed
    batch_size = min(hyperparameters.batch_size, len(train))
    if batch_size < world.size:
        raise ConfigurationError(f"a batch of {batch_size} images cannot feed {world.size} ranks; use fewer ranks")
    steps_per_epoch = len(train) // batch_size  # the rest of the shuffled images waits for another epoch
    mean, std = train.info["mean"], train.info["std"]
    cast = autocast(hyperparameters.precision, world.device)

    model.to(memory_format=torch.channels_last)
    average = WeightAverage(model, hyperparameters.ema_decay)
    optimizer = build_optimizer(model, hyperparameters)
    modules = {"model": model} if average.model is model else {"model": model, "average": average.model}
    run = checkpoint.identity(hyperparameters.as_dict(), train.info["fingerprint"])
    history = checkpoint.restore(checkpoints, run, modules, optimizer) if checkpoints else []
    first_epoch = len(history)
    if history and world.is_main:
        logger.info("resumed after epoch %d of %d", first_epoch, epochs)
    if world.is_main:
        logger.info("training for %d epochs of %d steps", epochs, steps_per_epoch)
    parallel = world.wrap(model)
    step = first_epoch * steps_per_epoch

    for epoch in range(first_epoch, epochs):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch, world.rank]).generate_state(1)[0]))  # dropout
        order = epoch_order(len(train), seed, epoch)
        augmentation = augment.draw(
            len(train), train.image_size, hyperparameters.translate, hyperparameters.horizontal_flip, seed, epoch
        )
        model.train()
        loss_sum = torch.zeros((), device=world.device)
        started = reported = time.perf_counter()
        for first in range(0, steps_per_epoch * batch_size, batch_size):
            rows = order[first : first + batch_size][world.rank :: world.size]
            images, labels = train.batch(rows, world.device)
            images = augmentation.apply(images, rows)

            rate = learning_rate_at(
                step, epochs * steps_per_epoch, float(hyperparameters.learning_rate), hyperparameters.warmup_fraction
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            with cast:
                logits = parallel(imaging.normalise(images, mean, std))
            # A sum, scaled so that the mean over ranks is the mean over the batch also when ranks hold unequal shares.
            losses = functional.cross_entropy(
                logits.float(), labels, reduction="sum", label_smoothing=hyperparameters.label_smoothing
            )
            (losses * (world.size / batch_size)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()
            loss_sum += losses.detach()
            step += 1

            if world.is_main:
                if step == first_epoch * steps_per_epoch + 1:
                    logger.info("first step done")
                now = time.perf_counter()
                if now - reported > PROGRESS_SECONDS:
                    reported = now
                    logger.info("progress epoch %d/%d step %d/%d", epoch + 1, epochs, step, epochs * steps_per_epoch)

        train_loss = world.total(loss_sum).item() / (steps_per_epoch * batch_size)
        seconds = time.perf_counter() - started  # after .item(): an accelerator has finished its work
        world.average_buffers(model)
        if average.model is not model:
            world.average_buffers(average.model)
        result = evaluate(average.model, validation, world)
        if world.is_main:
            metrics = {
                "epoch": epoch + 1,
                "step": step,
                "train_loss": train_loss,
                "val_loss": result.loss,
                "val_accuracy": result.accuracy,
                "images_per_second": steps_per_epoch * batch_size / seconds,
            }
            logger.info(
                "epoch={epoch} step={step} train_loss={train_loss:.4f} val_loss={val_loss:.4f} "
                "val_accuracy={val_accuracy:.4f} images_per_second={images_per_second:.0f}".format(**metrics)
            )
            history.append(metrics)
            on_epoch(history)
            if checkpoints:
                checkpoint.save(checkpoints, run, history, modules, optimizer)
    return average.model, history


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, world: World) -> Evaluation:
    """Mean cross-entropy and accuracy over a split, in float32.

    Every rank takes its own rows, with no padding, and the sums are added up once: each image counts once.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # loss, correct, images
    mean, std = split.info["mean"], split.info["std"]
    own = epoch_order(len(split), 0, 0)[world.rank :: world.size]
    for first in range(0, len(own), EVALUATION_BATCH):
        images, labels = split.batch(own[first : first + EVALUATION_BATCH], world.device)
        logits = model(imaging.normalise(images, mean, std)).float()
        correct = (logits.argmax(1) == labels).sum()
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), correct.double(), torch.ones_like(loss).double() * len(labels)]).cpu()
    total = world.total(sums).tolist()
    return Evaluation(loss=total[0] / total[2], accuracy=total[1] / total[2], images=int(total[2]))


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast when it is asked for, or when `precision` is auto and the hardware multiplies bf16 natively."""
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32 here: recent GPUs, and CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
