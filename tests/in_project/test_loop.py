"""The training loop: pure functions, exact sums over ranks, and a resumed run that ends as one never stopped."""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from model import build_model
from processing.preprocess import pack
from training import augment, calibrate, checkpoint, distributed
from training.config import ConfigurationError, Hyperparameters, resolve
from training.data import DataError, epoch_order, load_channels, load_split
from training.distributed import World
from training.loop import evaluate, fit
from training.optim import WeightAverage, build_optimizer, learning_rate_at

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _every_save_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save is left out while another one is being written, as epochs of milliseconds would have it."""
    save = checkpoint.Checkpoints.save

    def patient(self: checkpoint.Checkpoints, progress: checkpoint.Progress, loss_sum: torch.Tensor, _: bool) -> None:
        save(self, progress, loss_sum, wait=True)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", patient)


def train(
    packed: Path, world: World = ALONE, checkpoints: Path | None = None, stop_after: int | None = None,
    norm: bool = True, **options: Any,
) -> tuple[Weights, list[dict[str, Any]]]:  # fmt: skip
    """Run the loop on a packed folder; `stop_after` epochs it breaks off as a kill would."""

    class Stop(Exception):
        pass

    def on_epoch(history: list[dict[str, Any]]) -> None:
        if len(history) > (stop_after or math.inf):
            raise Stop

    splits = load_channels(packed / "train", packed / "validation")
    settled = resolve(
        replace(Hyperparameters(epochs=4, batch_size=16, precision="fp32", deterministic=True), **options),
        12,
        len(splits[0]),
    )
    torch.manual_seed(settled.seed)
    model: Any = build_model(settled.model, 3, 12)
    if not norm:
        model = torch.nn.Sequential(*(layer for layer in model if not isinstance(layer, torch.nn.BatchNorm2d)))
    try:
        trained, history = fit(model, *splits, settled, world, checkpoints, on_epoch)
    except Stop:
        return {}, []
    return trained.state_dict(), history


def same(first: Weights, second: Weights) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_training_learns(packed: Path) -> None:
    _, history = train(packed, epochs=15)
    assert [epoch["epoch"] for epoch in history] == list(range(1, 16))
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    assert history[-1]["val_accuracy"] >= 8 / 9


def test_smoothed_labels_are_a_mixture_with_the_uniform_distribution(packed: Path) -> None:
    """So the loss of weights that hardly move is linear in `label_smoothing`."""
    none, some, more = (
        train(packed, epochs=1, learning_rate=1e-9, label_smoothing=share)[1][0]["train_loss"]
        for share in (0.0, 0.1, 0.4)
    )
    assert abs(some - none) > 1e-5
    assert more - none == pytest.approx(4 * (some - none), rel=1e-3)


def test_a_small_window_changes_the_order_only(packed: Path) -> None:
    whole, history = train(packed, epochs=1)
    windowed, other = train(packed, epochs=1, shuffle_gigabytes=1e-6)
    assert not same(whole, windowed)
    assert [epoch["step"] for epoch in history] == [epoch["step"] for epoch in other]


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "ema_decay": 0.0, "horizontal_flip": True}])
def test_same_seed_same_weights(packed: Path, options: dict[str, Any]) -> None:
    first, second = train(packed, **options)[0], train(packed, **options)[0]
    assert same(first, second)
    assert not same(first, train(packed, seed=1, **options)[0])


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd"}, {"ema_decay": 0.0}])
def test_resumed_run_ends_with_the_same_bytes(packed: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole, history = train(packed, **options)
    train(packed, checkpoints=tmp_path, stop_after=2, **options)
    assert list(tmp_path.iterdir())
    resumed, resumed_history = train(packed, checkpoints=tmp_path, **options)
    assert same(whole, resumed)
    assert [epoch["val_loss"] for epoch in resumed_history] == [epoch["val_loss"] for epoch in history]
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())


def test_damaged_checkpoints_are_passed_over_and_strange_ones_refused(packed: Path, tmp_path: Path) -> None:
    whole, _ = train(packed)
    train(packed, checkpoints=tmp_path, stop_after=3)
    state = sorted(tmp_path.glob("step-*"))[-1] / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert same(whole, train(packed, checkpoints=tmp_path)[0])
    with pytest.raises(checkpoint.CheckpointError, match=r"written with other hyperparameters or another data set"):
        train(packed, checkpoints=tmp_path, seed=1)
    for state in tmp_path.glob("*/state.safetensors"):
        state.write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match=r"none of the 2 checkpoints in .* is whole"):
        train(packed, checkpoints=tmp_path)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_a_compiled_run_learns_and_says_what_its_warm_up_took(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    eager, _ = train(packed, epochs=2)
    weights, history = train(packed, epochs=2, compile=True, deterministic=True)
    assert all(torch.allclose(weights[name], eager[name], atol=1e-3) for name in eager)
    assert len(history) == 2
    text = [record.getMessage() for record in caplog.records if record.getMessage().startswith("first step done")]
    assert text[0] == "first step done"
    assert re.fullmatch(r"first step done after \d+\.\d s, compiling", text[1])


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_at(step, 100, 0.5, 0.25) for step in range(100)]
    assert rates[:25] == sorted(rates[:25])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[0] == pytest.approx(0.5 / 26)
    assert max(rates) == pytest.approx(0.5, rel=1e-3)
    assert 0 < rates[-1] < 1e-4
    assert learning_rate_at(0, 1, 0.5, 0.0) > 0


def test_weight_average_is_exponential_and_off_at_zero() -> None:
    model: Any = torch.nn.BatchNorm1d(2)
    average, off = WeightAverage(model, 0.75), WeightAverage(model, 0.0)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(8.0)
    average.update()
    off.update()
    state = average.model.state_dict()
    assert state["weight"].tolist() == state["running_mean"].tolist() == [2.0, 2.0]
    assert off.model is model


def test_weight_decay_spares_biases_and_normalisation() -> None:
    model = build_model("cnn", 2, 8)
    for name in ("adamw", "sgd"):
        decayed, spared = build_optimizer(model, Hyperparameters(optimizer=name)).param_groups
        assert decayed["weight_decay"] == 0.05
        assert {parameter.ndim for parameter in decayed["params"]} == {2, 4}
        assert (spared["weight_decay"], {parameter.ndim for parameter in spared["params"]}) == (0.0, {1})


@pytest.mark.parametrize(("name", "options"), [("adamw", {}), ("sgd", {"momentum": 0.9, "nesterov": True})])
def test_optimizers_step_as_those_of_torch(name: str, options: dict[str, Any]) -> None:
    """They leave out torch's wrappers for torch.compile; the arithmetic must stay."""
    theirs = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    own = build_optimizer(models[0], Hyperparameters(optimizer=name))  # type: ignore[arg-type]
    groups = [{"params": [models[1].weight], "weight_decay": 0.05}, {"params": [models[1].bias], "weight_decay": 0.0}]
    for optimizer, model in ((own, models[0]), (theirs(groups, lr=0.0, fused=True, **options), models[1])):
        for step in range(5):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            torch.manual_seed(step)
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert same(models[0].state_dict(), models[1].state_dict())


