"""`batch`: its requests, what it writes from AWS's files, what it leaves, what fails; the server's side."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import boto3
import pytest

from inference import batch
from pipelines import runs
from pipelines.batch import transform as batch_transform
from pipelines.cloud import destroy, inventory, prices
from pipelines.cloud import jobs as logs
from pipelines.cloud.account import Account
from pipelines.terminal import UserError
from tests.cloud import KEY, NETWORK, STACK, Recorder, aws, check_golden
from tests.test_deploy import NAME, Hosting, hosting, quota, settings, written
from tests.test_inference import archive, artifact, classifier, photo

__all__ = ["archive", "artifact", "aws", "classifier", "hosting"]  # fixtures
PHOTOS = {"cats/a up.png": "up", "cats/b.PNG": "left", "ünï/c.png": "up"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, label in PHOTOS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo(label))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "d.png").write_bytes(b"")
    return folder


@pytest.fixture
def prefix(hosting: Hosting, photos: Path) -> str:
    """The same in a bucket, with what the console leaves there, and a neighbour whose name begins alike."""
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="theirs")
    for path in (path for path in photos.rglob("*") if path.is_file()):
        s3.upload_file(str(path), "theirs", f"in/{path.relative_to(photos).as_posix()}")
    s3.put_object(Bucket="theirs", Key="in/", Body=b"")
    s3.put_object(Bucket="theirs", Key="inside/e.png", Body=b"")
    hosting.calls.clear()
    return "s3://theirs/in"


class Transform:
    """AWS's part: each image of the manifest to the real handlers, the answer to `<output>/<file>.out`."""

    def __init__(self, hosting: Hosting, **said: Any) -> None:
        self.hosting, self.said, self.bad, self.inside = hosting, said, set[str](), ""
        hosting.calls.answers["CreateTransformJob"] = self.create

    def create(self, asked: dict[str, Any]) -> Any:
        answers, s3 = self.hosting.calls.answers, boto3.client("s3")
        del answers["CreateTransformJob"]
        try:
            made = boto3.client("sagemaker").create_transform_job(**asked)
        finally:
            answers["CreateTransformJob"] = self.create
            self.hosting.calls.remove(("CreateTransformJob", asked))  # asked twice, once by this
        first, *names = json.loads(read(asked["TransformInput"]["DataSource"]["S3DataSource"]["S3Uri"]))
        for name in names:
            if name not in self.bad:
                body = read(f"{first['prefix']}{name}")
                answer = self.hosting.answer(body, asked["TransformInput"]["ContentType"])
                bucket, _, key = asked["TransformOutput"]["S3OutputPath"].removeprefix("s3://").partition("/")
                s3.put_object(Bucket=bucket, Key=f"{key}/{self.inside}{name}.out", Body=answer.encode())
        answers["DescribeTransformJob"] = lambda _: self.describe(asked)
        return made

    def describe(self, asked: dict[str, Any]) -> dict[str, Any]:
        del self.hosting.calls.answers["DescribeTransformJob"]
        try:
            return {**boto3.client("sagemaker").describe_transform_job(TransformJobName=asked["TransformJobName"])} | (
                self.said
            )
        finally:
            self.hosting.calls.answers["DescribeTransformJob"] = lambda _: self.describe(asked)


def read(uri: str) -> bytes:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bytes(boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read())


def start(images: Path | str, *overrides: str, **options: Any) -> str:
    given = (
        dict.fromkeys(("run", "job", "package", "artifact"))
        | {"data": str(images), "yes": True, "plan": False}
        | options
    )
    return batch_transform.start(Account(settings(*overrides)), Namespace(**given))


def verb(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["batch", *words, "--set", "aws.region=us-east-1"])
    monkeypatch.setattr(logs, "POLL", 0.001)
    return batch_transform.main()


def changes(calls: Recorder) -> Recorder:
    """Without the files themselves."""
    lot = Recorder(call for call in written(calls) if call[0] not in ("PutObject", "DescribeImages"))
    manifests = [call for call in calls if call[0] == "PutObject" and "manifest" in call[1]["Key"]]
    return Recorder([*manifests, *lot])


def left() -> list[Any]:
    sagemaker, scheduler = boto3.client("sagemaker"), boto3.client("scheduler")
    return [*sagemaker.list_models()["Models"], *scheduler.list_schedules()["Schedules"]]


