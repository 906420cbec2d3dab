"""docs/change-it.md of the project: each change is applied to a fresh project, linted and trained with."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NO_ENGINE, TEMPLATE, Bake, Project

QUICK = {
    "LOCAL_MODE": "process",
    "TUNING__MAX_JOBS": "2",
    "TRAINING__EPOCHS": "1",
    "TRAINING__COMPILE": "false",
    **NO_ENGINE,
}
KINDS = "model timm hyperparameter metric augmentation loss stopping table python labels".split()


def chapters(page: str) -> list[str]:
    """The text of each numbered change."""
    found = re.split(r"(?m)^## \d+\. ", page)[1:]
    assert len(found) == len(KINDS)
    return found


def blocks(chapter: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", chapter)


def apply(project: Project, diff: str) -> list[str]:
    """Change files as a reader would: where the lines with `-` and ` ` stand, those with `+` and ` ` come."""
    names = []
    for part in re.split(r"(?m)^(?=(?:---|\+\+\+) )", diff)[1:]:
        head, _, body = part.partition("\n")
        kind, name = head.split(" ", 1)
        path = project.path / name
        names.append(name)
        for hunk in re.split(r"(?m)^@@\n", body):
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in f"{sign} ") for sign in "-+")
            if kind == "+++":
                assert not old
                assert not path.exists()
                path.write_text(new, encoding="utf-8")
                continue
            text = path.read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{name} has not once:\n{old}"
            path.write_text(text.replace(old, new), encoding="utf-8")
    return names


def last(project: Project, name: str) -> dict[str, Any]:
    """What a file of the newest run holds."""
    found: dict[str, Any] = json.loads((project.path / "artifacts" / "latest" / name).read_text(encoding="utf-8"))
    return found


def has_its_model(project: Project, said: str) -> None:
    assert last(project, "run.json")["hyperparameters"]["model"] == "my_net.MyNet"
    done = project.make("predict", "IMAGE=data/raw/digits/4/0780.png", **QUICK)
    assert "data/raw/digits/4/0780.png: " in done.stdout  # by the artifact's own code
    assert "model=my_net.MyNet model_options={'width': 48}" in said


def has_its_setting(project: Project, said: str) -> None:
    assert last(project, "run.json")["hyperparameters"]["beta2"] == 0.99
    assert "beta2=0.99" in said
    done = project.run("make", "train-local", "ARGS=--set training.beta2=1", **QUICK)
    assert "beta2 is 1.0; it must be at least 0 and below 1" in done.stderr


def has_its_metric(project: Project, said: str) -> None:
    assert re.search(r"val_mean_recall=0\.\d{4} images_per_second=", said)
    line = (project.path / "artifacts" / "latest" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert 0 < json.loads(line)["val_mean_recall"] <= 1
    assert "validation:mean_recall" in said


def has_its_augmentation(project: Project, said: str) -> None:
    assert "grey=0.2" in said
    code = (
        "import sys; sys.path.insert(0, 'src'); from training import augment; from training.config import *\n"
        "colours = augment.draw(1000, 8, Hyperparameters(grey=0.2), 0).colours\n"
        "off = augment.draw(9, 8, Hyperparameters(), 0).colours\n"
        "print((colours[:, 2] == 0).mean(), (colours[:, :2] == 1).all(), len(off))"
    )
    share, others, off = project.run(project.program("python"), "-c", code).stdout.split()
    assert 0.15 < float(share) < 0.25
    assert (others, off) == ("True", "0")


def has_another_loss(project: Project, said: str) -> None:
    (loss,) = re.findall(r"(?m)^epoch=1 .*train_loss=(\S+)", said)
    plain = train_again_without(project)
    assert float(loss) < 0.8 * plain


def has_one_answer_a_class(project: Project, _: str) -> None:
    done = project.make("predict", "IMAGE=data/raw/digits/4/0780.png", "ARGS=--json", **QUICK)
    (row,) = json.loads(done.stdout.splitlines()[-1])["probabilities"]
    assert abs(sum(row) - 1) > 1e-4
    assert "accuracy" in project.make("evaluate", **QUICK).stdout


def stops_early(project: Project, _: str) -> None:
    facts = last(project, "run.json")["hyperparameters"]
    assert (facts["keep_by"], facts["patience"]) == ("f1", 5)


def has_its_base(project: Project, _: str) -> None:
    code = "from pipelines.config import load; print(load(environment={}).images.base)"
    assert "python:3.13-slim" in project.run(project.program("python"), "-c", code).stdout
    (project.path / ".venv").unlink()
    uv = str(TEMPLATE / ".venv" / "bin" / "uv")
    assert "--torch-backend" in subprocess.run([uv, "pip", "install", "--help"], capture_output=True, text=True).stdout
    done = project.run("make", "setup", UV_PYTHON="3.99", PATH=f"{Path(uv).parent}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "3.99" in done.stderr


def train_again_without(project: Project) -> float:
    """The first epoch's loss of the same run with the loop as it was."""
    loop = project.path / "src" / "training" / "loop.py"
    loop.write_text(
        loop.read_text(encoding="utf-8").replace("losses = focal_cross_entropy(", "losses = functional.cross_entropy(")
    )
    done = project.make("train-local", **QUICK)
    return float(re.findall(r"(?m)^epoch=1 .*train_loss=(\S+)", done.stdout)[0])