def test_order_and_augmentation_are_functions_of_seed_and_epoch() -> None:
    assert np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
    assert not np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 3))
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    choices = augment.draw(1000, 32, Hyperparameters(translate=0.125, horizontal_flip=True, seed=1), epoch=2)
    assert (choices.shifts.min(), choices.shifts.max()) == (-4, 4)
    assert 400 < choices.flips.sum() < 600
    images = torch.randint(0, 256, (1000, 5, 5, 3), dtype=torch.uint8)
    rows = np.array([7, 3, 900])
    together = choices.apply(images[rows], rows)
    alone = torch.cat([choices.apply(images[[row]], np.array([row])) for row in rows])
    assert torch.equal(together, alone)  # whatever shares the batch


def test_both_ways_to_shift_agree() -> None:
    images = torch.randint(1, 256, (40, 9, 7, 3), dtype=torch.uint8)
    shifts = np.random.default_rng(0).integers(-6, 7, (40, 2))
    shifts[0] = (0, 0)
    shifts[1] = (2, -1)
    moved = augment.warp(images, augment.motion(*-shifts.T))
    assert torch.equal(moved, augment.shift_by_copy(images, shifts))
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, 2:, :-1], images[1, :-2, 1:])
    assert not moved[1, :2].any()


def _rank(rank: int, size: int, packed: str, results: str, options: dict[str, Any]) -> None:
    """One of several gloo ranks: evaluate a fixed model, then train, and write down what came out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=size)
    world = World(rank=rank, size=size, device=torch.device("cpu"))
    torch.manual_seed(0)
    model, split = build_model("cnn", 3, 12), load_split(Path(packed) / "validation")
    untrained = evaluate(model, split, world)
    with patch.object(calibrate, "BATCH", 2):
        logits = calibrate.answers(model, split, world)
    weights, history = train(Path(packed), world, **options)
    assert (not history) == (rank > 0)
    facts = {"untrained": [untrained.loss, untrained.accuracy, untrained.images], "history": history}
    facts["temperature"] = calibrate.temperature(logits, torch.from_numpy(split.labels)) if world.is_main else None
    Path(results, f"{rank}.json").write_text(json.dumps(facts))
    torch.save(weights, f"{results}/{rank}.pt")
    distributed.stop()


def run_ranks(rank: Callable[..., None], size: int, *args: Any) -> None:
    """Call `rank(number, size, *args)` in `size` processes, each of which ends as train.py does, at once.

    What gloo leaves of itself can abort when the interpreter ends, after a success.
    """
    spawn(_run_rank, args=(rank, size, args), nprocs=size)


def _run_rank(number: int, rank: Callable[..., None], size: int, args: tuple[Any, ...]) -> None:
    rank(number, size, *args)
    os._exit(0)


def _abort_late(number: int, _: int, folder: str) -> None:
    Path(folder, str(number)).touch()
    atexit.register(os.abort)


def test_what_a_rank_leaves_behind_does_not_end_it_badly(tmp_path: Path) -> None:
    run_ranks(_abort_late, 2, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    with pytest.raises(ProcessExitedException):
        spawn(_abort_late, args=(2, str(tmp_path)), nprocs=2)


def ranks(size: int, packed: Path, results: Path, **options: Any) -> tuple[list[dict[str, Any]], list[Weights]]:
    results.mkdir()
    run_ranks(_rank, size, str(packed), str(results), options)
    facts = [json.loads((results / f"{rank}.json").read_text()) for rank in range(size)]
    return facts, [torch.load(results / f"{rank}.pt", weights_only=True) for rank in range(size)]


def test_ranks_agree_and_evaluation_counts_every_image_once(packed: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    alone, temperatures = evaluate(build_model("cnn", 3, 12), load_split(packed / "validation"), ALONE), set()
    for size in (1, 2, 3, 4):
        facts, weights = ranks(size, packed, tmp_path / str(size), epochs=8)
        temperatures.add(facts[0]["temperature"])
        for rank in range(size):
            loss, accuracy, images = facts[rank]["untrained"]
            assert (images, accuracy) == (9, alone.accuracy)  # 9 images on 2 ranks: padding would count 10
            assert loss == pytest.approx(alone.loss, rel=1e-6)
            assert same(weights[0], weights[rank])
        history = facts[0]["history"]
        assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert len(temperatures) == 1


@pytest.mark.parametrize("synced", [True, False])
def test_one_global_batch_gives_one_loss_curve(packed: Path, tmp_path: Path, synced: bool) -> None:
    """On 1 rank and on 2, with batch norm over the batch of all ranks; each rank's own batch norm gives another."""
    options: dict[str, Any] = {"epochs": 3, "optimizer": "sgd", "learning_rate": 0.01, "sync_batch_norm": synced}
    _, alone = train(packed, **options)
    facts, _ = ranks(2, packed, tmp_path / "two", **options)
    curves = [
        [(epoch["train_loss"], epoch["val_loss"]) for epoch in history] for history in (alone, facts[0]["history"])
    ]
    assert np.allclose(curves[0], curves[1], rtol=1e-4) == synced


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"accumulate": 4, "clip_gradients": 1e5}])
def test_a_batch_in_parts_is_the_same_batch(packed: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """But for batch norm, which sees parts: so with a model that has none."""
    common: dict[str, Any] = {"epochs": 2, "learning_rate": 0.01, "optimizer": "sgd", "norm": False}
    whole, parts = train(packed, **common)[1], train(packed, **common, **options)[1]
    assert parts[0]["val_loss"] == pytest.approx(whole[0]["val_loss"], rel=1e-5)
    facts, _ = ranks(2, packed, tmp_path / "two", **common, **options)
    assert facts[0]["history"][0]["val_loss"] == pytest.approx(whole[0]["val_loss"], rel=1e-5)
    with pytest.raises(ConfigurationError, match=r"a batch of 16 images cannot feed 1 process in 17 parts"):
        train(packed, **common, accumulate=17)


def test_clipping_bounds_the_step(packed: Path) -> None:
    options: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "weight_decay": 0.0}
    options |= {"epochs": 1, "batch_size": 42, "warmup_fraction": 0.0, "ema_decay": 0.0}
    torch.manual_seed(0)
    start = {key: value.clone() for key, value in build_model("cnn", 3, 12).named_parameters()}
    moved = {clip: train(packed, clip_gradients=clip, **options)[0] for clip in (0.0, 1e-3)}
    lengths = {
        clip: math.sqrt(sum((weights[key] - start[key]).detach().square().sum().item() for key in start))
        for clip, weights in moved.items()
    }
    assert lengths[1e-3] <= 1.001e-3 * learning_rate_at(0, 1, 1.0, 0.0) < lengths[0.0]


