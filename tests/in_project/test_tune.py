"""`tune` and `tune-local`: requests, the container of a tuner's job, searches on this machine, and what goes wrong."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipelines import project
from pipelines.cloud import destroy, inventory
from pipelines.cloud.account import Account
from pipelines.local import engine
from pipelines.terminal import UserError
from pipelines.tuning import cloud as tune
from pipelines.tuning import local as tune_local
from pipelines.tuning import results as tuning
from tests.cloud import KEY, NETWORK, Recorder, aws, check_golden, refused
from tests.helpers import Verb, verb_environment
from tests.test_cloud_training import account, settings

__all__ = ["account", "aws"]  # fixtures
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",  # the SDK's temporary folders
)
NAME = "the-search-261121093000"
CREATE = "CreateHyperParameterTuningJob"
AWS_IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.8-cpu"
FINAL = "FinalHyperParameterTuningJobObjectiveMetric"


@pytest.fixture
def search(account: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """An account, at a fixed time."""
    monkeypatch.setattr(tune, "new_name", lambda: NAME)
    yield account
    gc.collect()  # the tuner's temporary folder


def started(*overrides: str, source: str | None = None, yes: bool = True) -> str:
    return tune.tune(Account(settings(*overrides)), source, yes)


EVERYTHING = [
    *NETWORK, f"aws.kms_key={KEY}", "aws.tags={team: vision}", "compute.isolation=true", "compute.spot=false",
    "compute.instance_type=ml.c5.xlarge", "compute.instances=2", "compute.encrypt_traffic=true",
    "compute.input_mode=FastFile", "tuning.objective=validation:loss", "tuning.goal=Minimize",
    "tuning.strategy=Random", "tuning.early_stopping=false", "tuning.max_parallel_jobs=3",
    "tuning.ranges={epochs: {min: 2, max: 20, scale: log}, optimizer: [adamw, sgd], horizontal_flip: [true, false]}",
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides"), [("tune_default", []), ("tune_everything", EVERYTHING)])
def test_tuning_requests(search: Recorder, name: str, overrides: list[str]) -> None:
    started(*overrides)
    request = search.named(CREATE)[0]
    hyperparameters = request["TrainingJobDefinition"]["StaticHyperParameters"]
    hyperparameters["sagemaker_submit_directory"] = re.sub(
        r"\d{10}", "<s>", hyperparameters["sagemaker_submit_directory"]
    )
    for channel in request["TrainingJobDefinition"]["InputDataConfig"]:
        place = channel["DataSource"]["S3DataSource"]
        place["S3Uri"] = re.sub(r"tuning-\d{10}", "tuning-<s>", place["S3Uri"])
    check_golden(name, [call for call in search if call[0] == CREATE])
    assert len(request["HyperParameterTuningJobName"]) <= 32


@pytest.mark.parametrize("called", ["cats", "a-classifier-of-many-big-cats", "a-classifier-of-ca-and-of-dogs"])
def test_names_fit_into_the_limit(monkeypatch: pytest.MonkeyPatch, called: str) -> None:
    monkeypatch.setattr(project, "name", lambda: called)
    name = tune.new_name()
    assert len(name) <= 32
    assert re.fullmatch(r"[a-z](-?[a-z0-9])+-\d{12}", name)
    assert name.startswith(f"{project.tuning_prefix()}-")
    assert called.startswith(project.tuning_prefix())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning_rat: {min: 0.1, max: 0.2}", "learning_rat is no hyperparameter .*did you mean learning_rate"),
        ("learning_rate: {min: 0.1, max: 2000.0}", "learning_rate is 2000.0; it must be above 0 and below 1000"),
        ("epochs: {min: 1.5, max: 3}", "epochs is 1.5; it must be a whole number"),
        ("optimizer: [adamw, adam]", "optimizer is 'adam'; it must be adamw or sgd"),
        ("optimizer: {min: 1, max: 2}", "optimizer is 1.0; it must be adamw or sgd"),
        ("compile: {min: 0, max: 1}", "compile is 0.0"),
        ("model: {min: 0, max: 1}", "model"),
        ("batch_size: [32]", "batch_size is .32.; give 2 to 30 different values"),
        ("batch_size: [32, 32]", "give 2 to 30 different values"),
        ("momentum: {min: 0.9, max: 0.1}", "it must be above min"),
        ("mixup: {min: 0, max: 1, scale: log}", "on a log scale min must be above 0"),
        ("mixup: {min: 0, max: 1, sale: log}", "mixup.*sale"),
        ("mixup: 3", "is 3: mixup "),
        ("", "is {}.*at least 1"),
    ],
)
def test_ranges_that_training_would_not_take_are_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"^configs: (unknown key )?tuning\.ranges.*{words}") as error:
        settings(f"tuning.ranges={{{override}}}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], r"48\.00 USD is over aws.budget_usd"),
        (["compute.instances=2", "tuning.max_jobs=2"], r"24\.00 USD is over"),
        (["compute.keep_alive_minutes=60", "compute.spot=false", "tuning.max_jobs=4"], r"24\.00 USD is over"),
        ([f"images.training={AWS_IMAGE}", "compute.instances=2"],
         "trains on one instance"),
        ([f"images.training={AWS_IMAGE}", "compute.isolation=true"],
         "takes its source from S3"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_created(search: Recorder, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        started(*overrides, yes=False)
    assert not [call for call in search if call[0].startswith(("Create", "Put"))][1:]  # the fixture's bucket


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tune", "--set", "aws.region=us-east-1", *words])
    return tune.main()


def trial(number: int, status: str, value: float | None, **tuned: str) -> dict[str, Any]:
    final = {FINAL: {"MetricName": "validation:accuracy", "Value": value}} if value is not None else {}
    return {
        "TrainingJobName": f"{NAME}-{number:03}-abcd", "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:x/y",
        "TrainingJobStatus": status, "TunedHyperParameters": tuned, "CreationTime": datetime.now(UTC), **final,
    }  # fmt: skip


def go_on(search: Recorder, *statuses: str, **changes: Any) -> None:
    """Let the tuning job go through these states; it has four jobs."""
    left = list(statuses)

    def answer(parameters: dict[str, Any]) -> dict[str, Any]:
        counters = {"Completed": 4 - len(left), "InProgress": len(left), "RetryableError": 0}
        status = left.pop(0) if len(left) > 1 else left[0]
        return search.named(CREATE)[-1] | parameters | changes | {
            "HyperParameterTuningJobStatus": status, "TrainingJobStatusCounters": counters
        }  # fmt: skip

    jobs = [
        trial(1, "Completed", 0.81, batch_size="32", learning_rate="0.0031", weight_decay="1e-05"),
        trial(2, "Failed", None, batch_size="64", learning_rate="0.05", weight_decay="0.1"),
        trial(3, "Completed", 0.97, batch_size="64", learning_rate="0.01", weight_decay="0.2"),
        trial(4, "Stopped", 0.99, batch_size="64", learning_rate="0.02", weight_decay="0.2"),
    ]
    search.answers["DescribeHyperParameterTuningJob"] = answer
    search.answers["ListTrainingJobsForHyperParameterTuningJob"] = lambda p: (
        {"TrainingJobSummaries": jobs[2:]} if "NextToken" in p else {"TrainingJobSummaries": jobs[:2], "NextToken": "2"}
    )


def test_a_search_is_followed_to_its_table(
    search: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on(search, "InProgress", "InProgress", "InProgress", "Completed")  # the SDK asks once
    assert run_main(monkeypatch, "--wait", "--yes") == 0
    out = capsys.readouterr().out
    assert "8 training jobs at most, 2 at a time, in us-east-1 on 1 x ml.g5.xlarge spot" in out
    assert out.index("costs at most 48.00 USD") < out.index(f"started {NAME}. Follow it with `make tune JOB={NAME}`")
    assert f"stop-hyper-parameter-tuning-job --hyper-parameter-tuning-job-name {NAME} --region us-east-1" in out
    assert f"#/hyper-tuning-jobs/{NAME}" in out
    assert (
        "[InProgress] 1 completed, 3 in progress\n[InProgress] 2 completed, 2 in progress\n[Completed] 3 completed"
        in out
    )
    assert re.search(rf"\n\*  0\.9700 .*0\.01 .* Completed +{NAME}-003-abcd\n", out)
    assert re.search(rf"\n {{22,}}.*0\.05 .* Failed +{NAME}-002-abcd\n", out)
    assert f"make pull JOB={NAME}-003-abcd" in out
    assert "ARGS='--set training.batch_size=64 --set training.learning_rate=0.01" in out
    asked = ("DescribeHyperParameterTuningJob", "ListTrainingJobsForHyperParameterTuningJob")
    check_golden("tune_follow", [next(call for call in search if call[0] == name) for name in asked])
    assert run_main(monkeypatch, "--job", NAME, "--set", "tuning.goal=Minimize") == 0  # it is the job's own that counts
    assert f"make pull JOB={NAME}-003-abcd" in capsys.readouterr().out
    assert len(search.named(CREATE)) == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [("Failed", f"{NAME} failed: All training jobs failed"), ("Stopped", f"{NAME} was stopped before its end")],
)
def test_a_search_without_success_is_an_error(
    search: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, words: str
) -> None:
    go_on(search, "InProgress", status, FailureReason="All training\n jobs failed")
    with pytest.raises(UserError, match=words):
        run_main(monkeypatch, "--wait", "--yes")
    assert "0.8100" in capsys.readouterr().out


def test_a_search_none_of_whose_jobs_succeeded_is_an_error(search: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(search, "Completed")
    search.answers["ListTrainingJobsForHyperParameterTuningJob"] = {"TrainingJobSummaries": [trial(1, "Failed", None)]}
    with pytest.raises(UserError, match=f"no job of {NAME} succeeded"):
        run_main(monkeypatch, "--wait", "--yes")
    search.answers["DescribeHyperParameterTuningJob"] = refused("ResourceNotFound", "does not exist")
    with pytest.raises(UserError, match="there is no tuning job 'x' in us-east-1"):
        run_main(monkeypatch, "--job", "x")
    search.answers[CREATE] = refused("ResourceLimitExceeded", "The limit is 0 Instances.")
    with pytest.raises(UserError, match=r"starting the tuning job failed: .* a quota of the account is reached"):
        run_main(monkeypatch, "--yes")


def test_ctrl_c_while_waiting_leaves_the_search_alone(search: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(search, "InProgress")
    monkeypatch.setattr("time.sleep", lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(UserError, match=f"{NAME} runs on.*stop it with `aws sagemaker stop-hyper-") as error:
        tune.follow(Account(settings()), started(), once=False)
    assert error.value.code == 130
    assert not search.named("StopHyperParameterTuningJob")


@pytest.mark.parametrize("there", [True, False])
def test_ctrl_c_while_starting_says_what_runs(search: Recorder, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    if there:
        go_on(search, "InProgress")
    else:
        search.answers["DescribeHyperParameterTuningJob"] = refused("ResourceNotFound", "does not exist")
    monkeypatch.setattr(tune, "_submit", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(search, "named", lambda *_: [{}])
    with pytest.raises(UserError, match=f"{NAME} runs" if there else "no tuning job was started") as error:
        started()
    assert error.value.code == 130


def test_status_shows_a_search_that_runs_and_destroy_stops_it(
    search: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """moto ends a tuning job at once: here it runs until it is stopped. Its tags are moto's."""
    started()
    real = boto3.client("sagemaker").list_hyper_parameter_tuning_jobs
    (summary,) = real()["HyperParameterTuningJobSummaries"]

    def listed(parameters: dict[str, Any]) -> dict[str, Any]:
        runs_on = parameters["StatusEquals"] == "InProgress" and not search.named("StopHyperParameterTuningJob")
        state = {"HyperParameterTuningJobStatus": "InProgress"}
        return {"HyperParameterTuningJobSummaries": [summary | state] if runs_on else []}

    search.answers |= {"ListHyperParameterTuningJobs": listed, "StopHyperParameterTuningJob": {}}
    (item,) = inventory.everything(Account(settings()))
    assert (item.kind, item.name) == ("tuning job", NAME)
    assert "InProgress" in inventory.table([item])[0]
    monkeypatch.setattr(destroy, "PAUSE", 0.0)
    destroy.destroy(Account(settings()), None, yes=True)
    assert search.named("StopHyperParameterTuningJob") == [{"HyperParameterTuningJobName": NAME}]
    assert "nothing is left" in capsys.readouterr().out


