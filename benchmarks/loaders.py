"""The generated project's loop against ImageFolder with workers, Lightning and timm's loader, in one run.

    .venv/bin/python benchmarks/loaders.py --rounds 5       # a part of `make bench`

Bakes a project, adds Lightning and timm to its environment, and measures there. Needs the network for these only.
Each contender trains the same network with the same optimizer, precision and batch from the same JPEG files; ours packs
them once, before, in the time shown.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from page import Book, again, bake, enter, parser, spread

Case = tuple[str, int, int, int, int]  # model, pixels a side of the files and of the images, batch, steps an epoch
CASES: tuple[Case, ...] = (("cnn", 32, 32, 128, 30), ("resnet18", 256, 64, 32, 20))
MEAN = STD = (0.5, 0.5, 0.5)


class Step:
    """One optimizer step of a network, as all contenders but ours do it: no EMA, no checks."""

    def __init__(self, hyperparameters: Any, size: int) -> None:
        import torch
        from material import CLASSES
        from model import build_model
        from training.optim import build_optimizer
        from training.speed import autocast

        torch.manual_seed(0)
        self.model = build_model(hyperparameters.model, CLASSES, size).to(memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(self.model, hyperparameters)
        self.cast = autocast("auto", torch.device("cpu"))

    def loss(self, images: Any, labels: Any) -> Any:
        """Mean cross-entropy of a batch."""
        import torch

        with self.cast:
            logits = self.model(images.to(memory_format=torch.channels_last))
        return torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    def __call__(self, images: Any, labels: Any) -> None:
        """Forward, backward, step."""
        self.loss(images, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def image_folder(raw: Path, size: int, batch: int) -> Any:
    """Torchvision's ImageFolder behind PyTorch's DataLoader, a worker a core, kept from epoch to epoch."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize(size), transforms.RandomCrop(size, padding=size // 8), transforms.ToTensor(),
             transforms.Normalize(MEAN, STD)]  # fmt: skip
    return DataLoader(
        ImageFolder(raw / "train", transforms.Compose(steps)), batch_size=batch, shuffle=True, drop_last=True,
        num_workers=os.cpu_count() or 1, persistent_workers=True,
    )  # fmt: skip


def timm_loader(raw: Path, size: int, batch: int) -> Any:
    """The loader that timm's training script makes, with its prefetcher and no augmentation but a padded crop."""
    import torch
    from timm.data import create_dataset, create_loader

    return create_loader(
        create_dataset("folder", root=raw / "train", split="train"), input_size=(3, size, size), batch_size=batch,
        is_training=True, no_aug=False, hflip=0.0, color_jitter=None, train_crop_mode="rkrc", mean=MEAN, std=STD,
        num_workers=os.cpu_count() or 1, device=torch.device("cpu"),
    )  # fmt: skip


def seconds_of(batches: Any, step: Step) -> float:
    """Seconds of one epoch."""
    started = time.perf_counter()
    for images, labels in batches:
        step(images, labels)
    return time.perf_counter() - started


def lightning_seconds(batches: Any, step: Step) -> Callable[[], float]:
    """The same in Lightning's Trainer: seconds of its second epoch, so that its start does not count."""
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        """The step of `Step`, cast by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.network = step.model
            self.times: list[float] = []

        def training_step(self, batch: Any, _: int) -> Any:
            """The loss; Lightning does the rest."""
            return step.loss(*batch)

        def configure_optimizers(self) -> Any:
            """The same optimizer."""
            return step.optimizer

        def on_train_epoch_start(self) -> None:
            """Start the watch."""
            self.times.append(time.perf_counter())

        def on_train_epoch_end(self) -> None:
            """Stop it."""
            self.times.append(time.perf_counter())

    def epoch() -> float:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, batches)
        return module.times[3] - module.times[2]

    return epoch


def compete(case: Case, folder: Path, rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Images a second of each contender, a value a round; the contenders take turns in every round."""
    from material import CLASSES, write_images
    from model import best_device, build_model
    from processing.preprocess import pack
    from training.config import Hyperparameters, resolve
    from training.data import load_channels
    from training.distributed import World
    from training.loop import fit

    name, stored, size, batch, steps = case
    counts = {"train": batch * steps, "val": 5 * CLASSES, "test": CLASSES}
    write_images(folder / "raw", stored, counts, 9, ".jpg")
    started = time.perf_counter()
    pack(folder / "raw", folder / "packed", size)
    packing = time.perf_counter() - started
    splits = load_channels(folder / "packed" / "train", folder / "packed" / "validation")
    options = Hyperparameters(model=name, batch_size=batch, epochs=rounds + 1, ema_decay=0.0, learning_rate=1e-3)
    settled = resolve(options, size, len(splits[0]))
    loaders = {"ImageFolder, workers": image_folder(folder / "raw", size, batch),
               "timm's loader": timm_loader(folder / "raw", size, batch)}  # fmt: skip
    others: dict[str, Callable[[], float]] = {}
    for contender, loader in loaders.items():
        step = Step(settled, size)
        others[contender] = functools.partial(seconds_of, loader, step)
    others["Lightning, ImageFolder"] = lightning_seconds(image_folder(folder / "raw", size, batch), Step(settled, size))
    speeds: dict[str, list[float]] = {contender: [] for contender in ("this template", *others)}

    def between_epochs(history: list[dict[str, Any]]) -> None:
        counts = len(history) > 1  # everybody's first epoch warms up
        for contender, epoch in others.items():
            seconds = epoch()
            if counts:
                speeds[contender].append(batch * steps / seconds)
        if counts:
            speeds["this template"].append(history[-1]["images_per_second"])

    world = World(rank=0, size=1, device=best_device())
    fit(build_model(name, CLASSES, size).to(world.device), *splits, settled, world, on_epoch=between_epochs)
    yield from speeds.items()
    yield "packing", [packing]


def measure(cases: tuple[Case, ...], rounds: int) -> str:
    """Versions and tables, with the packages and the code of the project."""
    names = ("torch", "torchvision", "lightning", "timm")
    results = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            results["/".join(map(str, case))] = dict(compete(case, Path(folder), rounds))
    return f"{', '.join(f'{name} {importlib.metadata.version(name)}' for name in names)}\n{table(results)}"


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """A Markdown table: images a second, and what this template does for each image of the others."""
    text = ""
    for case, speeds in results.items():
        name, stored, size, batch, steps = case.split("/")
        packing = speeds.pop("packing")[0]
        text += (
            f"\n{name} at {size} pixels, batch {batch}, from {int(batch) * int(steps):,} JPEG files of {stored} pixels "
            f"(packing them once: {packing:.1f} s):\n\n"
            "| | images/s, median (range) | this template is faster by, median (range) |\n|---|---:|---:|\n"
        )
        for contender, values in speeds.items():
            ratios = [own / other for own, other in zip(speeds["this template"], values, strict=True)]
            text += f"| {contender} | {spread(values, 0)} | {spread(ratios, 2)} |\n"
    return text


def main() -> int:
    """Measure and keep a section of docs/benchmarks.md."""
    options = parser("The generated project's loop against others.").parse_args()
    if options.project is None:
        project, python = bake()
        uv = str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "lightning", "timm"], check=True)
        return again(python, project)
    enter(options.project)
    cases = tuple((name, stored, size, 8, 2) for name, stored, size, _, _ in CASES) if options.quick else CASES
    text = measure(cases, 1 if options.quick else max(options.rounds, 1))
    Book.of(options).keep("Against other loaders and loops", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
