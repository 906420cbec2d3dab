"""Search hyperparameters on this machine, one trial after the other: `make tune-local`.

    python -m pipelines tune-local --data photos --set tuning.max_jobs=20

The ranges and the objective of `make tune`, each trial a run of `make train-local`, the search by Optuna. A search that
was stopped, or killed, goes on where it was: the newest with the same settings, or the one that `RUN=` names, which may
get more trials with a higher `tuning.max_jobs`. What it found is in artifacts/tuning/<name>/.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines import ROOT, runs, terminal
from pipelines.cloud import train as cloud_train
from pipelines.config import Settings, load
from pipelines.local import data, images
from pipelines.local import train as local_train
from pipelines.local.job import Interrupted, interruptible
from pipelines.sections import Tuning, number
from pipelines.terminal import UserError
from pipelines.tuning import results
from training.config import Hyperparameters, parse

STUDIES = runs.ARTIFACTS / "tuning"
REQUEST, RESULT = "request.json", "result.json"  # what a search was started with, and of one that reached its end
GUESSES = 4  # random trials before the model of Bayesian search has something to learn from


def tune(settings: Settings, source: str, name: str | None, verbose: bool) -> Path:
    """Search, or go on with a search.

    Args:
        settings: of the project.
        source: folder of raw images.
        name: of a search that was begun; None: the newest unfinished one with these settings, else a fresh one.
        verbose: show everything that containers print.

    Returns:
        The folder with what it found.

    Raises:
        UserError: when it was stopped, or no trial succeeded.
    """
    data.prepare(settings, source)
    search = settings.tuning
    mode = "container" if images.choose(settings, "training") else "process"  # chosen once, for all trials
    settings = settings.model_copy(update={"compute": settings.compute.model_copy(update={"local_mode": mode})})
    request = {"source": source, "training": settings.training.as_dict(), "tuning": search.model_dump()}
    name = name or _unfinished(request) or runs.new_name()
    folder = STUDIES / name
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        (folder / RESULT).unlink(missing_ok=True)
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        try:
            with interruptible():
                trials = _search(settings, source, folder, verbose)
        except Interrupted as error:
            message = f"stopped by {error}; the search goes on with `{terminal.command('tune-local', RUN=name)}`"
            raise UserError(message, code=130) from error
        best = results.best(search, trials)
        result = {"best": best and best.name, search.objective: best and best.objective, "values": best and best.values}
        (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(results.table(search, trials, terminal.width()))
    print(f"in {folder.relative_to(ROOT)}: trials.txt, {RESULT}")
    if best is None:
        raise UserError(f"none of the {len(trials)} trials succeeded; each said why above")
    print(f"best: {best.name}, which artifacts/{runs.LATEST} leads to now")
    print(f"next:\n  {terminal.command('evaluate', RUN=best.name)}")
    print(f"  {terminal.command('train-local', ARGS=results.options(best))}")
    return folder


def _search(settings: Settings, source: str, folder: Path, verbose: bool) -> list[results.Trial]:
    """Try until there are enough trials; begins with the one that was stopped."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = settings.tuning
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}", study_name=folder.name, load_if_exists=True,
        direction=search.goal.lower(),
    )  # fmt: skip
    seed = settings.training.seed + len(study.trials)  # or a search that goes on would repeat its first guesses
    study.sampler = (
        optuna.samplers.RandomSampler(seed=seed)
        if search.strategy == "Random"
        else optuna.samplers.TPESampler(seed=seed, n_startup_trials=GUESSES)
    )
    stopped = [trial for trial in study.trials if not trial.state.is_finished() and "run" in trial.user_attrs]
    while len(trials := _trials(study)) < search.max_jobs:
        if stopped:
            trial = stopped.pop(0)
        else:
            trial = study.ask({key: _distribution(key, choice) for key, choice in search.ranges.items()})
            trial.set_user_attr("run", runs.new_name())
        words = " ".join(f"{key}={results.short(value)}" for key, value in trial.params.items())
        print(f"trial {len(trials) + 1} of {search.max_jobs}: {words}", flush=True)
        reached = _trained(settings, source, trial.user_attrs["run"], trial.params, verbose)
        study.tell(trial.number, reached, state=optuna.trial.TrialState.FAIL if reached is None else None)
        trials = _trials(study)
        if leader := results.best(search, trials):
            runs.point(leader.name)
        (folder / "trials.txt").write_text(results.table(search, trials) + "\n", encoding="utf-8")
    return trials


