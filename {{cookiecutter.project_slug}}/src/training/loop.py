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
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

import imaging
from training import augment, speed
from training.checkpoint import Checkpoints, Progress, choices, identity
from training.config import ConfigurationError, Hyperparameters
from training.data import Split, epoch_order, window_rows
from training.distributed import World, synchronise_batch_norm
from training.feed import Feed
from training.optim import WeightAverage, build_optimizer, learning_rate_at
from training.pretrained import train_mode
from training.watch import Guard, NonFiniteLoss, Watch

logger = logging.getLogger("training")
EVALUATION_BATCH = 256  # images a rank
PROGRESS_SECONDS = 5.0  # between progress lines inside an epoch


@dataclass(frozen=True)
class Evaluation:
    """Means over a whole split, each image counted once on any number of ranks."""

    loss: float  # cross-entropy, in nats
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

    Raises:
        ConfigurationError: when a batch has fewer images than there are ranks and parts.
        CheckpointError: when the folder's checkpoints are damaged or of another run.
        Stopped: after SIGTERM, on every rank, once a checkpoint is written.
        NonFiniteLoss: on every rank, before the optimizer step that it would have spoilt.
    """
    epochs, seed, parts = int(hyperparameters.epochs), hyperparameters.seed, hyperparameters.accumulate
    batch_size = min(hyperparameters.batch_size, len(train))
    if batch_size < world.size * parts:
        raise ConfigurationError(
            f"a batch of {batch_size} images cannot feed {world.size} ranks"
            + (f" in {parts} parts; accumulate less" if parts > 1 else "; use fewer ranks")
        )
    steps_per_epoch = len(train) // batch_size  # the rest of the shuffled images waits for another epoch
    total_steps = epochs * steps_per_epoch
    classes = len(train.classes)
    cast = autocast(hyperparameters.precision, world.device)

    if hyperparameters.sync_batch_norm and world.size > 1:
        synchronise_batch_norm(model)
    chosen = choices(checkpoints, world) if checkpoints else {}
    if not chosen:
        images, _ = train.batch(np.arange(batch_size)[world.rank :: world.size * parts], world.device)
        some = imaging.normalise(images, train.info["mean"], train.info["std"])
        chosen = speed.choose(model, some, hyperparameters, total_steps * parts, world, lambda: cast)
    model.to(memory_format=torch.channels_last if chosen["channels_last"] else torch.contiguous_format)
    average = WeightAverage(model, hyperparameters.ema_decay)
    optimizer = build_optimizer(model, hyperparameters)
    modules = {"model": model} if average.model is model else {"model": model, "average": average.model}
    parallel = world.wrap(model)  # gives all ranks the main one's state, so each rank's own is restored after it
    saved, progress, loss_sum = None, Progress(), None
    if checkpoints:
        run = identity(hyperparameters.shaping(), train.info["fingerprint"])
        saved = Checkpoints(checkpoints, run, world, modules, optimizer)
        progress, loss_sum = saved.restore()
    progress.choices = chosen
    if chosen["compile"]:
        parallel.compile()
    feed = Feed(train, world.device)
    window = window_rows(train, hyperparameters.shuffle_gigabytes)
    guard = Guard(model, optimizer, world.device)
    watch = Watch(world, progress, saved, 60 * hyperparameters.checkpoint_minutes)
    first_step, began = progress.step, time.perf_counter()
    if world.is_main:
        if progress.step:
            logger.info("resumed after epoch %d of %d and %d steps", progress.epoch, epochs, progress.position)
        logger.info("training for %d epochs of %d steps", epochs, steps_per_epoch)
        logger.info("%s; data: %s", ", ".join(f"{name}={value}" for name, value in chosen.items()), feed.mode)

    while progress.epoch < epochs:
        order = epoch_order(len(train), seed, progress.epoch, window)
        augmentation = augment.draw(len(train), train.image_size, hyperparameters, progress.epoch)
        if loss_sum is None:  # otherwise the epoch goes on: its sum and its random state were restored
            loss_sum = torch.zeros((), device=world.device)
            torch.manual_seed(_seed(seed, progress.epoch, world.rank))  # of dropout
        train_mode(model)
        started = reported = time.perf_counter()
        begun = progress.position
        steps = [order[first : first + batch_size] for first in range(0, steps_per_epoch * batch_size, batch_size)]
        shares = [step[world.rank :: world.size][part::parts] for step in steps for part in range(parts)]
        batches = feed.batches(shares, augmentation, begun * parts)
        for batch in steps[begun:]:
            for part in range(parts):
                images, labels = next(batches)  # augmented, normalised, on the device
                place = progress.epoch, progress.step * parts + part, world.rank
                images, labels = augment.mix(images, labels, classes, hyperparameters, *place)
                last = part == parts - 1  # ranks average their gradients once a step, in the last backward pass
                with contextlib.nullcontext() if last else world.without_sync(parallel):
                    with cast:
                        logits = parallel(images)
                    # A sum, scaled so that the mean over ranks is the mean over the batch also with unequal shares.
                    losses = functional.cross_entropy(
                        logits.float(), labels, reduction="sum", label_smoothing=hyperparameters.label_smoothing
                    )
                    guard.scale(losses, world.size / batch_size).backward()
                loss_sum += losses.detach()
            if hyperparameters.clip_gradients:
                nn.utils.clip_grad_norm_(model.parameters(), hyperparameters.clip_gradients)
            if not guard.allows_step():
                raise _not_finite(train, batch, progress.step)

            peak = float(hyperparameters.learning_rate)
            rate = learning_rate_at(progress.step, total_steps, peak, hyperparameters.warmup_fraction)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()
            progress.step += 1
            progress.position += 1

            if world.is_main and progress.step == first_step + 1:
                compiling = f" after {time.perf_counter() - started:.1f} s, compiling" if chosen["compile"] else ""
                logger.info("first step done%s", compiling)
            if watch.due() or progress.position == steps_per_epoch:
                if (good := guard.skipped()) is not None:
                    skipped = steps[good - (progress.step - progress.position - first_step)]
                    raise _not_finite(train, skipped, first_step + good)
                watch.meet(loss_sum)
                if world.is_main and time.perf_counter() - reported > PROGRESS_SECONDS:
                    reported = time.perf_counter()
                    pace = (progress.step - first_step) / (reported - began)
                    at = (progress.epoch + 1, epochs, progress.step, total_steps, pace)
                    left = (total_steps - progress.step) / pace
                    logger.info("progress epoch %d/%d step %d/%d, %.1f steps/s, %.0f s left", *at, left)

        train_loss = world.total(loss_sum).item() / (steps_per_epoch * batch_size)
        seconds = time.perf_counter() - started  # after .item(): an accelerator has finished its work
        world.average_buffers(model)
        if average.model is not model:
            world.average_buffers(average.model)
        result = evaluate(average.model, validation, world)
        progress.epoch, progress.position, loss_sum = progress.epoch + 1, 0, None
        metrics = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": train_loss,
            "val_loss": result.loss,
            "val_accuracy": result.accuracy,
            "images_per_second": (steps_per_epoch - begun) * batch_size / seconds,
        }
        progress.history.append(metrics)
        if world.is_main:
            logger.info(
                "epoch={epoch} step={step} train_loss={train_loss:.4f} val_loss={val_loss:.4f} "
                "val_accuracy={val_accuracy:.4f} images_per_second={images_per_second:.0f}".format(**metrics)
            )
            on_epoch(progress.history)
        watch.save(torch.zeros(()), wait=progress.epoch == epochs)
    return average.model, progress.history if world.is_main else []


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _not_finite(train: Split, batch: NDArray[np.int64], step: int) -> NonFiniteLoss:
    names = ", ".join(train.info["rows"]["train"][row] for row in batch[:3])
    return NonFiniteLoss(
        f"the loss is not finite at step {step + 1}, on {len(batch)} images that begin with {names}; the weights are "
        "as before that step. Lower learning_rate, set clip_gradients, or set precision to fp32"
    )


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
        found = torch.stack([loss, correct.to(loss.dtype), torch.full_like(loss, len(labels))])
        sums += found.cpu().double()  # there: Apple's GPUs have no float64
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
