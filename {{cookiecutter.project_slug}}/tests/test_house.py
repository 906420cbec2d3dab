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


def test_wall_test_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def late():\n    import boto3.session\n    from torch import nn\n")
    assert imported(file) == {"boto3", "torch"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_is_short_and_says_what_it_does(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))


def test_importing_the_verbs_needs_no_torch_and_no_sdk() -> None:
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "pipelines").rglob("[!_]*.py")]
    modules = ", ".join(".".join(file.parts) for file in files)
    slow = ("torch", "sagemaker", "boto3", "botocore", "sklearn", "moto", "mlflow")
    code = f"import sys, {modules}; print([name for name in {slow} if name in sys.modules])"
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


def test_every_verb_is_a_module_with_a_main_and_a_line_of_help() -> None:
    for rows in verbs().values():
        for verb, (target, text) in rows.items():
            path = ROOT.joinpath("pipelines", *target.split(".")) if isinstance(target, str) else None
            assert path is None or "\ndef main() -> int:" in path.with_suffix(".py").read_text(encoding="utf-8"), verb
            assert text