def downloaded(uri: str, folder: Path) -> None:
    """What SageMaker does with a channel in File mode."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    for item in (item for page in pages for item in page["Contents"]):
        path = folder / item["Key"].removeprefix(prefix).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        boto3.client("s3").download_file(bucket, item["Key"], str(path))


def laid_out(request: dict[str, Any], ml: Path, **more: str) -> dict[str, str]:
    """/opt/ml and the variables that SageMaker gives a tuner's training job, from the request; all values are text."""
    definition, config = request["TrainingJobDefinition"], request["HyperParameterTuningJobConfig"]
    ranges = [entry for kind in config["ParameterRanges"].values() for entry in kind]
    tuned = {entry["Name"]: entry["Values"][0] if "Values" in entry else entry["MinValue"] for entry in ranges}
    objective = {"_tuning_objective_metric": config["HyperParameterTuningJobObjective"]["MetricName"]}
    channels = {channel["ChannelName"]: channel for channel in definition["InputDataConfig"]}
    for name, channel in channels.items():
        downloaded(channel["DataSource"]["S3DataSource"]["S3Uri"], ml / "input" / "data" / name)
    for folder in ("input/config", "model", "output", "checkpoints"):
        (ml / folder).mkdir(parents=True)
    inputs = {
        name: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
        for name in channels
    }
    machine = "ml.c5.xlarge"  # that of the request has a GPU, and this one none
    group = {"instance_group_name": "homogeneousCluster", "instance_type": machine, "hosts": ["algo-1"]}
    resources = {
        "current_host": "algo-1", "current_instance_type": machine, "hosts": ["algo-1"],
        "current_group_name": "homogeneousCluster", "instance_groups": [group], "network_interface_name": "eth0",
    }  # fmt: skip
    values = definition["StaticHyperParameters"] | tuned | objective | more
    assert all(isinstance(value, str) for value in values.values())
    for name, content in (("hyperparameters", values), ("inputdataconfig", inputs), ("resourceconfig", resources)):
        (ml / "input" / "config" / f"{name}.json").write_text(json.dumps(content))
    return dict(definition["Environment"]) | {"TRAINING_JOB_NAME": f"{NAME}-001-abcd"}