def _distribution(name: str, choice: Any) -> Any:
    """A range, as Optuna has it."""
    from optuna import distributions

    if isinstance(choice, list):
        return distributions.CategoricalDistribution(choice)
    if number(name) is int:
        return distributions.IntDistribution(int(choice.min), int(choice.max), log=choice.scale == "log")
    return distributions.FloatDistribution(choice.min, choice.max, log=choice.scale == "log")


def _trained(settings: Settings, source: str, run: str, values: dict[str, Any], verbose: bool) -> float | None:
    """Train one trial, or go on with it where it was stopped; what it reached, None when it failed.

    Raises:
        Interrupted: when a signal came.
    """
    trial = settings.model_copy(update={"training": parse(settings.training.as_dict() | values)})
    folder, begun = runs.ARTIFACTS / run, (runs.CHECKPOINTS / run / "request.json").is_file()
    if not folder.is_dir():  # else the search was killed before it took note
        try:
            local_train.train(trial, source, run if begun else None, verbose, run, time.monotonic())
        except UserError as error:
            if error.code == 130:
                raise Interrupted("a signal") from error
            print(f"the trial failed: {error}", flush=True)
            return None
    epochs = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = runs.read(folder / "metrics.json")["epoch"]
    return float(json.loads(epochs[kept - 1])[cloud_train.METRICS[settings.tuning.objective]])


def _trials(study: Any) -> list[results.Trial]:
    """Those that have ended."""
    return [
        results.Trial(
            trial.user_attrs["run"], trial.params, trial.value, "Failed" if trial.value is None else "Completed"
        )
        for trial in study.trials
        if trial.state.is_finished()
    ]


def _unfinished(request: dict[str, Any]) -> str | None:
    """The newest search that was started with the same and has not reached its end."""
    for file in sorted(STUDIES.glob(f"*/{REQUEST}"), reverse=True):
        if not (file.parent / RESULT).exists() and json.loads(file.read_text()) == json.loads(json.dumps(request)):
            print(f"going on with the search {file.parent.name}", flush=True)
            return file.parent.name
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process works on the same search.

    Raises:
        UserError: when one does.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"the search {folder.name} runs already, in another process; wait for it") from error
        yield


def _begun(settings: Settings, name: str, most: bool) -> tuple[Settings, str]:
    """The settings and the source that a search was started with; with `most` max_jobs is that of now."""
    file = STUDIES / name / REQUEST
    if not file.is_file():
        known = sorted(path.parent.name for path in STUDIES.glob(f"*/{REQUEST}"))
        raise UserError(f"there is no search {name!r}; there is {', '.join(known[-5:]) or 'none at all'}")
    request = json.loads(file.read_text(encoding="utf-8"))
    search = request["tuning"] | ({"max_jobs": settings.tuning.max_jobs} if most else {})
    update = {"training": Hyperparameters(**request["training"]), "tuning": Tuning.model_validate(search)}
    return settings.model_copy(update=update), request["source"]


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Search hyperparameters on this machine.", settings=True)
    parser.add_data()
    parser.add_argument(
        "--run", variable="RUN", help="name of a search to go on with (default: the newest unfinished one)"
    )
    parser.add_mode()
    parser.add_argument("--verbose", action="store_true", help="show everything that containers print")
    options = parser.parse_args()
    settings = load(options.set, options={"compute.local_mode": options.mode})
    source = options.data or settings.data.source
    if options.run:
        most = [override.startswith("tuning.max_jobs=") for override in options.set]
        other = [override for override in options.set if override.startswith(("training.", "tuning."))]
        if options.data or len(other) > sum(most):
            raise UserError(
                f"search {options.run} goes on with what it was started with, but for tuning.max_jobs; leave other "
                "options out"
            )
        settings, source = _begun(settings, options.run, any(most))
    tune(settings, source, options.run, options.verbose)
    return 0