def test_a_folder_from_upload_to_the_same_lines_as_batch_local(
    hosting: Hosting, photos: Path, archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Transform(hosting)
    assert verb(monkeypatch, "--data", str(photos), "--wait") == 0
    printed = capsys.readouterr().out
    for words in ("a transform job in us-east-1 on 1 x ml.m5.large, 4 hours at most", "classifies 3 images",
                  "run 20261121-103000-a1b2", "costs at most 2.00 USD",
                  "3 images, 0 of them without an answer", "       2  up"):  # fmt: skip
        assert words in printed
    order = [name for name, _ in hosting.calls if name in ("CreateSchedule", "CreateModel", "CreateTransformJob")]
    assert order == ["CreateSchedule", "CreateModel", "CreateTransformJob"]
    check_golden("batch_folder", changes(hosting.calls))
    assert left() == []
    (output,) = (runs.ARTIFACTS / "batch").iterdir()
    own = output.with_suffix(".local")
    monkeypatch.setenv("INFERENCE_MAX_BYTES", str(2**30))  # which it would set for good
    assert batch.main(["--artifact", str(archive), "--output", str(own), str(photos)]) == 0
    ours, theirs = ([json.loads(line) for line in path.read_text().splitlines()] for path in (output, own))
    assert [line["file"] for line in ours] == sorted(PHOTOS)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=1e-5)
    assert ours == theirs
    uploads = len(hosting.calls.named("PutObject"))
    start(photos)
    assert len(hosting.calls.named("PutObject")) == uploads + 1 + len(PHOTOS), "only a manifest and the answers"


def test_a_prefix_sends_only_its_images(hosting: Hosting, prefix: str) -> None:
    Transform(hosting)
    name = start(prefix)
    manifest = json.loads(read(f"s3://{STACK.bucket}/batch/{name}/images.manifest"))
    assert manifest == [{"prefix": "s3://theirs/in/"}, *sorted(PHOTOS)]


@pytest.mark.parametrize("inside", ["", "in/"])
def test_answers_are_found_whether_or_not_their_names_have_the_prefix(
    hosting: Hosting, prefix: str, inside: str
) -> None:
    Transform(hosting).inside = inside
    assert batch_transform.join(Account(settings()), start(f"{prefix}/")) == 0


