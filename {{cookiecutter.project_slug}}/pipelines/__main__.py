"""Every verb, its stage and what it does: `make <verb>` and `python -m pipelines <verb> --flag` are the same.

    python -m pipelines                 # the verbs by stage, as `make help`
    python -m pipelines data --help     # the options of one, each with its make variable

`help`, `setup` and `clean` run on the system's Python before there is an environment: nothing else is imported here.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines import terminal
from pipelines.terminal import UserError

Table = dict[str, dict[str, tuple[Any, str]]]
# By stage: a verb's module in this folder, or its commands, and a line that names every variable it takes. A verb whose
# module is not there is none: it belongs to a larger scope, or to another answer.
VERBS: Table = {
    "On this machine, without an AWS account": {
        "help": ((), "this list"),
        "setup": (["pipelines/environment.py"], "the environment in .venv, with uv (ARGS go to `uv pip install`)"),
        "data": ("local.data", "pack DATA=<folder of images, a sub-folder per class>; without it the sample digits"),
        "train-local": (
            "local.train",
            "train on this machine, in a container where Docker runs (DATA= RUN= LOCAL_MODE= INSTANCE_COUNT=)",
        ),
        "evaluate": ("local.evaluate", "metrics of a run on the test split (RUN= LOCAL_MODE= TRUST=)"),
        "report": (
            "local.report",
            "a run as one HTML page; evaluates it first where that was not done (RUN= LOCAL_MODE= TRUST=)",
        ),
        "compare": (
            "local.compare", "two runs side by side: what differs, metrics, and whether that is chance (RUN_A= RUN_B=)"
        ),
        "predict": (
            "local.predict",
            "classify IMAGE=<file> with a run's artifact, through its handlers (RUN= LOCAL_MODE= TRUST=)",
        ),
        "serve-local": (
            "local.serve",
            "a run behind HTTP on 127.0.0.1:8080, in a container; IMAGE=<file> asks once and stops, "
            "CORS=<origin> lets another page ask (RUN= LOCAL_MODE= TRUST=)",
        ),
        "notebook": ("report.notebook", "open notebooks/explore.ipynb: a run's curves, its mistakes, a model to ask"),
        "batch-local": (
            "batch.local", "classify every image of DATA=<folder> into a JSON-lines file (RUN= LOCAL_MODE= TRUST=)"
        ),
        "tune-local": (
            "tuning.local",
            "search the hyperparameters on this machine; goes on where it was stopped (DATA= RUN= LOCAL_MODE=)",
        ),
        "pipeline-local": (
            "pipeline.local", "preprocess, train, evaluate, gate and register on this machine (DATA= LOCAL_MODE=)"
        ),
        "track": ("tracking.track", "log a finished run to MLflow (RUN=, or JOB= of a run on SageMaker)"),
        "image": ("local.images", "build the images that train and serve (ARGS go to `docker build`)"),
    },
    "On SageMaker: the account": {
        "bootstrap": (
            "cloud.bootstrap", "the project's stack in AWS: bucket, image repository, roles, notifications (YES=1)"
        ),
        "doctor": ("cloud.doctor", "what is missing, here and in AWS, with its fix"),
        "image-push": ("cloud.images", "put the images into ECR, when they are not there"),
        "rehearse": (
            "cloud.rehearse", "the verbs of SageMaker here, in containers, without an account (DATA= ARGS=--keep)"
        ),
    },
    "On SageMaker: training": {
        "process": (
            "cloud.processing", "pack DATA=<folder or s3://...> on SageMaker (WAIT=1 YES=1; PLAN=1 only says the price)"
        ),
        "train": (
            "cloud.train", "train on SageMaker; DATA= may be s3://... (RUN= INSTANCE_COUNT= WAIT=1 YES=1 PLAN=1)"
        ),
        "tune": (
            "tuning.cloud",
            "search the hyperparameters on SageMaker, or show that of JOB= (DATA= WAIT=1 YES=1 PLAN=1)",
        ),
        "pipeline": (
            "pipeline.cloud",
            "preprocess, train, evaluate, gate and register as a SageMaker Pipeline; DATA= may be s3://... (WAIT=1 "
            "YES=1 PLAN=1)",
        ),
        "logs": ("cloud.jobs", "the log of JOB=, followed as long as it runs"),
        "pull": ("cloud.pull", "fetch the run of training job JOB= into artifacts/"),
    },
    "On SageMaker: serving": {
        "register": (
            "registry.register", "put an evaluated artifact into the model registry, for approval (RUN= JOB= ARTIFACT=)"
        ),
        "approve": (
            "registry.approve", "approve PACKAGE=<version or ARN>, or the newest that waits (YES=1 ARGS=--reject)"
        ),
        "deploy": (
            "endpoint.deploy",
            "an endpoint on SageMaker, or its update (RUN= JOB= PACKAGE= ARTIFACT= ENDPOINT= TYPE= WEIGHT= YES=1 "
            "PLAN=1)",
        ),
        "invoke": ("endpoint.invoke", "classify IMAGE=<file> with the endpoint (ENDPOINT= VARIANT=)"),
        "shift-traffic": (
            "endpoint.shift_traffic",
            "VARIANT=<name> of the endpoint gets WEIGHT=<percent> of the requests (ENDPOINT=)",
        ),
        "batch": (
            "batch.transform",
            "classify DATA=<folder or s3://...> by batch transform (RUN= JOB= PACKAGE= ARTIFACT= INSTANCE_COUNT= "
            "WAIT=1 YES=1 PLAN=1); without DATA= fetch what JOB= wrote",
        ),
        "monitor": (
            "monitoring.monitor",
            "watch the endpoint for drift, errors, latency (ENDPOINT= YES=1 PLAN=1); DATA=<captured requests>: compare "
            "here (RUN=)",
        ),
    },
    "On SageMaker: costs": {
        "status": ("cloud.status", "all of the project in AWS, since when, at what hourly cost"),
        "destroy": (
            "cloud.destroy", "remove what costs by the hour (ENDPOINT= YES=1; ALL=1 CONFIRM=<project>: everything)"
        ),
    },
    "The project itself": {
        "test": (["pytest"], "all tests; those that need a Docker engine are skipped without one"),
        "lint": (["ruff check .", "ruff format --check .", "mypy src pipelines tests"], "ruff and mypy"),
        "format": (["ruff check --fix .", "ruff format ."], "ruff, fixing what it can"),
        "audit": (
            ["pipelines/environment.py --audit"], "known vulnerabilities of the packages in .venv (asks PyPI)"
        ),
        "update-template": (
            "update_template",
            "merge what is new in the template, keeping your changes, after showing it (YES=1: at once); SCOPE=full: "
            "grow to that scope",
        ),
        "clean": (
            ["pipelines/environment.py --clean"],
            "remove caches and checkpoints of interrupted runs; data and artifacts stay",
        ),
    },
}  # fmt: skip
AWS = "On SageMaker"
UNPROVEN = f"{AWS}: request validated, not run on AWS;\n`make rehearse` executes each verb here, in containers."
USUAL = "train-local report predict serve-local bootstrap train deploy destroy data evaluate compare test"
SHOWN = 8  # of them, the first that the project has
# Not of verbs, but of make, and of programs that a verb starts; any other variable of the environment goes before make.
OTHERS = re.compile(r"ARGS|PYTHON|SHELL|MAKE.*|(AWS|DOCKER|INFERENCE|MLFLOW|SAGEMAKER|UV)_.+")


def verbs() -> Table:
    """The stages and verbs of this project."""
    folder = Path(__file__).parent

    def there(target: Any) -> bool:
        return not isinstance(target, str) or folder.joinpath(*target.split(".")).with_suffix(".py").is_file()

    found = {stage: {verb: row for verb, row in rows.items() if there(row[0])} for stage, rows in VERBS.items()}
    return {stage: rows for stage, rows in found.items() if rows}


def variables(text: str) -> list[str]:
    """The make variables that a line of help names."""
    return [name for name in re.findall(r"\b([A-Z_]+)=", text) if name != "ARGS"]


def listing(every: bool) -> str:
    """The verbs by stage with all that they take, or a line for each of those that most people need."""
    table = verbs()
    usual = [verb for verb in USUAL.split() if any(verb in rows for rows in table.values())][:SHOWN]
    columns, lines, last = min(shutil.get_terminal_size().columns, 120), [], ""
    for stage, rows in table.items():
        heading = stage if every else stage.partition(":")[0]
        for verb, (_, text) in rows.items():
            if every or verb in usual:
                lines += [*(["", heading] if heading != last else [])]
                last, start = heading, f"  make {verb:16} "
                short = text if every else re.sub(r" \([^()]*[A-Z]=[^()]*\)", "", text)
                lines += textwrap.wrap(short, columns, initial_indent=start, subsequent_indent=" " * len(start),
                                       break_on_hyphens=False)  # fmt: skip
    hint = "Options: make <verb> ARGS=--help." if every else "All verbs: make help. Options: make <verb> ARGS=--help."
    return "\n".join([*lines, "", hint, *([UNPROVEN] if last and AWS in str([*table]) else [])])


def refuse(names: Iterable[str], goals: Sequence[str]) -> None:
    """Make sure that a verb of this call of make takes each variable of its command line.

    Raises:
        UserError: with the nearest name, or those that there are.
    """
    rows = [rows[verb] for rows in verbs().values() for verb in goals if verb in rows]
    known = sorted({name for _, text in rows for name in variables(text)})
    for name in names:
        section, _, key = name.partition("__")
        sections = _sections(rows) if key else []
        if name in known or OTHERS.fullmatch(name) or section in sections:
            continue
        close = difflib.get_close_matches(name.upper(), [*known, *(f"{other}__{key}" for other in sections)], 1)
        setting = terminal.setting(f"{name}={terminal.given.get(name, '')}") if _sections(rows) else ""
        hint = setting or f"did you mean {close[0]}?" if setting or close else (
            f"it takes {', '.join([*known, 'ARGS'])}; a variable of the environment goes before make: {name}=... make"
        )  # fmt: skip
        raise UserError(f"make {' '.join(goals)} takes no {name}; {hint}", 2)


def _sections(rows: Iterable[tuple[Any, str]]) -> list[str]:
    """Of the settings, which SECTION__KEY overrides where one of the verbs may read them."""
    if not any(isinstance(target, str) for target, _ in rows) or not importlib.util.find_spec("pydantic"):
        return []
    from pipelines.config import sections

    return [section.upper() for section in sections()]


def words_of_make() -> list[str]:
    """What ARGS holds, split as a shell would and nothing expanded; what this call of make was given is kept.

    Raises:
        UserError: when nobody takes a variable, or a quote does not end.
    """
    names, goals = os.environ.pop("MAKE_GIVEN").split(), os.environ.pop("MAKE_GOALS", "").split()
    terminal.given.update(os.environ)
    text = os.environ.pop("ARGS", "")  # not for programs that a verb starts
    refuse(names, goals or ["help"])
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"ARGS cannot be split into words: {str(error).lower()} in {text!r}", 2) from None


def run(verb: str, words: list[str]) -> int:
    """Run a verb; returns its exit code.

    Raises:
        UserError: when there is no such verb, or when it says so.
    """
    rows = {name: row for stage in verbs().values() for name, row in stage.items()}
    if verb not in rows and (row := next((rows[verb] for rows in VERBS.values() if verb in rows), None)):
        small = row[0].partition(".")[0] in ("cloud", "endpoint", "pipeline", "registry") and "train" not in rows
        raise UserError(
            f"{verb} comes with a larger scope: `make update-template SCOPE={'cloud' if small else 'full'}` adds it", 2
        )
    if verb not in rows:
        close = difflib.get_close_matches(verb, rows, 1)
        hint = f"did you mean {close[0]}?" if close else "`make help` shows all"
        raise UserError(f"there is no verb {verb!r}; {hint}", 2)
    target = rows[verb][0]
    if isinstance(target, str):
        sys.argv = [f"python -m pipelines {verb}", *words]
        try:
            module = importlib.import_module(f"pipelines.{target}")
        except ModuleNotFoundError as error:
            raise UserError(
                f"this Python has no {error.name}; the project's is .venv/bin/python, `make setup` makes it"
            ) from error
        code: int = module.main()
        return code or _track(verb, words)
    if words and len(target) > 1:
        raise UserError(f"{verb} is {len(target)} programs, which take no options; start one of them yourself", 2)
    programs = [[sys.executable, *([] if ".py" in command else ["-m"]), *command.split()] for command in target]
    for program in programs[:-1]:
        if code := subprocess.run(program).returncode:
            return code
    return os.execv(sys.executable, [*programs[-1], *words])  # noqa: S606  in place of this: signals reach it


def _track(verb: str, words: list[str]) -> int:
    """Log what training or pulling made, in projects that do; its failure is none of theirs."""
    if verb in ("train-local", "pull") and any("track" in rows for rows in verbs().values()):
        job = [f"--job={terminal.given['JOB']}"] if terminal.given.get("JOB") else []
        command = [sys.executable, "-m", "pipelines", "track", "--optional"]
        subprocess.run([*command, *([*job, *words] if verb == "pull" else [])])
    return 0


def main() -> int:
    """Command line; see the module's docstring."""
    goals = os.environ.get("MAKE_GOALS", "alone").split()
    words = sys.argv[1:] + (words_of_make() if "MAKE_GIVEN" in os.environ else [])
    verb, *words = words or ["help"]
    if "help" in goals and len(goals) > 1:  # `make help train`: nobody wants to train
        if verb == "help":
            return 0
        words = ["--help"]
    if verb not in ("help", "-h", "--help"):
        return run(verb, words)
    print(listing(bool(goals)))  # none: make alone
    return 0


if __name__ == "__main__":
    terminal.run_verb(main)
