"""The rules of the house: what may import what, and facts that must be written once."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from pipelines import ROOT, SOURCE
from pipelines.__main__ import verbs
from tests.helpers import verb_environment
from training.config import Hyperparameters

MODULES = sorted([*SOURCE.rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])
VERBS = [path for path in MODULES if path.is_relative_to(ROOT / "pipelines")]
FLOORS = ["terminal project schema sections config environment", "runs report", "local", "cloud",
          "endpoint registry tuning", "training_pipeline batch monitoring tracking",
          "pipeline"]  # of pipelines/, the lowest first  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(str(node.module).split(".")[0])
    return names


def forbidden(path: Path) -> set[str]:
    if path.is_relative_to(SOURCE):
        return {"sagemaker", "boto3", "botocore", "pipelines", "src"}
    return {"torch", "torchvision", "safetensors", "src"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_wall_between_container_and_laptop(path: Path) -> None:
    assert not imported(path) & forbidden(path)


def upward(room: str, text: str) -> set[str]:
    """The rooms that a module of one imports although they are not below it; the lowest ones know each other."""
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in found if node.module == "pipelines" for alias in node.names}
    names |= {node.module.split(".")[1] for node in found if node.module and node.module.startswith("pipelines.")}
    own = FLOOR.get(room, len(FLOORS))  # a room of yours is on top of all
    return {name for name in names - {room} if FLOOR.get(name, -1) >= max(own, 1)}


@pytest.mark.parametrize("path", VERBS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward_only(path: Path) -> None:
    room = path.relative_to(ROOT / "pipelines").parts[0].removesuffix(".py")
    assert not upward(room, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", VERBS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_of_the_verbs_is_short_and_says_what_it_does(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))


def test_importing_the_verbs_needs_no_torch_and_no_sdk() -> None:
    names = ", ".join(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in VERBS)
    slow = ("torch", "sagemaker", "boto3", "botocore", "sklearn", "moto", "mlflow")
    code = f"import sys, {names}; print([name for name in {slow} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_training_the_small_network_imports_nothing_slow(packed: Path, tmp_path: Path) -> None:
    """A whole job on one rank: torchvision and torch.compile would each add seconds to its start."""
    code = (
        "import sys; from training.train import main; code = main(['--epochs', '1', '--batch_size', '16']);"
        "print(code, [name for name in ('torchvision', 'torch._dynamo') if name in sys.modules])"
    )
    folders = {"SM_CHANNEL_TRAIN": packed / "train", "SM_CHANNEL_VALIDATION": packed / "validation"}
    folders |= {"SM_MODEL_DIR": tmp_path / "model", "SM_OUTPUT_DATA_DIR": tmp_path / "output"}
    environment = verb_environment() | {name: str(path) for name, path in folders.items()}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE, env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines()[-1] == "0 []"


def test_training_yaml_holds_every_hyperparameter_with_its_type() -> None:
    document = yaml.safe_load((ROOT / "configs" / "training.yaml").read_text(encoding="utf-8"))
    assert list(document) == [option.name for option in fields(Hyperparameters)]


def test_every_verb_is_in_the_table() -> None:
    listed = {target for rows in verbs().values() for target, _ in rows.values() if isinstance(target, str)}
    mains = {path for path in VERBS if "\ndef main() -> int:" in path.read_text(encoding="utf-8")}
    names = {".".join(path.relative_to(ROOT / "pipelines").with_suffix("").parts) for path in mains}
    assert names - {"__main__"} == listed