CHECKS: dict[str, Callable[[Project, str], None]] = {
    "model": has_its_model, "hyperparameter": has_its_setting, "metric": has_its_metric,
    "augmentation": has_its_augmentation, "loss": has_another_loss, "stopping": stops_early,
    "python": has_its_base, "labels": has_one_answer_a_class,
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(bake: Bake, ready: Project) -> Project:
    """A project with everything, whose sample images are packed."""
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    project.make("data", **QUICK)
    return project


@pytest.fixture
def project(packed: Project, tmp_path: Path) -> Project:
    """Another one like it, in its own folder."""
    return Project(Path(shutil.copytree(packed.path, tmp_path / packed.path.name, symlinks=True)))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("caches")
    return {"RUFF_CACHE_DIR": str(folder / "ruff"), "MYPY_CACHE_DIR": str(folder / "mypy")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_works(kind: str, project: Project, caches: dict[str, str]) -> None:
    text = (project.path / "docs" / "change-it.md").read_text(encoding="utf-8")
    chapter = chapters(text)[KINDS.index(kind)]
    environment, data = dict(QUICK), project.path / "data" / "raw" / "digits"
    if kind == "timm":  # beside the environment, which other tests share
        uv, beside = str(TEMPLATE / ".venv" / "bin" / "uv"), project.path / ".cache" / "timm"
        words = ["pip", "install", "--quiet", "--no-deps", "--target", str(beside), "timm>=1,<2", "huggingface_hub"]
        assert subprocess.run([uv, *words]).returncode == 0
        environment |= {"PYTHONPATH": str(beside), "TRAINING__PRETRAINED": "none"}  # nothing is downloaded
        # On CPUs with bf16, oneDNN's kernels for maps of one pixel, which so small images have here, are not finite.
        environment |= {"TRAINING__PRECISION": "fp32"}
    if kind == "table":
        with (project.path / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label"), *((path.relative_to(project.path), path.parent.name)
                                                              for path in sorted(data.rglob("*.png")))])  # fmt: skip
    changed = [name for diff in blocks(chapter, "diff") for name in apply(project, diff)]
    assert changed or kind in ("timm", "table")
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "src", "pipelines"]):
        if any(name.endswith(".py") for name in changed):
            done = project.run(project.program(words[0]), *words[1:], **caches)
            assert done.returncode == 0, done.stdout
    commands = [shlex.split(line) for block in blocks(chapter, "sh") for line in block.splitlines()]
    assert commands
    said = ""
    for _, verb, *words in commands:
        if verb != "setup":
            said += project.make(verb, *words, **environment).stdout
    assert "val_accuracy=" in said or "tune-local" in chapter
    if kind in CHECKS:
        CHECKS[kind](project, said)


@pytest.mark.parametrize("scope", ["local", "cloud"])
def test_every_change_fits_a_smaller_scope(scope: str, bake: Bake) -> None:
    """All its diffs find their places there; those of the same file one after the other, but for the two losses."""
    page = (bake(scope=scope).path / "docs" / "change-it.md").read_text(encoding="utf-8")
    for kind, chapter in zip(KINDS, chapters(page), strict=True):
        made = bake(scope=scope)
        for diff in blocks(chapter, "diff"):
            assert apply(made, diff), kind


def test_a_diff_that_does_not_fit_is_seen(project: Project) -> None:
    with pytest.raises(AssertionError, match="has not once"):
        apply(project, "--- configs/training.yaml\n-no such line\n+another\n")
