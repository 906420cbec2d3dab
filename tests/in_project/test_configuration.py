"""Every setting with every kind of wrong value, and the three ways in which `ModelTrainer` takes hyperparameters."""

from __future__ import annotations

import io
import json
import math
import re
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import ROOT, config
from pipelines.config import Settings, _keys, load, sections
from pipelines.local import container
from pipelines.local.job import Job
from pipelines.local.view import TrainingView
from pipelines.terminal import UserError
from tests.helpers import Verb

ODD = [
    None, True, False, 0, -1, 1, 10**30, 1.5, math.nan, math.inf, "", "  ", "x", "ä🐈\n", "$(touch x)", "auto", "1e-3",
    "nan", "0x10", [], [1], ["a"], [None], {}, {"a": 1}, yaml.safe_load("2020-01-01"), "a'b", 'a"b', "a" * 5000, b"x",
]  # fmt: skip
FILES = {
    name: yaml.safe_load((ROOT / "configs" / name).read_text()) for name in ("training.yaml", "infrastructure.yaml")
}
SETTINGS = [(section, key) for section in sections() for key in _keys(section)]


def written(folder: Path, section: str, key: str | None, value: object) -> Path:
    """The files of `configs/` with one value changed; without a key the whole section."""
    documents = {name: yaml.safe_load(yaml.safe_dump(document)) for name, document in FILES.items()}
    place = documents["infrastructure.yaml"]
    if section == "training":
        place = {section: documents["training.yaml"]}
    if key is None:
        place[section] = value
    else:
        place.setdefault(section, {})[key] = value  # tracking is there with MLflow only
    for name, document in documents.items():
        (folder / name).write_text(yaml.safe_dump(document), encoding="utf-8")
    return folder


def same_kind(setting: object, value: object) -> bool:
    """Whether a value was taken for what it is: no number for true, no text for a list."""
    if value is None:
        return setting == "none"
    if isinstance(value, bool) or isinstance(setting, bool):
        return isinstance(setting, bool) and setting in (value, str(value).lower() == "true")
    if isinstance(value, str) and isinstance(setting, float):
        return float(value) == setting
    return setting == value or str(setting) == str(value).strip()


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_odd_values_are_refused_by_name_or_taken_as_they_are(tmp_path: Path, section: str, key: str) -> None:
    refused = 0
    for value in ODD:
        try:
            settings = load((), {}, written(tmp_path, section, key, value))
        except UserError as error:
            refused += 1
            sentence = str(error)
            assert f"{section}.{key} is " in sentence
            assert "\n" not in sentence
            assert len(sentence) < 400
        else:
            assert value != ""
            assert same_kind(getattr(getattr(settings, section), key), value), f"{value!r} was taken for another value"
    assert refused >= 10


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["aws.kms_key=key"], "kms_key"),
        (["aws.subnets=[subnet-0a]"], "security_groups"),
        (["aws.security_groups=[sg-0a]"], "security_groups"),
        (["aws.subnets=[vpc-0a]", "aws.security_groups=[sg-0a]"], "subnets"),
        (["compute.max_hours=9"], "max_wait_hours"),
        (["compute.keep_alive_minutes=5"], "keep_alive_minutes"),
        (["compute.isolation=true", "compute.remote_debug=true"], "remote_debug"),
    ],
)
def test_settings_that_aws_would_refuse_together(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=rf"configs: (aws|compute)\.{named} is "):
        load(overrides, {})


def test_settings_that_aws_takes_together() -> None:
    key = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    for value in ("alias/our/key", key):
        assert load([f"aws.kms_key={value}"], {}).aws.kms_key == value
    assert load(["aws.subnets=[subnet-0a]", "aws.security_groups=[sg-0a]"], {}).aws.subnets == ["subnet-0a"]
    assert (
        load(["compute.spot=false", "compute.max_hours=9", "compute.keep_alive_minutes=5"], {}).compute.max_hours == 9
    )


@pytest.mark.parametrize("section", [name for name in Settings.model_fields if name != "training"])
def test_a_section_must_be_a_section(tmp_path: Path, section: str) -> None:
    for value in ODD:
        with pytest.raises(UserError, match=rf"configs: (unknown key )?{section}"):
            load((), {}, written(tmp_path, section, None, value))


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_misspelt_key_is_answered_with_the_nearest(tmp_path: Path, section: str, key: str) -> None:
    misspelt = key[:-1] + key[-1] * 2
    folder = written(tmp_path, section, misspelt, 3)
    ways: list[Any] = [
        ((), {}, folder),
        ([f"{section}.{misspelt}=3"], {}),
        ((), {f"{section}__{misspelt}".upper(): "3"}),
    ]
    for way in ways:
        with pytest.raises(UserError) as error:
            load(*way)
        assert misspelt in str(error.value)
        assert "did you mean" in str(error.value)
        assert key in str(error.value).partition("did you mean")[2]


