"""The training loop: forward, backward, step, and an exact evaluation after every epoch, or every few.

Plain PyTorch from top to bottom; `src/training/train.py` is its entry. Read `fit` first.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

import imaging
import scores
from progress import several
from training import augment, interruption, speed
from training.checkpoint import Checkpoints, Progress, choices, identity
from training.config import ConfigurationError, Hyperparameters
from training.data import Split, balanced_order, class_weights, epoch_order, window_rows
from training.distributed import World, synchronise_batch_norm
from training.feed import Feed, mix
from training.optim import WeightAverage, build_optimizer, learning_rate_at
from training.pretrained import train_mode
from training.watch import Guard, NonFiniteLoss, Watch, exported, over

logger = logging.getLogger("training")
PROGRESS_SECONDS = 5.0  # between progress lines inside an epoch
LINE = ("epoch={epoch} step={step} train_loss={train_loss:.4f} val_loss={val_loss:.4f} val_accuracy={val_accuracy:.4f} "
        "majority={majority:.4f} val_f1={val_f1:.4f} val_worst_recall={val_worst_recall:.4f} "
        "images_per_second={images_per_second:.0f}")  # fmt: skip
SHORT_LINE = "epoch={epoch} step={step} train_loss={train_loss:.4f} images_per_second={images_per_second:.0f}"


@dataclass(frozen=True)
class Evaluation:
    """Means over a whole split, each image counted once on any number of ranks."""

    loss: float  # cross-entropy, in nats
    accuracy: float
    majority: float  # the share of the largest class: the accuracy of always answering it
    f1: float  # the mean over classes
    worst_recall: float  # of the class that is recognised worst
    images: int

    def metrics(self) -> dict[str, float]:
        """By the names in logs and files."""
        names = ("loss", "accuracy", "f1", "worst_recall")
        return {f"val_{name}": getattr(self, name) for name in names} | {"majority": self.majority}


def fit(
    model: nn.Module,
    train: Split,
    validation: Split,
    hyperparameters: Hyperparameters,
    world: World,
    checkpoints: Path | None = None,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    facts: dict[str, Any] | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train `model` in place.

    Args:
        model: on `world.device`, the same on every rank.
        train, validation: splits of one packed data set.
        hyperparameters: with every `auto` resolved.
        world: this rank among all ranks.
        checkpoints: folder for checkpoints, resumed from when it holds some; None: none are written.
        on_epoch: called on the main rank after each epoch that is evaluated, with the metrics of all of them.
        facts: of a run's beginning, kept in its checkpoints; what is chosen here is added.

    Returns:
        The averaged model (the trained one when `ema_decay` is 0), which is what was evaluated, as it was after the
        epoch that `watch.exported` names, and the metrics of all evaluated epochs (on the main rank).

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
            f"a batch of {several(batch_size, 'image')} cannot feed {several(world.size, 'process')}"
            + (f" in {parts} parts; accumulate less" if parts > 1 else "; use fewer of them")
        )
    steps_per_epoch = len(train) // batch_size  # the rest of the shuffled images waits for another epoch
    total_steps = epochs * steps_per_epoch
    smoothing = hyperparameters.label_smoothing
    classes, balanced = len(train.classes), hyperparameters.sampling == "balanced"
    weighted = hyperparameters.class_weights == "balanced"
    weights = torch.from_numpy(class_weights(train.labels, classes)).to(world.device) if weighted else None
    share = math.ceil(batch_size / (world.size * parts))  # images that a rank computes at a time
    settled = speed.settle(hyperparameters, world.device, share, train.image_size)
    cast = speed.autocast(settled["precision"], world.device)

    if hyperparameters.sync_batch_norm and world.size > 1:
        synchronise_batch_norm(model, world.device)
    chosen = choices(checkpoints, world) if checkpoints else {}
    if not chosen:
        images, _ = train.batch(np.arange(batch_size)[world.rank :: world.size * parts], world.device)
        some = imaging.normalise(images, train.info["mean"], train.info["std"])
        chosen = speed.choose(model, some, hyperparameters, total_steps * parts, world, lambda: cast)
        chosen |= dict(facts or {})
    model.to(memory_format=torch.channels_last if chosen["channels_last"] else torch.contiguous_format)
    average = WeightAverage(model, hyperparameters.ema_decay)
    optimizer = build_optimizer(model, hyperparameters)
    modules = {"model": model} if average.model is model else {"model": model, "average": average.model}
    if hyperparameters.keep == "best":
        modules["kept"] = copy.deepcopy(average.model).requires_grad_(False).eval()
    parallel = world.wrap(model)  # gives all ranks the main one's state, so each rank's own is restored after it
    saved, progress, loss_sum = None, Progress(), None
    if checkpoints:
        run = identity(hyperparameters.shaping(), train.info["fingerprint"])
        saved = Checkpoints(checkpoints, run, world, modules, optimizer)
        progress, loss_sum = saved.restore()
    progress.choices = chosen
    if chosen["compile"]:
        parallel.compile(mode=speed.mode(chosen["compile"]))
    feed = Feed(train, world.device, compiled=bool(chosen["compile"]))
    evaluated = Feed(validation, world.device)
    if facts is not None:
        facts |= chosen | settled | {"images": feed.mode, "evaluated_images": evaluated.mode}
    window = window_rows(train, hyperparameters.shuffle_gigabytes)
    guard = Guard(model, optimizer, world.device, settled["precision"] == "fp16")
    if progress.scaler:
        guard.scaler.load_state_dict(progress.scaler)
    watch = Watch(world, progress, saved, 60 * hyperparameters.checkpoint_minutes, guard)
    first_step, began = progress.step, time.perf_counter()
    if world.is_main:
        if progress.step:
            logger.info("resumed after epoch %d of %d and %d steps", progress.epoch, epochs, progress.position)
        logger.info("training for %s of %s", several(epochs, "epoch"), several(steps_per_epoch, "step"))
        logger.info("memory layout %s, %s; images %s", "channels last" if chosen["channels_last"] else "channels first",
                    speed.words(chosen["compile"]), feed.WORDS[feed.mode])  # fmt: skip
        logger.info("precision %s; %d images are evaluated at a time", settled["precision"],
                    settled["evaluation_batch"])  # fmt: skip

    while not over(progress, hyperparameters):
        order = epoch_order(len(train), seed, progress.epoch, window)
        if balanced:
            order = balanced_order(train.labels, seed, progress.epoch)
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
                images, labels = mix(images, labels, classes, hyperparameters, *place)
                last = part == parts - 1  # ranks average their gradients once a step, in the last backward pass
                with contextlib.nullcontext() if last else world.without_sync(parallel):
                    with cast:
                        logits = parallel(images)
                    # A sum, scaled so that the mean over ranks is the mean over the batch also with unequal shares.
                    losses = functional.cross_entropy(
                        logits.float(), labels, weights, reduction="sum", label_smoothing=smoothing
                    )
                    guard.scale(losses, world.size / batch_size).backward()
                loss_sum += losses.detach()
            guard.unscale()
            if hyperparameters.clip_gradients:
                nn.utils.clip_grad_norm_(model.parameters(), hyperparameters.clip_gradients)
            if not guard.allows_step():
                raise _not_finite(train, batch, progress.step)

            peak = float(hyperparameters.learning_rate)
            rate = learning_rate_at(progress.step, total_steps, peak, hyperparameters.warmup_fraction)
            for group in optimizer.param_groups:
                group["lr"] = rate
            guard.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()
            progress.step += 1
            progress.position += 1

            if progress.step == first_step + 1:
                interruption.stepped()
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
        metrics: dict[str, Any] = {"epoch": progress.epoch + 1, "step": progress.step, "train_loss": train_loss}
        looked = metrics["epoch"] % hyperparameters.evaluate_every == 0 or metrics["epoch"] == epochs
        if looked:
            watch.soon()  # a signal that comes from here on is heard between batches, and the state is that before them
            largest, meet = settled["evaluation_batch"], partial(_meet, watch, loss_sum)
            metrics |= evaluate(average.model, validation, world, evaluated, largest, meet).metrics()
            watch.soon()
        metrics["images_per_second"] = (steps_per_epoch - begun) * batch_size / seconds
        progress.epoch, progress.position, loss_sum = progress.epoch + 1, 0, None
        progress.history += [metrics] if looked else []
        if world.is_main:
            logger.info((LINE if looked else SHORT_LINE).format(**metrics))
        if world.is_main and looked:
            on_epoch(progress.history)
        if looked and "kept" in modules and exported(progress.history, hyperparameters) is metrics:
            modules["kept"].load_state_dict(average.model.state_dict())
        watch.save(torch.zeros(()), wait=over(progress, hyperparameters))
    return modules.get("kept", average.model), progress.history if world.is_main else []


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _not_finite(train: Split, batch: NDArray[np.int64], step: int) -> NonFiniteLoss:
    names = ", ".join(train.info["rows"]["train"][row % len(train)] for row in batch[:3])
    return NonFiniteLoss(
        f"the loss is not finite at step {step + 1}, on {len(batch)} images that begin with {names}; the weights are "
        "as before that step. Lower learning_rate, set clip_gradients, or set precision to fp32"
    )


def _meet(watch: Watch, loss_sum: torch.Tensor) -> None:
    if watch.due():
        watch.meet(loss_sum)


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, world: World, feed: Feed | None = None, batch: int = speed.EVALUATION_BATCH,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:  # fmt: skip
    """Mean cross-entropy, accuracy and what accuracy hides over a split, in float32 (on GPUs cuDNN's TF32).

    Every rank takes its own rows, with no padding, and the sums are added up once: each image counts once. All stays
    on the device until the end, so that it never waits.

    Args:
        model: the model.
        split: all images.
        world: this rank among all ranks.
        feed: of the split.
        batch: images of a rank at a time.
        between: called after each of them, as often on every rank.
    """
    model.eval()
    classes = len(split.classes)
    own = epoch_order(len(split), 0, 0)[world.rank :: world.size]
    shares = [own[first : first + batch] for first in range(0, len(own), batch)]
    losses: list[torch.Tensor] = []
    answers = [torch.zeros(0, dtype=torch.int64, device=world.device)]
    for images, labels in (feed or Feed(split, world.device)).batches(shares) if shares else ():
        logits = model(images).float()
        losses.append(functional.cross_entropy(logits, labels, reduction="sum"))
        answers.append(logits.argmax(1))
        between()
    if len(shares) < math.ceil(len(split) / (world.size * batch)):  # the other ranks have one more
        between()
    called, truth = torch.cat(answers).cpu().numpy(), split.labels[own]
    loss = np.cumsum(torch.stack(losses).cpu().double().numpy())[-1] if losses else 0.0  # Apple's GPUs have no float64
    found = truth[truth == called], truth, called
    counts = [np.bincount(each, minlength=classes)[:classes] for each in found]  # recognised, of the class, called it
    loss_sum, *counted = world.total(torch.from_numpy(np.concatenate([[loss], *counts]))).tolist()
    right, actual, called_it = (counted[first : first + classes] for first in range(0, 3 * classes, classes))
    images = sum(actual)
    summary = scores.summary(right, actual, called_it)
    return Evaluation(loss=loss_sum / images, accuracy=sum(right) / images, images=int(images), **summary)
