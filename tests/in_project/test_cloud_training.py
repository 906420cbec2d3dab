"""`train`, `process`, `logs`, `pull` and `image-push`: their requests, and everything that can go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import NoCredentialsError

from pipelines import ROOT, config, project, runs
from pipelines.cloud import images as image_push
from pipelines.cloud import jobs as logs
from pipelines.cloud import prices, pull, storage, train
from pipelines.cloud import processing as process_job
from pipelines.cloud.account import Account
from pipelines.local import data
from pipelines.local import images as local_images
from pipelines.terminal import UserError
from tests.cloud import KEY, NETWORK, STACK, Recorder, aws, check_golden, refused
from tests.helpers import verb_environment
from tests.programs import put_first

__all__ = ["aws"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK's temporary folder
CREATE = ("CreateTrainingJob", "CreateProcessingJob")
NOW = round(datetime.now(UTC).timestamp() * 1000)


def settings(*overrides: str) -> config.Settings:
    return config.load(["aws.region=us-east-1", *overrides], {})


@pytest.fixture
def account(aws: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packed: Path) -> Recorder:
    """An account with the stack, an image in its repository, and a packed data set on this machine."""
    boto3.client("s3").create_bucket(Bucket=STACK.bucket)
    monkeypatch.setattr(Account, "stack", lambda _settings: STACK)
    monkeypatch.setattr(prices, "hourly", lambda *_: 1.5)
    monkeypatch.setattr(project, "git_commit", lambda: "abc")
    monkeypatch.setattr(runs, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(pull, "WORK", tmp_path / "pull")
    monkeypatch.setattr(data, "prepare", lambda *_: ROOT / "data" / "edges")
    monkeypatch.setattr(train, "ROOT", ROOT)
    monkeypatch.setattr(logs, "POLL", 0.01)
    monkeypatch.setattr(storage, "dataset", lambda account, _: storage.upload(account, packed, "data/" + "f" * 64))
    aws.answers["DescribeImages"] = {"imageDetails": []}
    return aws


def started(_: Recorder, *overrides: str, source: str | None = None, run: str | None = None) -> str:
    return train.train(Account(settings(*overrides)), source, run, yes=False)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("train_default", []),
        ("train_fastfile", ["compute.input_mode=FastFile", "compute.spot=false", "compute.remote_debug=true"]),
        ("train_everything", [*NETWORK, f"aws.kms_key={KEY}", "aws.tags={team: vision}", "compute.isolation=true",
                              "compute.instance_type=ml.c5.xlarge", "compute.instances=2", "compute.spot=false",
                              "compute.encrypt_traffic=true", "compute.keep_alive_minutes=10", "aws.budget_usd=30",
                              "training.epochs=3"]),
    ],
)  # fmt: skip
def test_training_requests(account: Recorder, name: str, overrides: list[str]) -> None:
    started(account, *overrides)
    check_golden(name, [call for call in account if call[0] in CREATE])


def test_a_gpu_that_torchs_build_has_no_code_for_is_refused(account: Recorder) -> None:
    with pytest.raises(UserError, match="for whose V100 torch's build cu128 has no code"):
        started(account, "compute.instance_type=ml.p3.2xlarge")
    assert not account.named("CreateTrainingJob")


def test_the_same_second_job_of_a_data_set_uploads_nothing(account: Recorder) -> None:
    started(account)
    keys = [request["Key"] for request in account.named("PutObject") if "data/" in request["Key"]]
    assert keys[-1] == storage.DONE + "data/" + "f" * 64
    assert len(keys) == 10
    account.clear()
    started(account)
    assert not [request for request in account.named("PutObject") if request["Key"].startswith("data/")]


def test_an_interrupted_upload_is_continued(account: Recorder, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "THREADS", 1)
    real, tried = boto3.client("s3"), 0

    def put(_: dict[str, Any]) -> Any:
        nonlocal tried
        tried += 1
        raise refused("SlowDown", "Reduce your rate.")

    files = sorted(path for path in packed.rglob("*") if path.is_file())
    prefix = "data/" + "f" * 64
    for path in files[:4]:
        real.upload_file(str(path), STACK.bucket, f"{prefix}/{path.relative_to(packed)}")
    real.put_object(Bucket=STACK.bucket, Key=f"{prefix}/{files[4].relative_to(packed)}", Body=b"of another size")
    account.clear()
    account.answers["PutObject"] = put
    with pytest.raises(
        UserError, match=r"^uploading .* \(do it again to continue\) failed: Reduce your rate \(SlowDown\)"
    ):
        started(account)
    assert tried < 5
    assert not account.named(*CREATE)
    del account.answers["PutObject"]
    account.clear()
    started(account)
    keys = [request["Key"] for request in account.named("PutObject") if "data/" in request["Key"]]
    assert sorted(keys) == sorted(
        [f"{prefix}/{path.relative_to(packed)}" for path in files[4:]] + [storage.DONE + prefix]
    )


def test_weights_travel_in_a_channel_of_their_own(account: Recorder, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"weights")
    started(account, f"data.pretrained={tmp_path}/weights.pth", "compute.input_mode=FastFile")
    channel = account.named("CreateTrainingJob")[0]["InputDataConfig"][2]
    assert channel["ChannelName"] == "pretrained"
    assert channel["InputMode"] == "File"
    bucket, _, prefix = channel["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://").partition("/")
    found = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    assert [item["Key"] for item in found] == [f"{prefix}weights.pth"]


def test_a_data_set_in_s3_is_taken_as_it_is(account: Recorder) -> None:
    with pytest.raises(
        UserError, match=r"s3://the-bucket/photos holds no packed data set: there is no train/dataset.json"
    ):
        started(account, source="s3://the-bucket/photos/")
    for split in storage.SPLITS:
        boto3.client("s3").put_object(Bucket=STACK.bucket, Key=f"photos/{split}/dataset.json", Body=b"{}")
    for answer in (None, refused("403", "Forbidden")):  # what this user may not see the job's role may still read
        if answer:
            account.answers["HeadObject"] = answer
        account.clear()
        started(account, source="s3://the-bucket/photos/")
        channels = account.named("CreateTrainingJob")[0]["InputDataConfig"]
        uris = [channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in channels[:2]]
        assert uris == ["s3://the-bucket/photos/train/", "s3://the-bucket/photos/validation/"]
        assert not [request for request in account.named("PutObject") if request["Key"].startswith("data/")]


@pytest.mark.parametrize(("kind", "sent"), [("ml.g5.xlarge", False), ("ml.c5d.xlarge", False), ("ml.m5.xlarge", True)])
def test_an_alias_is_sent_as_its_arn_and_never_for_disks_with_hardware_keys(
    account: Recorder, kind: str, sent: bool
) -> None:
    key = boto3.client("kms").create_key()["KeyMetadata"]
    boto3.client("kms").create_alias(AliasName="alias/ours", TargetKeyId=key["KeyId"])
    started(account, "aws.kms_key=alias/ours", f"compute.instance_type={kind}")
    request = account.named("CreateTrainingJob")[0]
    assert request["OutputDataConfig"]["KmsKeyId"] == key["Arn"]
    assert request["ResourceConfig"].get("VolumeKmsKeyId") == (key["Arn"] if sent else None)
    stored = [request for request in account.named("PutObject") if request["Key"].startswith("data/")]
    assert {request["SSEKMSKeyId"] for request in stored} == {key["Arn"]}


@pytest.mark.parametrize(
    ("price", "overrides", "words"),
    [
        (None, [], "a price that is not known counts as over aws.budget_usd (20 USD)"),
        (6.0, [], "24.00 USD is over"),
        (3.0, ["compute.instances=2"], "24.00 USD is over"),
        (4.0, ["compute.spot=false", "compute.max_hours=4.5", "compute.keep_alive_minutes=60"], "22.00 USD is over"),
    ],
)
def test_what_is_over_budget_is_refused_unless_told(
    account: Recorder, monkeypatch: pytest.MonkeyPatch, price: float | None, overrides: list[str], words: str
) -> None:
    monkeypatch.setattr(prices, "hourly", lambda *_: price)
    with pytest.raises(UserError) as error:
        started(account, *overrides)
    assert words in str(error.value)
    assert "YES=1" in str(error.value)
    assert not [call for call in account if call[0].startswith(("Create", "Put"))][1:]  # the fixture's bucket
    train.train(Account(settings(*overrides)), None, None, yes=True)
    assert len(account.named("CreateTrainingJob")) == 1


def test_the_plan_comes_first_and_names_what_where_and_how_much(
    account: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    started(account)
    out = capsys.readouterr().out
    plan = out.splitlines()
    assert "training job in us-east-1 on 1 x ml.g5.xlarge spot, cheaper than the price below" in plan[0]
    assert "4 hours at most" in plan[0]
    assert plan[1].startswith("costs at most 6.00 USD")
    assert "warning: src/ was never trained on this machine" in out
    run = runs.ARTIFACTS / "20260101-000000-abcd"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"mode": "process", "source": project.source_hash()}))
    started(account)
    assert "warning" not in capsys.readouterr().out


def test_an_image_that_is_not_in_the_repository_comes_first(
    account: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(image_push, "push", lambda *words: pushed.append(words[1]))
    account.answers["DescribeImages"] = refused("ImageNotFoundException")
    started(account)
    assert pushed == ["training"]
    assert "is not in the repository" in capsys.readouterr().out
    started(account, "images.training=registry.example/ours:1")
    assert pushed == ["training"]
    assert (
        account.named("CreateTrainingJob")[-1]["AlgorithmSpecification"]["TrainingImage"] == "registry.example/ours:1"
    )


TRUST = "Could not assume role arn:aws:iam::1:role/x. Please ensure that the role exists"
FAILURES = [
    ("ListObjectsV2", NoCredentialsError(), "there are no AWS credentials"),
    ("ListObjectsV2", refused("ExpiredToken", "The provided token has expired."), "have expired; get new ones"),
    ("DescribeImages", refused("AccessDeniedException", "not authorized"), "looking for .* may not do that"),
    ("DescribeImages", refused("RepositoryNotFoundException", "gone"), "looking for .*: gone"),
    ("CreateTrainingJob", refused("AccessDeniedException", "not authorized"), "these credentials may not do that"),
    ("CreateTrainingJob", refused("ResourceLimitExceeded", "The limit is 0 Instances."), "a quota of the account"),
    ("CreateTrainingJob", refused("ThrottlingException", "Rate exceeded"), "too many requests"),
    ("CreateTrainingJob", refused("CapacityError", "no capacity"), "no such machines free"),
    ("CreateTrainingJob", refused("ValidationException", TRUST), "`make bootstrap` puts its trust policy right"),
    ("CreateTrainingJob", refused("ValidationException", "No such thing."), r"No such thing \(ValidationException\)$"),
    ("CreateTrainingJob", refused("ResourceInUse", "Job name taken"), "the training job failed: Job name taken"),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "answer", "words"), FAILURES)
def test_what_aws_refuses_is_one_sentence(account: Recorder, operation: str, answer: Exception, words: str) -> None:
    account.answers[operation] = answer
    with pytest.raises(UserError, match=words) as error:
        started(account)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_verb_without_credentials_says_so(project: Path) -> None:
    environment = verb_environment() | {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(project)}
    command = [sys.executable, "-m", "pipelines", "train"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "there are no AWS credentials" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("started_already", [False, True])
def test_ctrl_c_while_starting_says_whether_a_job_runs(account: Recorder, started_already: bool) -> None:
    def interrupt(_: dict[str, Any]) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    found = {"TrainingJobName": "j", "TrainingJobArn": "a", "CreationTime": datetime.now(UTC), "TrainingJobStatus": "x"}
    account.answers["ListTrainingJobs"] = {"TrainingJobSummaries": [found] if started_already else []}
    account.answers["DescribeTrainingJob"] = found
    account.answers["CreateTrainingJob"] = interrupt
    with pytest.raises(UserError, match="stopped by SIGINT") as error:
        started(account)
    assert error.value.code == 130
    assert ("stop-training-job --training-job-name j" in str(error.value)) == started_already
    assert ("no training job was started" in str(error.value)) != started_already


def described(account: Recorder, **changes: Any) -> dict[str, Any]:
    """A job as moto describes it, changed; later questions get the same answer."""
    account.answers.pop("DescribeTrainingJob", None)
    name = account.named("CreateTrainingJob")[-1]["TrainingJobName"]
    facts: dict[str, Any] = boto3.client("sagemaker").describe_training_job(TrainingJobName=name) | changes
    account.answers["DescribeTrainingJob"] = facts
    return facts


def test_a_run_is_resumed_with_what_it_was_started_with(account: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    job = started(account, "training.epochs=3", "training.horizontal_flip=true", "compute.input_mode=FastFile")
    run = job.removeprefix("image-classifier-")[:20]
    with pytest.raises(UserError, match=rf"run {run} is finished; fetch it with `make pull JOB={job}`"):
        started(account, run=run)
    described(account, TrainingJobStatus="InProgress")
    with pytest.raises(UserError, match=rf"run {run} is InProgress already"):
        started(account, run=run)
    described(account, TrainingJobStatus="Stopped")
    first = account.named("CreateTrainingJob")[0]
    account.clear()
    monkeypatch.setattr(storage, "dataset", lambda *_: pytest.fail("resumed with other data"))
    time.sleep(1)  # the SDK's names differ by the second
    assert started(account, "compute.input_mode=FastFile", run=run).startswith(f"image-classifier-{run}-")
    again = account.named("CreateTrainingJob")[0]
    for key in ("HyperParameters", "CheckpointConfig"):
        assert again[key] == first[key]
    assert again["HyperParameters"]["epochs"] == "3"
    assert again["InputDataConfig"][:2] == first["InputDataConfig"][:2]
    assert [channel["ChannelName"] for channel in again["InputDataConfig"][2:]] == ["code", "sm_drivers"]
    check_golden("train_resume", [call for call in account if call[0] in CREATE])


@pytest.mark.parametrize("run", ["nonsense", "20260101-000000-abcd"])
def test_a_run_that_does_not_exist_is_not_resumed(account: Recorder, run: str) -> None:
    with pytest.raises(UserError, match=f"{run}"):
        started(account, run=run)
    assert not account.named(*CREATE)


def run_main(monkeypatch: pytest.MonkeyPatch, module: Any, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, "--set", "aws.region=us-east-1", *words])
    return int(module.main())


def states(account: Recorder, *names: str, **changes: Any) -> None:
    """Let a job go through these states, the last one stays."""
    left = list(names)

    def answer(parameters: dict[str, Any]) -> dict[str, Any]:
        status = left.pop(0) if len(left) > 1 else left[0]
        facts = {
            "TrainingJobName": parameters["TrainingJobName"],
            "TrainingJobStatus": status,
            "SecondaryStatus": status,
        }
        return facts | changes

    account.answers["DescribeTrainingJob"] = answer


def log_lines(job: str, host: str, *lines: str) -> None:
    client, group, stream = boto3.client("logs"), "/aws/sagemaker/TrainingJobs", f"{job}/{host}-1700000000"
    if not client.describe_log_groups(logGroupNamePrefix=group)["logGroups"]:
        client.create_log_group(logGroupName=group)
    if not client.describe_log_streams(logGroupName=group, logStreamNamePrefix=stream)["logStreams"]:
        client.create_log_stream(logGroupName=group, logStreamName=stream)
    events = [{"timestamp": NOW + int(line.split()[0]), "message": line} for line in lines]
    client.put_log_events(logGroupName=group, logStreamName=stream, logEvents=events)


def test_logs_of_all_hosts_are_shown_once_in_order_and_followed(
    account: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log_lines("job", "algo-1", "1 one", "3 three")
    log_lines("job", "algo-2", "2 two")
    log_lines("job-2", "algo-1", "2 of another job")
    states(account, "InProgress", "InProgress", "InProgress", "Completed")
    later = [lambda: log_lines("job", "algo-1", "4 four"), lambda: log_lines("job", "algo-1", "5 last, after the end")]
    polls: list[float] = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) in (1, 3):
            later.pop(0)()

    monkeypatch.setattr(time, "sleep", sleep)
    assert run_main(monkeypatch, logs, "--job", "job") == 0
    shown = ["1 one", "algo-2: 2 two", "3 three", "[InProgress]", "4 four", "[Completed]", "5 last, after the end"]
    assert capsys.readouterr().out.splitlines() == shown
    assert run_main(monkeypatch, logs, "--job", "job", "--once") == 0
    assert len(polls) == 3


def test_logs_without_any_line_and_without_any_job(
    account: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="this project has no training job in us-east-1 yet"):
        run_main(monkeypatch, logs)
    job = started(account)
    with pytest.raises(UserError, match=f"there is no job 'else' in us-east-1; the newest is {job}"):
        run_main(monkeypatch, logs, "--job", "else")
    capsys.readouterr()
    assert run_main(monkeypatch, logs) == 0
    assert capsys.readouterr().out == "[Completed]\n"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("Failed", "job failed: AlgorithmError: out of memory"),
        ("Stopped", r"ended without a result \(MaxRuntimeExceeded\); resume it with `make train RUN=<run>`"),
    ],
)
def test_waiting_for_a_job_that_does_not_succeed_is_an_error(
    account: Recorder, monkeypatch: pytest.MonkeyPatch, status: str, words: str
) -> None:
    reason = {"FailureReason": "AlgorithmError:\n out of memory"} if status == "Failed" else {}
    states(account, "InProgress", status, **({"SecondaryStatus": "MaxRuntimeExceeded"} | reason))
    monkeypatch.setattr(train, "train", lambda *_: "job")
    with pytest.raises(UserError, match=words):
        run_main(monkeypatch, train, "--wait")
    assert run_main(monkeypatch, train) == 0  # who does not wait is not told


def test_ctrl_c_while_waiting_leaves_the_job_alone(account: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    states(account, "InProgress")
    monkeypatch.setattr(train, "train", lambda *_: "job")
    monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(UserError, match="job runs on") as error:
        run_main(monkeypatch, train, "--wait")
    assert error.value.code == 130
    assert "aws sagemaker stop-training-job --training-job-name job --region us-east-1" in str(error.value)
    assert not account.named("StopTrainingJob")


def test_the_end_of_starting_names_the_console_and_the_log(
    account: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, train) == 0
    job = account.named("CreateTrainingJob")[0]["TrainingJobName"]
    out = capsys.readouterr().out
    assert f"https://us-east-1.console.aws.amazon.com/sagemaker/home?region=us-east-1#/jobs/{job}" in out
    assert f"make logs JOB={job}" in out
    china = logs.after(Account(settings("aws.region=cn-north-1")), "Training", "j")
    assert "https://cn-north-1.console.amazonaws.cn/" in china
    with pytest.raises(UserError, match="leave the other options out"):
        run_main(monkeypatch, train, "--run", "r", "--data", "d")


def finished(account: Recorder) -> str:
    """A finished job with what it left in the bucket, as SageMaker packs it; returns its name."""
    job = started(account)
    described(account, CreationTime=datetime.now(UTC) - timedelta(minutes=9), BillableTimeInSeconds=99)
    return job


def archive(target: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = target.with_suffix(".d") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with tarfile.open(target, "w:gz") as tar:
        for name in files:
            tar.add(target.with_suffix(".d") / name, name)
    return target


def left_behind(account: Recorder, folder: Path, weights: bytes = b"weights", **more: bytes) -> str:
    """The job's archives; the model's checksum is that of `weights`."""
    job, s3 = finished(account), boto3.client("s3")
    facts = {"files": {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}}
    numbers = {"val_accuracy": 1, "val_loss": 0, "epochs": 3, "train_images_per_second": 5.0, "world_size": 1}
    run = {"dataset_fingerprint": "f" * 64, "git_commit": "abc"}
    model = {"model.json": json.dumps(facts).encode(), "model.safetensors": weights}
    output = {"metrics.json": json.dumps(numbers).encode(), "metrics.jsonl": b"{}", "train.log": b"epoch=1",
              "run.json": json.dumps(run).encode()} | more  # fmt: skip
    for name, files in (("model.tar.gz", model), ("output.tar.gz", output)):
        s3.upload_file(str(archive(folder / name, files)), STACK.bucket, f"jobs/{job}/output/{name}")
    return job


def test_pull_makes_a_run_as_if_it_had_been_trained_here(
    account: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = left_behind(account, tmp_path)
    assert run_main(monkeypatch, pull, "--job", job) == 0
    run = job.removeprefix("image-classifier-")[:20]
    folder = runs.ARTIFACTS / run
    assert sorted(path.name for path in folder.iterdir()) == sorted([*runs.FILES, "model.tar.gz", "report.html"])
    assert (runs.ARTIFACTS / "latest").resolve() == folder
    facts = json.loads((folder / "run.json").read_text())
    assert facts["run"] == run
    assert facts["mode"] == "sagemaker"
    assert facts["job"] == job
    assert facts["billed_seconds"] == 99
    assert facts["data"] == "s3://the-bucket/data/" + "f" * 64
    assert facts["model_uri"] == f"s3://the-bucket/jobs/{job}/output/model.tar.gz"
    assert facts["seconds"] > 500
    assert "validation accuracy  1.0000" in capsys.readouterr().out
    with tarfile.open(folder / "model.tar.gz") as tar:
        assert tar.getnames() == ["model.json", "model.safetensors"]
    assert not (pull.WORK / job).exists()
    account.clear()
    assert run_main(monkeypatch, pull) == 0  # the newest, which is here
    assert not account.named("GetObject")


@pytest.mark.parametrize("strange", ["", "role", "place", "bucket", "swapped", "no role"])
def test_only_what_a_job_of_this_project_made_is_trusted(
    account: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], strange: str
) -> None:
    monkeypatch.setattr(runs, "TRUSTED", tmp_path / ".cache" / "trusted")
    job, s3 = left_behind(account, tmp_path), boto3.client("s3")
    facts = account.answers["DescribeTrainingJob"]
    if strange == "role":
        facts["RoleArn"] = "arn:aws:iam::123456789012:role/the-role-of-others"
    elif strange == "no role":
        del facts["RoleArn"]
    elif strange == "swapped":
        facts["TrainingEndTime"] = datetime.now(UTC) - timedelta(hours=1)
    elif strange:
        bucket, key = (STACK.bucket, "elsewhere") if strange == "place" else ("another", f"jobs/{job}/output")
        if strange == "bucket":
            s3.create_bucket(Bucket=bucket)
            facts["OutputDataConfig"]["S3OutputPath"] = f"s3://{bucket}/jobs"
        for name in pull.ARCHIVES:
            s3.upload_file(str(tmp_path / name), bucket, f"{key}/{name}")
        facts["ModelArtifacts"]["S3ModelArtifacts"] = f"s3://{bucket}/{key}/model.tar.gz"
    folder = pull.pull(Account(settings()), job)
    assert runs.trusted(folder / "model.tar.gz") == (not strange)
    assert ("is not trusted, so its code runs in a container only: " in capsys.readouterr().out) == bool(strange)


def test_pull_takes_the_sdk_s_local_layout_of_the_output_too(account: Recorder, tmp_path: Path) -> None:
    job = finished(account)
    files = {"data/metrics.json": b"{}"}
    assert pull._unpacked(archive(tmp_path / "output.tar.gz", files)) == tmp_path / "output" / "data"
    assert (
        pull.run_name(account.answers["DescribeTrainingJob"] | {"Name": job})
        == job.removeprefix("image-classifier-")[:20]
    )
    other = {"Name": "a-tuner-s", "CreationTime": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)}
    assert runs.NAME.fullmatch(pull.run_name(other))
    assert pull.run_name(other) == pull.run_name(other) != pull.run_name(other | {"Name": "b"})


def test_an_interrupted_download_is_continued(account: Recorder, tmp_path: Path) -> None:
    job = left_behind(account, tmp_path)

    def fails(parameters: dict[str, Any]) -> Any:
        raise refused("404" if "output.tar.gz" in parameters["Key"] else "500", "Not Found")

    s3 = boto3.client("s3")
    s3.copy_object(Bucket=STACK.bucket, Key="kept", CopySource=f"{STACK.bucket}/jobs/{job}/output/output.tar.gz")
    s3.delete_object(Bucket=STACK.bucket, Key=f"jobs/{job}/output/output.tar.gz")
    with pytest.raises(UserError, match=rf"downloading s3://.*/{job}/output/output\.tar\.gz failed: Not Found"):
        pull.pull(Account(settings()), job)
    assert [path.name for path in (pull.WORK / job).iterdir()] == ["model.tar.gz"]
    assert not runs.ARTIFACTS.exists()
    s3.copy_object(Bucket=STACK.bucket, Key=f"jobs/{job}/output/output.tar.gz", CopySource=f"{STACK.bucket}/kept")
    account.clear()
    assert (pull.pull(Account(settings()), job) / "model.tar.gz").is_file()
    assert {request["Key"].rpartition("/")[2] for request in account.named("GetObject")} == {"output.tar.gz"}


@pytest.mark.parametrize("damage", ["truncated", "checksum", "file missing", "no run.json", "outside"])
def test_what_is_damaged_is_not_published(account: Recorder, tmp_path: Path, damage: str) -> None:
    job = left_behind(account, tmp_path, weights=b"others" if damage == "checksum" else b"weights")
    s3, key = boto3.client("s3"), f"jobs/{job}/output/output.tar.gz"
    if damage == "truncated":
        s3.put_object(Bucket=STACK.bucket, Key=key, Body=(tmp_path / "output.tar.gz").read_bytes()[:-30])
    elif damage != "checksum":
        kept = {"metrics.json": b"{}"} | (
            {"run.json": b'{"dataset_fingerprint": "f"}'} if damage == "file missing" else {}
        )
        path = archive(tmp_path / "other.tar.gz", kept)
        if damage == "outside":
            with tarfile.open(path, "w:gz") as tar:
                tar.add(tmp_path / "output.tar.gz", "../../evil")
        s3.upload_file(str(path), STACK.bucket, key)
    with pytest.raises(UserError, match=f"^{job} was not published: ") as error:
        pull.pull(Account(settings()), job)
    assert "\n" not in str(error.value)
    assert not runs.ARTIFACTS.exists() or not list(runs.ARTIFACTS.iterdir())
    assert not (pull.WORK / job).exists()


@pytest.mark.parametrize(
    ("status", "words"), [("InProgress", "wait for it"), ("Failed", "AlgorithmError"), ("Stopped", "ended without")]
)
def test_a_job_without_a_result_is_not_pulled(account: Recorder, status: str, words: str) -> None:
    job = started(account)
    described(account, TrainingJobStatus=status, SecondaryStatus=status, FailureReason="AlgorithmError: no")
    with pytest.raises(UserError, match=words):
        pull.pull(Account(settings()), job)
    assert not account.named("GetObject", "HeadObject")


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called docker that notes its arguments, and the input of `login`: no registry is reached."""
    script = (
        f'echo "$@" >> {tmp_path}/calls\ncase "$1 $*" in\n'
        f'login*) cat > {tmp_path}/stdin;;\n*inspect*) echo \'[{{"Architecture": "\'${{ARCH:-amd64}}\'", '
        '"Id": "sha256:0123456789abcdef", "Descriptor": {"mediaType": "\'$MEDIA\'"}}]\';;\n'
        '"push "*) echo denied >&2; exit ${PUSH:-0};;\nesac\n'
    )
    put_first("docker", script, tmp_path, monkeypatch)
    for name in ("ARCH", "MEDIA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Account, "stack", lambda _settings: STACK)
    return tmp_path


def calls(folder: Path) -> list[str]:
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [line for line in lines if line.split()[0] in ("login", "tag", "push", "logout")]


PLAIN = image_push.TAKEN
OCI, DOCKER = "application/vnd.oci.image", "application/vnd.docker"
REFUSED = (f"{OCI}.index.v1+json", f"{DOCKER}.distribution.manifest.list.v2+json", f"{OCI}.manifest.v1+json")


def repository(aws: Recorder, folder: Path, kind: str = PLAIN) -> dict[str, str]:
    """ECR knows what was pushed, or put; returns tags and their media types."""
    tags: dict[str, str] = {}

    def describe(asked: dict[str, Any]) -> dict[str, Any]:
        pushed = [line.rpartition(":")[2] for line in calls(folder) if line.startswith("push")]
        known = dict.fromkeys(pushed, kind) | tags
        tag = asked["imageIds"][0]["imageTag"]
        if tag not in known:
            raise refused("ImageNotFoundException")
        return {"imageDetails": [{"imageTags": [tag], "imageManifestMediaType": known[tag]}]}

    aws.answers["DescribeImages"] = describe
    return tags


INDEX = {  # as Docker 29 pushes it: an image and its attestation
    "schemaVersion": 2, "mediaType": REFUSED[0],
    "manifests": [{"digest": f"sha256:{'a' * 64}", "platform": {"architecture": "amd64", "os": "linux"}},
                  {"digest": f"sha256:{'b' * 64}", "platform": {"architecture": "unknown", "os": "unknown"},
                   "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}],
}  # fmt: skip


def image_of(config: str, *layers: str) -> dict[str, Any]:
    """A manifest of these media types."""
    made = [{"mediaType": kind, "digest": f"sha256:{index:064d}", "size": 100 + index}
            for index, kind in enumerate((config, *layers))]  # fmt: skip
    return {"schemaVersion": 2, "config": made[0], "layers": made[1:]}


ONE = {"mediaType": REFUSED[2], "annotations": {"org.opencontainers.image.created": "now"}} | image_of(
    f"{OCI}.config.v1+json", f"{OCI}.layer.v1.tar+gzip", f"{OCI}.layer.v1.tar"
)
AS_DOCKER = {"mediaType": PLAIN} | image_of(
    f"{DOCKER}.container.image.v1+json", f"{DOCKER}.image.rootfs.diff.tar.gzip", f"{DOCKER}.image.rootfs.diff.tar"
)


def holds(aws: Recorder, tags: dict[str, str], remote: str, sent: Any, one: Any) -> None:
    """ECR has `sent` under the tag of a moment, and `one` under the digest that an index names."""

    def get(asked: dict[str, Any]) -> dict[str, Any]:
        digest = asked["imageIds"][0].get("imageDigest")
        if digest is None:
            assert asked["imageIds"] == [{"imageTag": f"{remote.rpartition(':')[2]}-0123456789ab"}]
        assert digest in (None, f"sha256:{'a' * 64}")
        return {"images": [{"imageManifest": json.dumps(one if digest else sent)}]}

    def put(asked: dict[str, Any]) -> dict[str, Any]:
        assert json.loads(asked["imageManifest"]) == AS_DOCKER
        tags[asked["imageTag"]] = asked["imageManifestMediaType"]
        return {}

    aws.answers |= {"BatchGetImage": get, "PutImage": put}


@pytest.mark.parametrize(("kind", "sent"), [(REFUSED[0], INDEX), (REFUSED[1], INDEX), (REFUSED[2], ONE)])
def test_sagemaker_gets_dockers_manifest_whatever_docker_pushed(
    aws: Recorder, docker: Path, monkeypatch: pytest.MonkeyPatch, kind: str, sent: Any
) -> None:
    """Docker's own tag is another one: in the repository a tag is for good."""
    tags = repository(aws, docker)
    monkeypatch.setenv("MEDIA", kind)
    remote = image_push.uri(Account(settings()), "training")
    holds(aws, tags, remote, sent, ONE)
    image_push.push(Account(settings()), "training")
    assert [line for line in calls(docker) if line.startswith("push")] == [f"push {remote}-0123456789ab"]
    assert tags == {remote.rpartition(":")[2]: PLAIN}
    assert image_push.present(Account(settings()), remote)


def test_dockers_own_manifest_is_pushed_as_it_is(aws: Recorder, docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(aws, docker)
    monkeypatch.setenv("MEDIA", PLAIN)
    remote = image_push.uri(Account(settings()), "training")
    image_push.push(Account(settings()), "training")
    assert [line for line in calls(docker) if line.startswith("push")] == [f"push {remote}"]
    assert not aws.named("PutImage")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_sagemaker_refuses_in_the_repository_is_refused_with_the_way_out(
    aws: Recorder, docker: Path, kind: str
) -> None:
    repository(aws, docker, kind)
    with pytest.raises(UserError, match=r"has a manifest .*SageMaker refuses.*batch-delete-image .*make image-push"):
        image_push.push(Account(settings()), "training")
    with pytest.raises(UserError, match="SageMaker refuses"):
        image_push.ensure(Account(settings()), "training")


def test_what_cannot_be_converted_is_refused(aws: Recorder, docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = repository(aws, docker)
    monkeypatch.setenv("MEDIA", REFUSED[1])
    remote = image_push.uri(Account(settings()), "training")
    both = INDEX["manifests"][:1] * 2  # type: ignore[index]
    zstd = image_of(f"{OCI}.config.v1+json", f"{OCI}.layer.v1.tar+zstd")
    for sent, words in (
        (INDEX | {"manifests": []}, "has 0 images for amd64, not one; build it again"),
        (INDEX | {"manifests": both}, "has 2 images for amd64, not one; build it again"),
        (zstd, r"holds .*layer.v1.tar\+zstd, which Docker's manifest.*not compressed by zstd"),
    ):
        holds(aws, tags, remote, sent, ONE)
        with pytest.raises(UserError, match=words):
            image_push.push(Account(settings()), "training")
    aws.answers["BatchGetImage"] = {"images": [], "failures": [{"failureCode": "ImageNotFound"}]}
    with pytest.raises(UserError, match="ImageNotFound"):
        image_push.push(Account(settings()), "training")
    assert not tags


@pytest.mark.parametrize("length", [12, 19, 27, 28, 30])
def test_jobs_have_names_that_the_stack_allows(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    name = "classifier-of-so-many-animals1"[:length]
    monkeypatch.setattr(project, "name", lambda: name)
    assert len(project.job_prefix()) <= 27
    assert project.job_prefix() in (
        name,
        project.tuning_prefix(),
    )  # Project and ShortProject of infrastructure/stack.yaml
    assert len(project.tuning_prefix()) <= 19


def test_images_are_pushed_once_and_the_password_is_in_no_argument(
    aws: Recorder, docker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository(aws, docker)
    for variable in [variable for variable in os.environ if variable.startswith("IMAGES__")]:
        monkeypatch.delenv(variable)
    assert run_main(monkeypatch, image_push) == 0
    registry, expected = STACK.repository.partition("/")[0], []
    targets: tuple[local_images.Target, ...] = ("training", "serving")
    for target in targets:
        name = local_images.image_name(settings(), target, target == "training")  # on a GPU; and serving on none
        remote = f"{STACK.repository}:{name.rpartition(':')[2]}"
        login = f"login --username AWS --password-stdin {registry}"
        expected += [login, f"tag {name} {remote}", f"push {remote}", f"logout {registry}"]
    assert calls(docker) == expected
    password = (docker / "stdin").read_text()
    assert password
    assert password not in (docker / "calls").read_text() + capsys.readouterr().out
    (docker / "calls").unlink()
    aws.answers["DescribeImages"] = {"imageDetails": []}
    assert run_main(monkeypatch, image_push) == 0
    assert calls(docker) == []
    assert capsys.readouterr().out.count("is there already") == 2


@pytest.mark.parametrize(
    ("variables", "words"),
    [({"ARCH": "arm64"}, "is built for arm64, SageMaker runs amd64"), ({"PUSH": "1"}, "was not pushed")],
)
def test_a_push_that_fails_says_why_and_logs_out(
    aws: Recorder, docker: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    aws.answers["DescribeImages"] = refused("ImageNotFoundException")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        run_main(monkeypatch, image_push)
    assert calls(docker)[-1:] == ([] if "ARCH" in variables else [f"logout {STACK.repository.partition('/')[0]}"])


@pytest.mark.parametrize(("name", "overrides"), [
    ("process_default", []),
    ("process_everything", [*NETWORK, f"aws.kms_key={KEY}", "compute.isolation=true", "training.image_size=32",
                            "data.unreadable=0.5", "aws.budget_usd=300", "compute.max_hours=200",
                            "compute.max_wait_hours=200"]),
])  # fmt: skip
def test_processing_requests(account: Recorder, name: str, overrides: list[str]) -> None:
    job, packed = process_job.process(Account(settings(*overrides)), "s3://the-bucket/photos/", yes=False)
    assert packed == f"s3://the-bucket/data/{job}/images"
    check_golden(name, [call for call in account if call[0] in CREATE])


def test_what_the_processing_verb_says(
    account: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, process_job, "--data", "s3://the-bucket/photos") == 0
    job = account.named("CreateProcessingJob")[0]["ProcessingJobName"]
    out = capsys.readouterr().out
    assert "on 1 x ml.m5.2xlarge, 4 hours at most" in out
    assert f"#/processing-jobs/{job}" in out
    assert f"make train DATA=s3://the-bucket/data/{job}/images" in out
    monkeypatch.setattr(prices, "hourly", lambda *_: None)
    with pytest.raises(UserError, match="YES=1"):
        run_main(monkeypatch, process_job, "--data", "s3://the-bucket/photos")
    assert len(account.named("CreateProcessingJob")) == 1
    facts = {"ProcessingJobName": job, "ProcessingJobStatus": "Failed", "FailureReason": "no room"}
    account.answers["DescribeProcessingJob"] = facts
    monkeypatch.setattr(prices, "hourly", lambda *_: 0.1)
    with pytest.raises(UserError, match="failed: no room"):
        run_main(monkeypatch, process_job, "--data", "s3://the-bucket/photos", "--wait")
    account.answers["CreateProcessingJob"] = refused("ResourceLimitExceeded", "The limit is 0 Instances.")
    with pytest.raises(UserError, match="a quota of the account is reached"):
        run_main(monkeypatch, process_job, "--data", "s3://the-bucket/photos")


@pytest.mark.parametrize("name", ["train", "processing", "pull", "jobs", "images"])
def test_a_verb_imports_no_sdk_before_it_needs_it(name: str) -> None:
    code = f"import sys, pipelines.cloud.{name}; print({{'torch', 'sagemaker', 'boto3'}} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
