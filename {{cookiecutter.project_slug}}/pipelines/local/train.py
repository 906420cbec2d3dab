"""Train on this machine as SageMaker would: `make train-local`.

    python -m pipelines train-local --data photos --set training.epochs=3

The job is SDK V3's `ModelTrainer` in local-container mode, with the project's image. Where no Docker engine answers,
the same entry script runs as processes under the same `SM_*` contract. It needs no AWS account, credentials, region or
network.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from pipelines import ROOT, project, runs, terminal
from pipelines.config import Settings, load
from pipelines.local import container, data, images, process
from pipelines.local.job import Interrupted, Job, JobFailed, interruptible, threads
from pipelines.local.view import TrainingView
from pipelines.report import page
from pipelines.terminal import UserError
from training.config import Hyperparameters

STARTED = time.monotonic()


def train(
    settings: Settings, source: str | None, run: str | None, verbose: bool, name: str | None = None,
    started: float = STARTED,
) -> Path:  # fmt: skip
    """Train once and publish the run.

    Args:
        settings: of the project.
        source: folder of raw images; None: the configured one.
        run: name of an interrupted run to resume, with the data and hyperparameters that it was started with; None:
            a fresh run.
        verbose: show everything that the container prints.
        name: of a fresh run; None: one by time.
        started: when, by the monotonic clock, its time began.

    Returns:
        The folder of the published run.

    Raises:
        UserError: when it did not succeed; nothing was published then.
    """
    if run:
        request = _request(run)
        source = request["source"]
        settings = settings.model_copy(update={"training": Hyperparameters(**request["hyperparameters"])})
    hyperparameters, instances = settings.training.as_dict(), settings.compute.local_instances
    dataset = data.prepare(settings, source)
    image = images.choose(settings, "training")
    name = run or name or runs.new_name()
    checkpoints = runs.CHECKPOINTS / name
    checkpoints.mkdir(parents=True, exist_ok=True)
    kept = checkpoints / "pretrained"  # of a run that is resumed: its first checkpoint may not have been written yet
    pretrained = (kept if kept.is_dir() else None) if run else data.weights(settings, kept)
    (checkpoints / "request.json").write_text(json.dumps({"source": source, "hyperparameters": hyperparameters}))
    channels = {"train": dataset / "train", "validation": dataset / "validation", "checkpoints": checkpoints}
    job = Job(
        name=name,
        root=_fresh_root(name),
        hyperparameters=hyperparameters,
        channels=channels | ({"pretrained": pretrained} if pretrained else {}),
        instances=instances,
        environment={"GIT_COMMIT": project.git_commit(), "PYTHONUNBUFFERED": "1"} | threads(instances),
    )
    print(f"run {name} on {dataset.relative_to(ROOT)}, {f'in image {image}' if image else 'as a process'}", flush=True)
    first_step: list[float] = []
    tried = project.source_hash()
    view = TrainingView(job.root / "job.log", image is not None, verbose)
    view.on_first_step = lambda: first_step.append(time.monotonic() - started)
    try:
        with contextlib.closing(view), interruptible():
            outputs = container.run(job, image, view) if image else process.run(job, view)
    except Interrupted as error:
        raise UserError(f"stopped by {error}; nothing was published. Resume with RUN={name}", code=130) from error
    except JobFailed as error:
        resume = f"resume it with RUN={name}; " if any(checkpoints.glob("step-*")) else ""
        raise UserError(f"{error}\n{resume}the whole log is {(job.root / 'job.log').relative_to(ROOT)}") from error
    facts = {
        "mode": "container" if image else "process",
        "image": image,
        "instances": instances,
        "data": str(dataset.relative_to(ROOT)),
        "source": tried,
        "seconds": round(time.monotonic() - started, 2),
        "seconds_to_first_step": round(first_step[0], 2) if first_step else 0.0,
    }
    folder = runs.publish(name, outputs.model, outputs.data, facts)
    for finished in (job.root, checkpoints):
        shutil.rmtree(finished, ignore_errors=True)
    return folder


def _request(run: str) -> dict[str, Any]:
    """What an interrupted run was started with."""
    if (runs.ARTIFACTS / run).is_dir():
        raise UserError(f"run {run} is finished; start a fresh one without RUN")
    file = runs.CHECKPOINTS / run / "request.json"
    if not file.is_file():
        known = sorted(path.parent.name for path in runs.CHECKPOINTS.glob("*/request.json"))
        raise UserError(f"there is no interrupted run {run!r}; there is {', '.join(known) or 'none at all'}")
    request: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return request


def _fresh_root(name: str) -> Path:
    """A new folder for the job; its base name is the compose project's name, so it is never used twice."""
    attempt = 1
    while True:
        root = runs.WORK / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            root.mkdir(parents=True)
            return root
        except FileExistsError:
            attempt += 1


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Train on this machine as SageMaker would.", settings=True)
    parser.add_data()
    parser.add_argument("--run", variable="RUN", help="name of an interrupted run to resume (default: a fresh run)")
    parser.add_mode()
    parser.add_argument("--instances", variable="INSTANCE_COUNT", type=int, help="default: compute.local_instances")
    parser.add_argument("--verbose", action="store_true", help="show everything that the container prints")
    options = parser.parse_args()
    if options.run and (options.data or any(override.startswith("training.") for override in options.set)):
        raise UserError(f"run {options.run} resumes with what it was started with; leave the other options out")
    own = {"compute.local_mode": options.mode, "compute.local_instances": options.instances}
    folder = train(load(options.set, options=own), options.data, options.run, options.verbose)
    print(page.attach(folder))
    print(runs.describe(folder))
    return 0
