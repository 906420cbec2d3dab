"""ruff refuses V2 of the SDK and names the V3 form; docs/migrating-from-v2.md names nothing that the SDK lacks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from pipelines import ROOT
from tests.helpers import verb_environment

PAGE = Path(__file__).with_name("migrating-from-v2.md").read_text(encoding="utf-8")  # docs/ of the template
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
V3 = tomllib.loads((ROOT / PROJECT["tool"]["ruff"]["extend"]).read_text(encoding="utf-8"))
BANNED: dict[str, str] = {name: entry["msg"] for name, entry in V3["lint"]["flake8-tidy-imports"]["banned-api"].items()}
PROGRAM = [str(Path(sys.executable).parent / "ruff"), "check", "--no-cache"]
RUFF = [*PROGRAM, "--select", "TID251"]
NAME = re.compile(r"sagemaker(?:\.\w+)+")
CALL = re.compile(r"`(sagemaker(?:\.\w+)+)(?:\(([^)`]*)\))?`")
# The names in the first column are V2's, or another guide's mistakes; all other names on the page are V3's.
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| ")]
OLD = sorted({name for row in ROWS for name, _ in CALL.findall(row[0])})
NEW = sorted(set(CALL.findall(re.sub(r"(?m)^\| [^|]*\|", "|", PAGE))))
SHIMS = {"sagemaker.lineage.artifact.Artifact", "sagemaker.train.configs.SourceCode"}  # the page says so
JOURNEYS = [
    "ModelTrainer", "PyTorch", "Torchrun", "LOCAL_CONTAINER", "HyperparameterTuner", "remote", "TrainingQueue",
    "JumpStartModel", "Marketplace", "ScriptProcessor", "FeatureGroup", "LabelingJob", "Endpoint",
    "ServerlessInferenceConfig", "invoke_async", "shadow", "autoscaling", "MultiDataModel", "InferenceComponent",
    "TransformJob", "DefaultModelMonitor", "ModelPackage", "Run", "MlflowApp", "LineageQuery", "ModelCard",
    "Pipeline", "EMRStep", "EMRServerlessStep", "SFTTrainer", "ModelBuilder", "InferenceSpec", "IN_PROCESS",
    "chaining", "optimize", "Checklist",
]  # fmt: skip

FIND = """
import importlib, inspect, json, sys, warnings
warnings.simplefilter("ignore")


def find(name):
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:  # a name inside a module; but a module that lacks another one is an error
            if not name.startswith(error.name):
                raise
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


answers = []
for name, keywords in json.load(sys.stdin):
    try:
        found = find(name)
        known = inspect.signature(found).parameters if keywords else {}
        answers.append([f"{name} takes no {word}" for word in keywords if word not in known])
    except Exception as error:
        answers.append([f"{name}: {error!r}"])
json.dump(answers, sys.stdout)
"""


@cache
def wrong() -> dict[str, list[str]]:
    """What the installed SDK says against every `name(keywords)` of the page and every name of the messages."""
    wanted: dict[str, list[str]] = {name: [] for name in (*OLD, *NAME.findall(" ".join(BANNED.values())))}
    wanted |= {f"{name}({arguments})": re.findall(r"(\w+)=", arguments) for name, arguments in NEW}
    answer = subprocess.run(
        [sys.executable, "-c", FIND],
        input=json.dumps([(name.split("(")[0], words) for name, words in wanted.items()]),
        env=verb_environment() | {"AWS_DEFAULT_REGION": "us-east-1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(zip(wanted, json.loads(answer.stdout), strict=True))


def statement(name: str, count: int) -> str:
    module, _, leaf = name.rpartition(".")
    return f"from {module} import {leaf} as name_{count}"


@cache
def refused(names: tuple[str, ...]) -> dict[str, str]:
    """What ruff says, with the project's settings, to a file that imports them all: name -> messages."""
    text = "\n".join(statement(name, count) for count, name in enumerate(names)) + "\n"
    words = [*RUFF, "--output-format", "json", "--stdin-filename", "pipelines/x.py", "-"]
    done = subprocess.run(words, cwd=ROOT, input=text, capture_output=True, text=True)
    said = dict.fromkeys(names, "")
    for problem in json.loads(done.stdout):
        assert problem["code"] == "TID251"
        said[names[problem["location"]["row"] - 1]] += problem["message"]
    return said


@pytest.mark.parametrize("name", BANNED)
def test_every_banned_name_is_refused_with_its_v3_form(name: str) -> None:
    said = refused((*BANNED, *OLD))[name]
    assert f"`{name}` is banned" in said
    assert BANNED[name] in said


def test_the_v3_form_in_every_message_imports() -> None:
    for name, message in BANNED.items():
        assert NAME.search(message) or "removed" in message, f"{name}: no V3 form"
        assert not [problem for form in NAME.findall(message) for problem in wrong()[form]]


def test_no_entry_hides_another() -> None:
    assert not [(a, b) for a in BANNED for b in BANNED if a.startswith(f"{b}.")]


@pytest.mark.parametrize("name", OLD)
def test_every_v2_name_of_the_page_is_refused_by_name(name: str) -> None:
    if name == "sagemaker.serve.ModelBuilder.from_training_job":  # a method: nothing imports it
        return
    said = refused((*BANNED, *OLD))[name]
    assert "is banned" in said
    named = re.search(rf"(?<![\w.]){name.split('.')[-1]}\b", said)  # as itself, not inside a path
    assert named, f"the message does not name {name}: {said}"


def test_nothing_of_the_project_trips() -> None:
    done = subprocess.run([*RUFF, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_make_lint_and_editors_refuse_them_beside_everything_else_that_the_project_asks_for() -> None:
    """No rule is named here: ruff finds pyproject.toml, which says which, and what that extends says which names."""
    text = "import os\nfrom sagemaker.estimator import Estimator\n"
    for place, wanted in (("pipelines/x.py", {"TID251", "F401"}), ("tests/x.py", {"TID251", "F401"})):
        words = [*PROGRAM, "--output-format", "json", "--stdin-filename", str(ROOT / place), "-"]
        done = subprocess.run(words, cwd=ROOT.parent, input=text, capture_output=True, text=True)  # as editors do
        assert {problem["code"] for problem in json.loads(done.stdout)} - {"I001"} == wanted, place
    assert set(V3) == {"lint"}, "pyproject.toml would replace or be mixed with what else ruff-v3.toml says"
    assert set(V3["lint"]) == {"flake8-tidy-imports"}


def test_every_v3_name_of_the_page_imports_and_takes_the_arguments_shown() -> None:
    assert len(NEW) > 150
    assert not [problem for name, arguments in NEW for problem in wrong()[f"{name}({arguments})"]]


def test_v2_names_are_gone() -> None:
    assert {name for name in OLD if not wrong()[name]} == SHIMS


def test_the_page_covers_every_journey_and_says_what_it_was_checked_with() -> None:
    assert not [word for word in JOURNEYS if word not in PAGE]
    version = subprocess.run(
        [sys.executable, "-c", "from importlib.metadata import version; print(version('sagemaker'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert f"`sagemaker` {version.rsplit('.', 1)[0]}." in PAGE
    assert "2026-11-21" in PAGE
    assert all(len(row) == 3 and row[1].strip() for row in ROWS)