def test_everything_that_a_job_can_have(hosting: Hosting, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_QUEUE", "9")
    boto3.client("s3").put_object(Bucket="theirs", Key="in/large.jpg", Body=bytes(20 * 2**20 + 1))
    Transform(hosting).bad = {"large.jpg"}
    hosting.calls.clear()
    start(prefix, *NETWORK, f"aws.kms_key={KEY}", "compute.isolation=true", "endpoint.instances=3",
          "aws.tags={team: vision}", "compute.max_hours=0.5", run="20261121-093000-a1b2")  # fmt: skip
    check_golden("batch_everything", changes(hosting.calls))
    (job,) = hosting.calls.named("CreateTransformJob")
    assert (job["MaxPayloadInMB"], job["MaxConcurrentTransforms"]) == (21, 4), "AWS: 100 MB in all"
    start(prefix, "endpoint.instance_type=ml.m5d.large", f"aws.kms_key={KEY}")
    assert "VolumeKmsKeyId" not in hosting.calls.named("CreateTransformJob")[-1]["TransformResources"]


def test_a_failed_job_still_gives_what_it_answered(
    hosting: Hosting, prefix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = Transform(hosting, TransformJobStatus="Failed", FailureReason="ClientError: see logs")
    transform.bad = {"cats/a up.png"}
    name = start(prefix)
    boto3.client("s3").put_object(Bucket=STACK.bucket, Key=f"batch/{name}/output/ünï/c.png.out", Body=b'{"labels":[]}')
    assert verb(monkeypatch, "--job", name) == 1
    printed = capsys.readouterr().out
    assert "3 images, 2 of them without an answer" in printed
    assert f"{name} is Failed: ClientError: see logs" in printed
    lines = [json.loads(line) for line in (runs.ARTIFACTS / "batch" / f"{name}.jsonl").read_text().splitlines()]
    assert ["error" in line for line in lines] == [True, False, True]
    assert "no answer; see `make logs JOB=" in lines[0]["error"]
    assert "what batch transform wrote is no answer" in lines[2]["error"]
    assert left() == []
    assert batch_transform.join(Account(settings()), name) == 1, "it can be fetched again"


def test_a_job_without_any_answer(hosting: Hosting, prefix: str) -> None:
    transform = Transform(hosting, TransformJobStatus="Failed", FailureReason="the model does not load")
    transform.bad = {*PHOTOS}
    with pytest.raises(UserError, match="failed: the model does not load"):
        batch_transform.join(Account(settings()), start(prefix))
    transform.said = {"TransformJobStatus": "Completed"}
    with pytest.raises(UserError, match="wrote no answer to s3://the-bucket/batch/"):
        batch_transform.join(Account(settings()), start(prefix))
    assert not (runs.ARTIFACTS / "batch").exists()


def test_jobs_that_cannot_be_fetched(hosting: Hosting, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Transform(hosting, TransformJobStatus="InProgress")
    name = start(prefix)
    with pytest.raises(UserError, match="is InProgress; wait for it with `make logs JOB="):
        batch_transform.join(Account(settings()), name)
    assert len(left()) == 2, "what a running job needs stays"
    del hosting.calls.answers["DescribeTransformJob"]
    with pytest.raises(UserError, match=f"{NAME}-none is no transform job that `make batch` started"):
        batch_transform.join(Account(settings()), f"{NAME}-none")
    with pytest.raises(UserError, match="DATA is missing"):
        verb(monkeypatch)


@pytest.mark.parametrize("operation", ["CreateSchedule", "CreateModel", "CreateTransformJob"])
def test_what_fails_leaves_nothing(hosting: Hosting, prefix: str, operation: str) -> None:
    hosting.calls.answers[operation] = quota(operation)
    with pytest.raises(UserError, match="a quota of the account is reached"):
        start(prefix)
    assert left() == []


def test_a_job_that_was_started_is_not_taken_back(
    hosting: Hosting, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transform = Transform(hosting)

    def interrupted(asked: dict[str, Any]) -> None:
        transform.create(asked)
        raise KeyboardInterrupt

    hosting.calls.answers["CreateTransformJob"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        start(prefix)
    assert "runs. Follow it with `make logs JOB=" in capsys.readouterr().out
    assert len(left()) == 2


def test_money_and_limits(hosting: Hosting, prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"4\.00 USD is over aws.budget_usd \(3 USD\)"):
        start(prefix, "aws.budget_usd=3", "endpoint.instances=2", yes=False)
    monkeypatch.setattr(prices, "hourly", lambda *_: None)
    with pytest.raises(UserError, match="a price that is not known counts as over"):
        start(prefix, yes=False)
    with pytest.raises(UserError, match="torch does not run; choose a type without a GPU"):
        start(prefix, "endpoint.instance_type=ml.g4dn.xlarge")
    with pytest.raises(UserError, match="s3://theirs/none holds no image"):
        start("s3://theirs/none")
    with pytest.raises(UserError, match="there is no folder"):
        start(tmp_path / "none")
    with pytest.raises(UserError, match="RUN and JOB name an artifact each"):
        start(prefix, run="r", job="j")
    monkeypatch.setattr(batch_transform, "MOST", 7)
    boto3.client("s3").put_object(Bucket="theirs", Key="in/huge.png", Body=bytes(7 * 2**20 + 1))
    with pytest.raises(UserError, match=r"huge\.png has 7,340,033 bytes, and batch transform takes 7 MB"):
        start(prefix)
    assert left() == []
    assert not [call for call in written(hosting.calls) if call[0] not in ("PutObject", "CreateBucket")]


def test_status_shows_and_destroy_stops_and_removes(
    hosting: Hosting, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destroy, "PAUSE", 0)
    Transform(hosting, TransformJobStatus="InProgress")
    name = start(prefix)
    arn = f"arn:aws:sagemaker:us-east-1:123456789012:transform-job/{name}"
    running = [{"TransformJobName": name, "TransformJobArn": arn, "TransformJobStatus": "InProgress",
                "CreationTime": boto3.client("sagemaker").list_models()["Models"][0]["CreationTime"]}]  # fmt: skip
    hosting.calls.answers["ListTransformJobs"] = lambda asked: {
        "TransformJobSummaries": running if asked["StatusEquals"] == "InProgress" else []
    }
    hosting.calls.answers["ListTags"] = {"Tags": Account(settings()).tags()}
    found = {item.kind: item for item in inventory.everything(Account(settings()))}
    assert set(found) == {"transform job", "model", "end schedule"}
    assert (found["transform job"].usd, found["end schedule"].of) == (0.5, name)
    hosting.calls.answers["StopTransformJob"] = lambda _: running.clear()  # moto cannot stop one
    start_of = len(hosting.calls)
    destroy.destroy(Account(settings()), None, yes=True)
    assert left() == []
    check_golden("batch_destroy", written(Recorder(hosting.calls[start_of:])))
