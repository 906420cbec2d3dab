"""Train an image classifier on a packed data set: the entry script of every training job.

Run by `make train-local`, or by hand on a packed data set:

    SM_CHANNEL_TRAIN=data/digits/train SM_CHANNEL_VALIDATION=data/digits/validation \
    SM_MODEL_DIR=/tmp/model SM_OUTPUT_DATA_DIR=/tmp/output python src/training/train.py --epochs 3

`torchrun --nproc_per_node 2 src/training/train.py ...` trains on two ranks; jobs start `launch.py`, which starts this.
Everything else comes from environment variables, most of them the `SM_*` of SageMaker's containers; the script does not
know if it is in one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.time()
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

from training import interruption  # noqa: E402

if __name__ == "__main__":
    interruption.listen()  # before the imports that take seconds: a signal that comes then must not be lost

import numpy as np  # noqa: E402
import safetensors  # noqa: E402
import torch  # noqa: E402

from inference.export import rehearse, write_artifact, write_json  # noqa: E402
from model import ModelError, build_model  # noqa: E402
from progress import plain, several  # noqa: E402
from scores import advice  # noqa: E402
from training import calibrate, checkpoint, config, data, distributed  # noqa: E402
from training.board import Board  # noqa: E402
from training.checkpoint import WRITER, CheckpointError  # noqa: E402
from training.loop import LINE, fit  # noqa: E402
from training.pretrained import freeze, initialise  # noqa: E402
from training.watch import NonFiniteLoss, exported  # noqa: E402

logger = logging.getLogger("training")
EXPLANATION = "error: "  # how a reason that is for the user begins
EXPLAINED = (config.ConfigurationError, data.DataError, ModelError, CheckpointError, NonFiniteLoss)  # no traceback


@dataclass(frozen=True)
class Folders:
    """Where the job reads and writes.

    Attributes:
        train, validation: the channels, each a packed split.
        model: what the platform packs into `model.tar.gz`.
        output: of the run's other files.
        checkpoints: written to and resumed from; None: no checkpoints.
        pretrained: a channel with one file of weights; None: there is none.
    """

    train: Path
    validation: Path
    model: Path
    output: Path
    checkpoints: Path | None
    pretrained: Path | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Folders:
        """Read the `SM_*` variables of the training contract.

        Raises:
            ConfigurationError: when one that every job needs is not set.
        """
        names = ("SM_CHANNEL_TRAIN", "SM_CHANNEL_VALIDATION", "SM_MODEL_DIR", "SM_OUTPUT_DATA_DIR")
        missing = [name for name in names if not environment.get(name)]
        if missing:
            raise config.ConfigurationError(
                f"{' and '.join(missing)} not set; start the script through `make train-local`, or set them to folders"
            )
        checkpoints = Path(environment.get("SM_CHANNEL_CHECKPOINTS") or "/opt/ml/checkpoints")
        if environment.get("CHECKPOINTS_PER_JOB") and checkpoints.is_dir():  # the jobs of a tuner share the folder
            checkpoints /= environment["TRAINING_JOB_NAME"]
            checkpoints.mkdir(exist_ok=True)
        train, validation, model, output = (Path(environment[name]) for name in names)
        pretrained = Path(environment["SM_CHANNEL_PRETRAINED"]) if environment.get("SM_CHANNEL_PRETRAINED") else None
        return cls(train, validation, model, output, checkpoints if checkpoints.is_dir() else None, pretrained)


def train(
    hyperparameters: config.Hyperparameters,
    folders: Folders,
    train_split: data.Split,
    validation: data.Split,
    world: distributed.World,
) -> None:
    """Train, evaluate and write the artifact and the run's files (main rank only).

    Args:
        hyperparameters: as given; every `auto` is settled here.
        folders: where the job reads and writes.
        train_split, validation: of one packed data set.
        world: this rank among all ranks.

    Raises:
        Stopped: after SIGTERM, once a checkpoint is written.
        ConfigurationError, ModelError, CheckpointError, NonFiniteLoss: what is wrong, in a sentence.
    """
    folders.output.mkdir(parents=True, exist_ok=True)
    logger.addHandler(_file_handler(folders.output / "train.log") if world.is_main else logging.NullHandler())
    settled = config.resolve(hyperparameters, train_split.image_size, len(train_split))
    torch.manual_seed(settled.seed)
    model = build_model(settled.model, len(train_split.classes), train_split.image_size, settled.model_options)
    known = checkpoint.choices(folders.checkpoints, world) if folders.checkpoints else {}
    started: dict[str, str] | None = known.get("pretrained")
    if not known:  # a run that is resumed has its weights, and was rehearsed
        parts = settled.accumulate * world.size
        alone = min(settled.batch_size, len(train_split)) < 2 * parts and not settled.sync_batch_norm
        started = world.first(lambda: begin(model, settled, folders.pretrained, validation, alone))
    freeze(model, settled.frozen_stages)
    world.share(model.to(world.device))
    kind = world.device.type.upper()  # CPU, CUDA or MPS
    if world.is_main:
        choices = [f"{name}={value}" for name, value in settled.as_dict().items()]
        logger.info("%d training and %d validation images of %s on %s, %s", len(train_split), len(validation),
                    several(len(train_split.classes), "class"), several(world.size, "process"), kind)  # fmt: skip
        logger.info("hyperparameters: %s", " ".join(choices))

    live = os.environ.get("TENSORBOARD_FOLDER")  # SageMaker uploads it while the job runs
    board = Board([folders.output, *([Path(live)] if live else [])])

    def record(history: list[dict[str, Any]]) -> None:
        lines = [json.dumps(epoch) + "\n" for epoch in history]
        (folders.output / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        board.add(history)

    begun: dict[str, Any] = {"pretrained": started}
    trained, history = fit(model, train_split, validation, settled, world, folders.checkpoints, record, begun)
    logits = calibrate.answers(trained, validation, world)
    if world.is_main:
        record(history)
        # The first epoch warms up; one that was resumed at its very end trained nothing.
        rates = [epoch["images_per_second"] for epoch in history[1:] or history if epoch["images_per_second"]] or [0.0]
        best = exported(history, settled)
        if history[-1]["epoch"] < int(settled.epochs):
            logger.info("ended after epoch %d, as patience is %d", history[-1]["epoch"], settled.patience)
        logger.info("exported: %s", LINE.format(**best))  # last: a tuner takes the last value of its objective
        warning = advice(best["val_accuracy"], best["majority"], len(validation))
        if warning:
            logger.info("warning: %s", warning)
        metrics = {
            **{name: best[name] for name in ("val_accuracy", "majority", "val_f1", "val_worst_recall", "val_loss")},
            "train_loss": best["train_loss"],
            "epoch": best["epoch"],
            "epochs": history[-1]["epoch"],
            "steps": history[-1]["step"],
            "train_images_per_second": sum(rates) / len(rates),
            "world_size": world.size,
            "seconds": time.time() - STARTED,
        }
        git_commit = os.environ.get("GIT_COMMIT") or None
        write_artifact(folders.model, trained, settled, validation, metrics, git_commit, logits)
        write_json(folders.output / "metrics.json", metrics)
        facts = {
            "hyperparameters": settled.as_dict(),
            "git_commit": git_commit,
            "dataset_fingerprint": validation.info["fingerprint"],
            "pretrained": started and started["name"],
            "pretrained_sha256": started and started["sha256"],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "safetensors": safetensors.__version__,
            },
            "choices": {name: value for name, value in begun.items() if name != "pretrained"},
            "warning": warning,
            "device": torch.cuda.get_device_name() if kind == "CUDA" else f"{kind} ({platform.machine()})",
        }
        write_json(folders.output / "run.json", facts)
        logger.info("artifact written")
    world.barrier()


def begin(
    model: torch.nn.Module, settled: config.Hyperparameters, channel: Path | None, validation: data.Split, alone: bool
) -> dict[str, str] | None:
    """Rehearse the artifact and load the weights to start from, on one rank; what `initialise` returns."""
    rehearse(model, settled, validation, alone)
    return initialise(model, settled.model, settled.pretrained, channel)


def main(arguments: list[str]) -> int:
    """Run the job; a failure is explained on standard error and in `$SM_OUTPUT_FAILURE`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        hyperparameters = config.from_command_line(arguments, os.environ)
        folders = Folders.from_environment(os.environ)
        if hyperparameters.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        distributed.check_gpus(os.environ)
        # Before the ranks meet: one that leaves while they do breaks the meeting for the others.
        splits = data.load_channels(folders.train, folders.validation)
        world = distributed.start(hyperparameters.peer_timeout_seconds)
        train(hyperparameters, folders, *splits, world)
        distributed.stop()
        return 0
    except interruption.Stopped:
        logger.info("stopped by SIGTERM; a checkpoint is written, nothing else is")
        interruption.mark()
        return interruption.EXIT_CODE
    except EXPLAINED as error:
        reason, code = f"{EXPLANATION}{error}", 2
    except Exception as error:
        reason, code = traceback.format_exc(), 1
        if "does not have a deterministic implementation" in str(error):
            operation = str(error).partition(", but")[0]
            reason, code = f"{EXPLANATION}deterministic is true, and {operation}; set it to false, or take a model "\
                           "without this operation", 2  # fmt: skip
    # A name in it may look like the line of an epoch, which SageMaker reads numbers from: `val_accuracy=0.99`.
    print(plain(reason.replace("=", "= "), more="\n"), file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # the disk may be what failed
        if os.environ.get("SM_OUTPUT_FAILURE"):
            _explain(Path(os.environ["SM_OUTPUT_FAILURE"]), reason)
    return code


def _explain(failure: Path, reason: str) -> None:
    """Write why the job failed, but keep what another rank explained: its end looks like a broken connection here."""
    explained = failure.exists() and failure.read_text(encoding="utf-8").startswith(EXPLANATION)
    if reason.startswith(EXPLANATION) or not explained:
        failure.write_text(reason, encoding="utf-8")


def _file_handler(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    # At once, but for a checkpoint: leaving a process group whose other ranks are gone can hang, what is left of it can
    # abort when the interpreter ends (gloo, after a success: "terminate called without an active exception"), and the
    # threads of a compiler that was interrupted never end.
    for thread in threading.enumerate():
        if thread.name == WRITER:
            thread.join()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