def test_more_ranks_than_validation_images(raw: Path, tmp_path: Path) -> None:
    """Two images to validate on, for three ranks."""
    for label in ("down", "up"):
        (tmp_path / "few" / label).mkdir(parents=True)
        for number in range(4):
            shutil.copy(raw / label / f"{number}.png", tmp_path / "few" / label)
    assert pack(tmp_path / "few", tmp_path / "packed")["counts"] == {"train": 4, "validation": 2, "test": 2}
    torch.manual_seed(0)
    alone = evaluate(build_model("cnn", 3, 12), load_split(tmp_path / "packed" / "validation"), ALONE)
    facts, weights = ranks(3, tmp_path / "packed", tmp_path / "results", epochs=2)
    assert all(rank["untrained"] == [pytest.approx(alone.loss, rel=1e-6), alone.accuracy, 2] for rank in facts)
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])
    assert all(math.isfinite(epoch["train_loss"]) for epoch in facts[0]["history"])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("schema", "has data-set schema version 9, this code reads 1; pack the data again"),
        ("size", "the shards in .* do not fit together; pack the data again"),
        ("rows", "the shards in .* do not fit together; pack the data again"),
        ("class", "has labels outside its 3 classes; pack the data again"),
        ("class below zero", "has labels outside its 3 classes; pack the data again"),
        ("gone", "holds no image; add images to the data set and pack it again"),
        ("pickle", "is no packed data set"),
    ],
)
def test_a_damaged_data_set_is_refused_before_it_is_trained_on(
    packed: Path, tmp_path: Path, damage: str, sentence: str
) -> None:
    shutil.copytree(packed, tmp_path / "packed")
    folder = tmp_path / "packed" / "train"
    info = json.loads((folder / "dataset.json").read_text())
    (images,), (labels,) = folder.glob("images-*.npy"), folder.glob("labels-*.npy")
    if damage in ("schema", "size"):
        changed = {"schema": {"schema_version": 9}, "size": {"size": 13}}[damage]
        (folder / "dataset.json").write_text(json.dumps(info | changed))
    elif damage == "gone":
        images.unlink()
        labels.unlink()
    else:
        numbers = np.load(labels)
        numbers[-1] = 3 if damage == "class" else -1
        numbers = np.load(labels)[:-1] if damage == "rows" else numbers
        np.save(labels, numbers.astype(object) if damage == "pickle" else numbers)
    with pytest.raises(DataError, match=sentence):
        load_channels(folder, packed / "validation")


def test_data_that_cannot_be_trained_on_is_named(packed: Path, tmp_path: Path, raw: Path) -> None:
    with pytest.raises(DataError, match="is no packed data set"):
        load_split(tmp_path / "nothing")
    pack(raw, tmp_path / "other", seed=9)
    with pytest.raises(DataError, match="splits of different data sets"):
        load_channels(packed / "train", tmp_path / "other" / "validation")
    shutil.copytree(packed, tmp_path / "single")
    for file in (tmp_path / "single").glob("*/dataset.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": ["only"]}))
    for file in (tmp_path / "single").glob("*/labels-*.npy"):
        np.save(file, np.zeros_like(np.load(file)))
    with pytest.raises(DataError, match="has one class, 'only'"):
        load_channels(tmp_path / "single" / "train", tmp_path / "single" / "validation")
    with pytest.raises(ConfigurationError, match="a batch of 1 image cannot feed 2 processes"):
        train(packed, World(rank=0, size=2, device=torch.device("cpu")), batch_size=1)
