"""Log a finished run to MLflow: `make track`, `make track RUN=<name>`, `make track JOB=<job>` (fetches it first).

    python -m pipelines track --run 20261121-093000-a1b2 --set tracking.uri=https://mlflow.example.com

`make train-local` and `make pull` do it too, after their work. Tracking reads the run's files, so it cannot kill,
slow or repeat training. Do it as often as you want: what was logged half is completed, nothing is logged twice.
MLFLOW_TRACKING_URI overrides `tracking.uri`.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import re
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines import project, runs, terminal
from pipelines.cloud import pull
from pipelines.cloud.account import Account
from pipelines.config import load
from pipelines.terminal import UserError

VARIABLES = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds that a server may be silent
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print passwords
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
PATIENCE = 30.0  # seconds for all of it, after training: a server can also be slow one byte at a time
BATCH = 500  # metrics of a request; MLflow takes 1000


def log(folder: Path, uri: str) -> str:
    """Log a run's parameters, metrics by epoch, artifact and origin, as far as they are not there yet.

    Args:
        folder: of a finished run.
        uri: a tracking URI of MLflow; the ARN of a SageMaker tracking server is one.

    Returns:
        One line for a person.

    Raises:
        UserError: when the store does not have what it was told.
        Exception: whatever the store's client raises.
    """
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    facts = runs.read(folder / "run.json")
    name, own, metrics = facts["run"], project.name(), _metrics(folder)
    start = round(datetime.strptime(name[:15], "%Y%m%d-%H%M%S").timestamp() * 1000)  # local time
    length = round(facts["seconds"] * 1000)
    last = max(epoch for _, epoch, _ in metrics)
    origin = {
        "git_commit": facts["git_commit"] or "", "mlflow.source.git.commit": facts["git_commit"] or "",
        "dataset_fingerprint": facts["dataset_fingerprint"], "data": facts["data"], "mode": facts["mode"],
        "artifact": facts.get("model_uri") or str(folder / "model.tar.gz"), "mlflow.source.name": own,
    }  # fmt: skip

    def kept(run: Any) -> bool:
        wanted = {key: value for key, epoch, value in metrics if epoch == last}
        whole = run.info.status == "FINISHED" and run.data.params.keys() >= facts["hyperparameters"].keys()
        found = run.data.metrics
        return whole and all(math.isclose(found.get(key, math.inf), wanted[key], rel_tol=1e-6) for key in wanted)

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(own)
    place = (runs.ARTIFACTS / "mlflow").as_uri() if uri == local_store() else None  # MLflow's own is the current folder
    where = experiment.experiment_id if experiment else client.create_experiment(own, artifact_location=place)
    same = (run for run in client.search_runs([where], f"attributes.run_name = '{name}'") if run.info.run_name == name)
    run = next(same, None) or client.create_run(where, start_time=start, run_name=name)
    if kept(run):
        return f"run {name} is in {_public(uri)} already"
    key = run.info.run_id
    # The times come from the run too: a metric that is told again is then the same one, not a second one.
    points = [Metric(metric, value, start + length * epoch // last, epoch) for metric, epoch, value in metrics]
    client.log_batch(
        key,
        params=[Param(option, str(value)) for option, value in facts["hyperparameters"].items()],
        tags=[RunTag(tag, value) for tag, value in origin.items()],
    )
    for first in range(0, len(points), BATCH):
        client.log_batch(key, metrics=points[first : first + BATCH])
    client.log_artifact(key, str(folder / "model.tar.gz"))
    client.set_terminated(key, "FINISHED", start + length)
    if not kept(client.get_run(key)):
        raise UserError("the store says yes to everything, but does not have the run")
    return f"logged run {name} to {_public(uri)}"


def local_store() -> str:
    """The database on this disk."""
    return f"sqlite:///{runs.ARTIFACTS / 'mlflow.db'}"


def _metrics(folder: Path) -> list[tuple[str, int, float]]:
    """Name, epoch and value: of every epoch, and at the last one what holds for the run as a whole."""
    found = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        epoch = values.pop("epoch")
        found += [(key, epoch, float(value)) for key, value in values.items()]
    whole: dict[str, float] = runs.read(folder / "metrics.json")
    if (folder / "evaluation.json").exists():
        test = runs.read(folder / "evaluation.json")["metrics"]
        whole |= {f"test_{key}": metric["value"] for key, metric in test.items()}
    by_epoch = {key for key, _, _ in found}
    return found + [(key, found[-1][1], float(value)) for key, value in whole.items() if key not in by_epoch]


def _public(text: str) -> str:
    """The text in one line, without the passwords of addresses."""
    return re.sub(r"//[^/\s@]+@", "//", " ".join(text.split()))[:200]


def _reason(error: BaseException) -> str:
    """What an error began with: MLflow, urllib3 and SQLAlchemy each wrap it in sentences of their own."""
    first = error.__cause__ or error.__context__
    return _reason(first) if first else _public(str(error)) or type(error).__name__


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Log a finished run to MLflow.", settings=True)
    parser.add_argument("--run", variable="RUN", help="name of a run (default: the newest)")
    parser.add_argument(
        "--job", variable="JOB", help="name of a training job on SageMaker, fetched when it is not here"
    )
    parser.add_argument("--optional", action="store_true", help="a failure is a warning, and nothing takes long")
    options = parser.parse_args()
    settings = load(options.set)
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    logging.disable(logging.WARNING)  # of MLflow and its libraries: one line is enough
    chosen = os.environ.get("MLFLOW_TRACKING_URI") or settings.tracking.uri
    uri = local_store() if chosen == "local" else chosen
    folder = pull.pull(Account(settings), options.job) if options.job else runs.find(options.run)
    again = terminal.command("track", RUN=folder.name)
    later = f"run {folder.name} is not in MLflow ({_public(uri)}): %s; log it with `{again}`"

    def give_up() -> None:
        print("warning:", later % f"not done after {PATIENCE:g} seconds", file=sys.stderr, flush=True)
        os._exit(0)

    watchdog = threading.Timer(PATIENCE, give_up)  # a database on this disk may be slow, and must not be left half made
    watchdog.daemon = True
    try:
        importlib.import_module("mlflow")  # takes its time the first time, and that is not the store's fault
        if options.optional and uri != local_store():
            watchdog.start()
        print(log(folder, uri))
    except Exception as error:  # the client's, of any kind: nothing that a store does may look like a failed training
        message = later % _reason(error)
        if not options.optional:
            raise UserError(message) from error
        print("warning:", message, file=sys.stderr)
    watchdog.cancel()
    return 0