Container = Callable[..., list[str]]


@pytest.fixture
def job(search: Recorder, image: str, tmp_path: Path) -> Iterator[Container]:
    """The command that SageMaker starts a tuner's training job with, and /opt/ml as it makes it."""

    def command(name: str, *overrides: str, **more: str) -> list[str]:
        started(*overrides)
        variables = laid_out(search.named(CREATE)[0], tmp_path / "ml", **more)
        words = [word for key, value in variables.items() for word in ("--env", f"{key}={value}")]
        return [
            "docker",
            "run",
            "--name",
            name,
            "--network",
            "none",
            "-v",
            f"{tmp_path}/ml:/opt/ml",
            *words,
            image,
            "train",
        ]

    name = f"tune-test-{os.getpid()}"
    yield lambda *overrides, **more: command(name, *overrides, **more)
    subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)
    engine.give_back(image, tmp_path / "ml")


def checkpoints(ml: Path) -> list[str]:
    return sorted(path.parent.name for path in ml.glob("checkpoints/*/step-*"))


@pytest.mark.container
def test_a_tuners_job_that_is_interrupted_goes_on_with_its_own_checkpoints(
    job: Container, search: Recorder, tmp_path: Path
) -> None:
    command = job("training.epochs=100000")
    name, ml = command[3], tmp_path / "ml"
    (ml / "checkpoints" / "of-another-job" / "step-00000001").mkdir(parents=True)  # if all share one prefix
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert any(line.startswith("epoch=3") for line in running.stdout)
        subprocess.run(["docker", "stop", "--time", "60", name], check=True, capture_output=True)
    assert running.returncode == 143
    assert set(checkpoints(ml)) == {"of-another-job", f"{NAME}-001-abcd"}
    assert not list((ml / "model").iterdir())
    subprocess.run(["docker", "rm", name], check=True, capture_output=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        first = next(line for line in running.stdout if line.startswith("epoch="))
        subprocess.run(["docker", "stop", "--time", "60", name], check=True, capture_output=True)
    assert int(re.findall(r"epoch=(\d+)", first)[0]) > 3
    assert search


@pytest.mark.container
def test_a_tuners_job_with_a_value_that_training_does_not_take_says_so(job: Container, tmp_path: Path) -> None:
    done = subprocess.run(job(batch_size="0"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "batch_size is 0; it must be at least 1" in (tmp_path / "ml" / "output" / "failure").read_text()


LOCAL = ["--set", "training.epochs=1", "--set", "tuning.strategy=Random"]


def searches(project: Path) -> list[Path]:
    return sorted((project / "artifacts" / "tuning").iterdir())


def rows(folder: Path) -> list[list[str]]:
    return [line.lstrip("*").split() for line in (folder / "trials.txt").read_text().splitlines()[1:]]


def test_a_search_on_this_machine_ends_with_a_table_and_can_be_extended(verb: Verb, project: Path, raw: Path) -> None:
    words = ["--data", str(raw), "--mode", "process", *LOCAL]
    done = verb("tune-local", *words, "--set", "tuning.max_jobs=2")
    assert done.returncode == 0, done.stderr
    (folder,) = searches(project)
    assert len(rows(folder)) == 2
    result = json.loads((folder / "result.json").read_text())
    best = json.loads((project / "artifacts" / result["best"] / "run.json").read_text())
    assert {key: best["hyperparameters"][key] for key in result["values"]} == result["values"]
    assert set(result["values"]) == {"learning_rate", "batch_size", "weight_decay"}
    metrics = [json.loads(file.read_text())["val_accuracy"] for file in project.glob("artifacts/2*/metrics.json")]
    assert result["validation:accuracy"] == max(metrics)
    assert f"make evaluate RUN={result['best']}" in done.stdout
    assert f"best: {result['best']}, which artifacts/latest leads to now" in done.stdout
    assert (project / "artifacts" / "latest").readlink() == Path(result["best"])
    again = verb("tune-local", "--run", folder.name, "--mode", "process", "--set", "tuning.max_jobs=3")
    assert again.returncode == 0, again.stderr
    assert searches(project) == [folder]
    assert "trial 3 of 3: " in again.stdout
    assert "trial 2 of 3" not in again.stdout
    assert len({tuple(row[1:4]) for row in rows(folder)}) == 3  # and no guess came twice
    for extra, sentence in (
        (["--run", folder.name, "--data", str(raw)], "goes on with what it was started with"),
        (["--run", folder.name, "--set", "training.epochs=3"], "goes on with what it was started with"),
        (["--run", "other"], f"there is no search 'other'; there is {folder.name}"),
        (["--set", "tuning.ranges={epoch: {min: 1, max: 2}}"], "epoch is no hyperparameter"),
    ):
        refusal = verb("tune-local", *extra)
        assert refusal.returncode == 1
        assert sentence in refusal.stderr.splitlines()[-1]
        assert "Traceback" not in refusal.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_search_that_was_stopped_goes_on_with_the_trial_that_was_half_done(
    verb: Verb, project: Path, raw: Path, number: signal.Signals
) -> None:
    """Killed: with the newest unfinished search. Stopped: with the one that the message names, from its checkpoint."""
    settings = ["--set", "training.epochs=60", "--set", "tuning.max_jobs=2", "--set", "tuning.strategy=Random"]
    words = ["--data", str(raw), "--mode", "process", *settings]
    command = [sys.executable, "-m", "pipelines", "tune-local", *words]
    with subprocess.Popen(
        command, cwd=project, env=verb_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stderr is not None
        lines = []
        for line in first.stdout:
            lines.append(line)
            if line.startswith("epoch=10 ") and any(line.startswith("trial 2 of 2") for line in lines):
                break
        trained = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split()
        first.send_signal(number)
        first.wait(timeout=60)
        for pid in trained if number == signal.SIGKILL else ():  # training has a process group of its own
            os.kill(int(pid), number)
        error = first.stderr.read()
    (folder,) = searches(project)
    if number != signal.SIGKILL:
        assert first.returncode == 130
        assert error.splitlines()[-1].endswith(f"the search goes on with `make tune-local RUN={folder.name}`")
        words = ["--run", folder.name, "--mode", "process"]
    done = verb("tune-local", *words)
    assert done.returncode == 0, done.stderr
    assert ("going on with the search" in done.stdout) == (number == signal.SIGKILL)
    assert searches(project) == [folder]
    half = next(line for line in lines if line.startswith("trial 2 of 2"))
    assert half in done.stdout.splitlines(keepends=True)
    assert "trial 1 of 2" not in done.stdout
    assert "epoch=1 " not in done.stdout  # it had a checkpoint
    names = [line.split()[1] for line in lines if line.startswith("run ")]
    assert [row[-1] for row in rows(folder)] == names
    assert len(names) == 2


def test_a_trial_that_fails_is_noted_and_the_search_goes_on(verb: Verb, project: Path, raw: Path) -> None:
    words = ["--data", str(raw), "--mode", "process", *LOCAL, "--set", "tuning.max_jobs=3"]
    done = verb("tune-local", *words, "--set", "tuning.ranges={model: [cnn, nonesuch]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the trial failed: training failed: ") >= 1
    (folder,) = searches(project)
    assert sorted({tuple(row[-3:-1]) for row in rows(folder)}) == [("cnn", "Completed"), ("nonesuch", "Failed")]
    failed = verb("tune-local", *words, "--set", "tuning.ranges={model: [none1, none2]}", "--set", "tuning.max_jobs=2")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "error: none of the 2 trials succeeded; each said why above"
    other = searches(project)[1]
    assert json.loads((other / "result.json").read_text())["best"] is None


def test_one_search_is_run_by_one_process(tmp_path: Path) -> None:
    with tune_local._alone(tmp_path), pytest.raises(UserError, match="runs already"), tune_local._alone(tmp_path):
        pass


def test_tables_of_any_search() -> None:
    """The best is the least where that is wanted, never one that was stopped; text, switches and equal values."""
    search = settings(
        "tuning.goal=Minimize", "tuning.objective=validation:loss",
        "tuning.ranges={learning_rate: {min: 0.001, max: 1.0, scale: log}, horizontal_flip: [true, false], "
        "model: [cnn, resnet18], epochs: {min: 1, max: 5}}",
    ).tuning  # fmt: skip
    values = {"learning_rate": 0.01, "horizontal_flip": True, "model": "cnn", "epochs": 3}
    trials = [
        tuning.Trial("a", values, 0.5, "Completed"),
        tuning.Trial("b", values | {"horizontal_flip": False, "model": "resnet18"}, 0.25, "Completed"),
        tuning.Trial("c", values, 0.1, "Stopped"),
        tuning.Trial("d", values, None, "Failed"),
    ]
    best = tuning.best(search, trials)
    assert best is trials[1]
    assert [line[0] for line in tuning.table(search, trials).splitlines()] == [" ", " ", "*", " ", " "]
    assert "--set training.horizontal_flip=False --set training.model=resnet18" in tuning.options(best)
    for some in (trials, trials[:1], trials[3:], []):
        assert len(tuning.table(search, some).splitlines()) == 1 + len(some)