def test_a_smaller_scope_has_no_more_settings_than_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section is there with its part of `pipelines/`, and a key that only larger scopes have is not known."""
    place = tmp_path / "infrastructure.yaml"
    (tmp_path / "training.yaml").write_text(yaml.safe_dump(FILES["training.yaml"]))
    found = yaml.safe_load(yaml.safe_dump(FILES["infrastructure.yaml"]))
    del found["tuning"], found["aws"]["github"]
    place.write_text(yaml.safe_dump(found))
    with pytest.raises(UserError, match=r"^configs: tuning\.ranges is missing; add it"):
        load((), {}, tmp_path)
    monkeypatch.setitem(config.FOLDERS, "tuning", "nowhere")
    assert load(["aws.budget_usd=7"], {"TUNING__MAX_JOBS": "soon"}, tmp_path).aws.budget_usd == 7
    for override, message in {
        "tuning.max_jobs=2": "--set tuning.max_jobs=2: unknown section 'tuning'; did you mean training?",
        "aws.github=octo/cats": "--set aws.github=octo/cats: unknown key 'github' in aws; known: budget_usd, ",
    }.items():
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            load([override], {}, tmp_path)
    place.write_text(yaml.safe_dump(found | {"tuning": {"max_job": 2}}))
    with pytest.raises(UserError, match=r"^configs: unknown key tuning\.max_job \(value 2\); did you mean max_jobs"):
        load((), {}, tmp_path)


def test_numbers_are_those_of_yaml_1_2() -> None:
    for text in ("1e-3", "1E-3", "+1e-3", "0.1e-2", ".1e-2"):
        assert load([f"data.unreadable={text}"], {}).data.unreadable == 0.001


def test_an_empty_section_and_a_missing_file_can_be_overridden_or_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path, "aws", None, None)
    with pytest.raises(UserError, match=r"configs: aws\.tags is missing"):
        load(["aws.region=eu-west-1"], {}, folder)
    values = FILES["infrastructure.yaml"]["aws"] | {"region": "eu-west-1"}
    assert (
        load([f"aws.{key}={json.dumps(value)}" for key, value in values.items()], {}, folder).aws.region == "eu-west-1"
    )
    (folder / "training.yaml").write_text("")
    with pytest.raises(UserError, match=r"training.yaml must hold keys and values, not NoneType"):
        load((), {}, folder)


def test_a_verb_says_it_and_exits(verb: Verb, project: Path) -> None:
    for words in (["--set", "training.epochs=soon"], ["--data", "a" * 5000], ["--instances", "0"], ["--data", ""]):
        failed = verb("train-local", *words)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: ")
        assert len(failed.stderr.splitlines()) == 1
    assert not (project / "data").exists()


HYPERPARAMETERS: dict[str, Any] = {
    "model": "cnn", "epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "horizontal_flip": True, "optimizer": "sgd",
    "momentum": 0.5, "seed": 3, "deterministic": True,
}  # fmt: skip


@pytest.mark.container
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK leaves a pipe open
def test_dict_json_and_yaml_hyperparameters_give_the_same_run(tmp_path: Path, packed: Path, nothing_left: str) -> None:
    """The same weights, bit for bit; and another value gives others."""
    (tmp_path / "a.json").write_text(json.dumps(HYPERPARAMETERS))
    text = yaml.safe_dump(HYPERPARAMETERS).replace("0.001", "1e-3")  # text for PyYAML, which the SDK uses
    (tmp_path / "a.yaml").write_text(text)
    assert "1e-3" in text
    ways: list[Any] = [
        HYPERPARAMETERS,
        str(tmp_path / "a.json"),
        str(tmp_path / "a.yaml"),
        HYPERPARAMETERS | {"seed": 4},
    ]
    weights, settled = [], []
    for way in ways:
        root = tmp_path / f"job-{time.time_ns()}"
        (root / "checkpoints").mkdir(parents=True)
        channels = {"train": packed / "train", "validation": packed / "validation", "checkpoints": root / "checkpoints"}
        job = replace(Job("20260101-000000-abcd", root, {}, channels, 1, {"GIT_COMMIT": "abc"}), hyperparameters=way)
        with closing(TrainingView(root / "job.log", containers=True, output=io.StringIO())) as view:
            outputs = container.run(job, nothing_left, view)
        weights.append((outputs.model / "model.safetensors").read_bytes())
        settled.append(json.loads((outputs.data / "run.json").read_text())["hyperparameters"])
    assert settled[0] == settled[1] == settled[2]
    assert {name: settled[0][name] for name in HYPERPARAMETERS} == HYPERPARAMETERS
    assert weights[0] == weights[1] == weights[2]
    assert weights[3] != weights[0]
