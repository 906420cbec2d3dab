"""What more than one device meets: a ResNet-50 step, the exchange of its gradients, and what the data path gives.

    .venv/bin/python benchmarks/scaling.py --rounds 5       # a part of `make bench`

Bakes a project and measures there; on a CPU with gloo, so that the numbers say what this code costs, not what a GPU
reaches. `docs/scaling.md` of the generated project counts with them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from page import Book, Measured, again, bake, enter, parser, spread

SIZE, BATCH, IMAGES = 224, 16, 4096


def resnet50(rounds: int) -> Measured:
    """Seconds of one training step at 224 pixels, batch 16, and the bytes of its gradients."""
    import torch
    from model import build_model
    from training.config import Hyperparameters
    from training.optim import build_optimizer
    from training.speed import autocast

    model = build_model("resnet50", 1000, SIZE).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, Hyperparameters(optimizer="sgd"))
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (BATCH,))
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        with autocast("auto", images.device):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    gradients = sum(parameter.numel() * 4 for parameter in model.parameters())
    return {"ResNet-50 at 224 pixels, images/s": [BATCH / each for each in seconds[1:]],
            "its gradients, MB": [gradients / 1e6]}  # fmt: skip


def exchange(rank: int, port: int, rounds: int, result: Path) -> None:
    """Average 25.6 million float32 gradients over two ranks on this machine; rank 0 writes the seconds."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    gradients, seconds = torch.ones(25_557_032), []
    for _ in range(rounds + 1):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(gradients)
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        result.write_text(json.dumps(seconds[1:]), encoding="utf-8")
    dist.destroy_process_group()
    os._exit(0)  # what gloo leaves of itself can abort when the interpreter ends


def all_reduce(rounds: int, folder: Path) -> Measured:
    """Milliseconds of that exchange through gloo on one host."""
    from torch.multiprocessing.spawn import spawn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(exchange, (port, rounds, folder / "seconds.json"), nprocs=2)
    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    return {"all-reduce of them, 2 ranks on this host (gloo), ms": [1e3 * each for each in seconds]}


def data_path(rounds: int, folder: Path) -> Measured:
    """Images a second that the feed gathers at 224 pixels from one shard: in the page cache, and read from the disk."""
    import numpy as np
    import torch
    from training.augment import draw
    from training.config import Hyperparameters
    from training.data import Split, epoch_order
    from training.feed import Feed

    path = folder / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8))
    subprocess.run(["sync"], check=True)
    info: dict[str, Any] = {"size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3}
    plain = draw(IMAGES, SIZE, Hyperparameters(translate=0.0), 0)
    speeds: Measured = {"cache": [], "disk": []}
    for epoch in range(rounds):
        for kind in ("disk", "cache"):
            if kind == "disk":
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            split = Split([np.load(path, mmap_mode="r").view(np.ndarray)], np.zeros(IMAGES, np.int64), info)
            order = epoch_order(IMAGES, 0, epoch)
            shares = [order[first : first + 64] for first in range(0, IMAGES, 64)]
            started = time.perf_counter()
            if kind == "disk":  # the pixels alone
                for rows in shares:
                    split.pixels(rows)
            else:
                for _ in Feed(split, torch.device("cpu")).batches(shares, plain):
                    pass
            speeds[kind].append(IMAGES / (time.perf_counter() - started))
            del split  # pages that are mapped stay in the cache
    return {"feed at 224 pixels, files in the page cache, normalised, images/s": speeds["cache"],
            "pixels at 224 pixels, random rows from this machine's disk, images/s": speeds["disk"]}  # fmt: skip


def main() -> int:
    """Measure and keep a section of docs/benchmarks.md."""
    options = parser("What a step of ResNet-50 costs and its gradients send.").parse_args()
    if options.project is None:
        project, python = bake()
        return again(python, project)
    enter(options.project)
    rounds = 1 if options.quick else max(options.rounds, 1)
    with tempfile.TemporaryDirectory() as folder:
        measured = resnet50(rounds) | all_reduce(rounds, Path(folder)) | data_path(rounds, Path(folder))
    rows = "".join(f"| {name} | {spread(values)} |\n" for name, values in measured.items())
    text = f"| | median (range) |\n|---|---:|\n{rows}"
    Book.of(options).keep("What scaling is counted from", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
