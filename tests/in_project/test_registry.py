"""`register`, `approve`, the champion, deploy from the registry, its local twin: requests, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto.sagemaker.models import SageMakerModelBackend

from pipelines import runs
from pipelines.cloud import artifact as source
from pipelines.cloud import destroy, packages, pull, status, storage
from pipelines.cloud.account import Account
from pipelines.cloud.packages import Package
from pipelines.registry import approve, register
from pipelines.registry import package as registry
from pipelines.terminal import UserError
from tests.cloud import STACK, Recorder, aws, check_golden
from tests.test_deploy import NAME, Hosting, hosting, run, settings, written
from tests.test_inference import archive, artifact, classifier
from tests.test_trust import changed

__all__ = ["archive", "artifact", "aws", "classifier", "hosting"]  # fixtures
FIRST, SECOND = "20261121-093000-a1b2", "20261121-103000-a1b2"
FACTS = {"run": SECOND, "hyperparameters": {"epochs": 3, "learning_rate": 0.02, "precision": "auto"},
         "data": "data/digits", "image": "training:1", "mode": "container"}  # fmt: skip


def evaluate(run: str, accuracy: float = 0.95) -> Path:
    """Write what `make evaluate` writes."""
    folder = runs.ARTIFACTS / run
    found = folder / "unpacked"
    source.checked(folder / "model.tar.gz", found)
    model = json.loads((found / "model.json").read_text())
    shutil.rmtree(found)
    metrics = {"accuracy": {"value": accuracy, "ci_low": accuracy - 0.02, "ci_high": accuracy + 0.015},
               "cross_entropy": {"value": 0.25}}  # fmt: skip
    facts = {"metrics": metrics, "images": 270, "classes": model["classes"],
             "model_dataset_fingerprint": model["dataset_fingerprint"]}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def calls(hosting: Hosting, monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path) -> Recorder:
    """Two evaluated runs of different artifacts. Moto forgets metadata at an update; AWS does not."""
    update = SageMakerModelBackend.update_model_package

    def keeping(backend: Any, **given: Any) -> str:
        kept = backend.describe_model_package(given["model_package_arn"]).customer_metadata_properties
        return update(backend, **given | {"customer_metadata_properties": kept})

    monkeypatch.setattr(SageMakerModelBackend, "update_model_package", keeping)
    other = tmp_path / "other"
    shutil.copytree(artifact, other)
    model = json.loads((other / "model.json").read_text())
    (other / "model.json").write_text(json.dumps(model | {"git_commit": None}))
    runs.pack(other, runs.ARTIFACTS / FIRST / "model.tar.gz")
    evaluate(FIRST, 0.9)
    (evaluate(SECOND) / "run.json").write_text(json.dumps(FACTS))
    hosting.calls.clear()
    return hosting.calls


def put(**options: Any) -> Package:
    return register.register(Account(settings()), Namespace(**dict.fromkeys(("run", "job", "artifact")) | options))


def versions(state: str | None = None) -> list[int]:
    return [item["ModelPackageVersion"] for item in packages.summaries(Account(settings()), state)]


def test_from_a_run_to_an_endpoint_of_the_champion(
    calls: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs.ARTIFACTS / SECOND / "report.html").write_text("<p>report</p>")
    assert packages.champion(Account(settings())) is None
    with pytest.raises(UserError, match="no package of image-classifier is approved, so there is no champion"):
        run(package="champion")
    calls.clear()
    monkeypatch.setattr(sys, "argv", ["register", "--set", "aws.region=us-east-1"])
    assert register.main() == 0
    printed = capsys.readouterr().out
    assert f"registers {SECOND} in the model package group {NAME} in us-east-1" in printed
    assert printed.index("costs at most 0.00 USD") < printed.index("uploading")
    assert (
        f"{NAME}/1 (run {SECOND}, accuracy 0.950000, accuracy_low 0.930000, accuracy_high 0.965000): Pending" in printed
    )
    (request,) = calls.named("CreateModelPackage")
    card = {"ModelCard": request["ModelCard"] | {"ModelCardContent": "<its own test>"}}
    shown = [(name, asked | card if asked is request else asked) for name, asked in calls]
    check_golden("register", [call for call in shown if call[0] != "PutObject"])
    attached = [request["CustomerMetadataProperties"]["report"]]
    attached += [part["Statistics"]["S3Uri"] for part in request["DriftCheckBaselines"].values()]
    attached += [request["InferenceSpecification"]["Containers"][0]["ModelDataUrl"]]
    for uri in attached:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        assert boto3.client("s3").head_object(Bucket=bucket, Key=key)["ContentLength"]
    with pytest.raises(UserError, match=rf"{NAME}/1 \(.*\) is PendingManualApproval; approve it with .*PACKAGE=1`"):
        run(package="1")
    calls.clear()
    monkeypatch.setattr(sys, "argv", ["approve", "--yes", "--set", "aws.region=us-east-1"])
    assert approve.main() == 0
    assert "the champion is none yet" in capsys.readouterr().out
    check_golden("approve", calls)
    best = packages.champion(Account(settings()))
    assert best is not None
    assert (best.accuracy, best.status, best.version) == (0.95, "Approved", 1)
    for name in ("champion", "1", best.arn):
        run(package=name)
        made = calls.named("CreateModel")[-1]
        assert [container["ModelPackageName"] for container in made["Containers"]] == [best.arn]
    monkeypatch.setattr(Account, "stack", lambda _: STACK)
    assert status.stored(Account(settings()))[-2].startswith(
        f"registry {NAME}: 1 packages, the champion is {NAME}/1 (run"
    )


def test_the_card_follows_its_schema(calls: Recorder) -> None:
    """As SDK V3 writes it down: nothing is unknown there, and nothing is lost on the way through it."""
    from sagemaker.core.shapes.model_card_shapes import ModelCardContent

    put()
    card = calls.named("CreateModelPackage")[0]["ModelCard"]["ModelCardContent"]
    assert "\n" not in card
    content = json.loads(card)
    assert ModelCardContent(**content).model_dump(exclude_none=True, mode="json") == content
    assert set(content["model_overview"]) <= {"model_creator", "model_artifact"}, "all that a package's card may have"
    assert {"name": "epochs", "value": "3"} in (
        content["training_details"]["training_job_details"]["user_provided_hyper_parameters"]
    )
    assert "up" in content["intended_uses"]["purpose_of_model"]
    (metric, _) = content["evaluation_details"][0]["metric_groups"][0]["metric_data"]
    assert metric["notes"] == "95 % interval 0.930000 to 0.965000"


def test_the_same_artifact_is_registered_once(
    calls: Recorder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, again = put(), put(run=SECOND)
    copy = tmp_path / "copy"
    shutil.copytree(runs.ARTIFACTS / SECOND, copy)
    assert [first, first] == [again, put(artifact=copy / "model.tar.gz")]
    assert "is registered already" in capsys.readouterr().out
    assert put(run=FIRST).version == 2
    assert (versions(), len(calls.named("CreateModelPackageGroup"))) == ([2, 1], 1)


def test_the_champion_is_the_newest_approved(calls: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    def best() -> int:
        found = packages.champion(Account(settings()))
        return found.version if found else 0

    put(run=SECOND)
    put(run=FIRST)
    approve.approve(Account(settings()), "1", reject=False, yes=True)
    assert best() == 1
    capsys.readouterr()
    approve.approve(Account(settings()), None, reject=False, yes=True)
    assert "WARNING: its accuracy is 0.0500 below the champion's" in capsys.readouterr().out
    assert best() == 2
    approve.approve(Account(settings()), "2", reject=False, yes=True)
    assert "is Approved already" in capsys.readouterr().out
    approve.approve(Account(settings()), "2", reject=True, yes=True)
    assert f"{NAME}/2 is Rejected; the champion is arn:" not in (printed := capsys.readouterr().out)
    assert f"/2 is Rejected; the champion is {NAME}/1" in printed
    assert (best(), versions("Rejected")) == (1, [2])
    with pytest.raises(UserError, match="no package of image-classifier waits for approval"):
        approve.approve(Account(settings()), None, reject=False, yes=True)
    with pytest.raises(UserError, match="has no package '7'; it has: 2, 1"):
        approve.approve(Account(settings()), "7", reject=False, yes=True)
    assert len(calls.named("UpdateModelPackage")) == 3


def test_approving_asks(calls: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    put()
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UserError, match="YES=1"):
        approve.approve(Account(settings()), None, reject=False, yes=False)
    assert "accuracy_low         0.930000" in capsys.readouterr().out
    assert not calls.named("UpdateModelPackage")


def test_what_is_not_registered(calls: Recorder, tmp_path: Path, artifact: Path) -> None:
    evaluation = runs.ARTIFACTS / SECOND / "evaluation.json"
    facts = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps(facts | {"model_dataset_fingerprint": "another"}))
    with pytest.raises(UserError, match=r"evaluation\.json beside .* is of another model"):
        put()
    evaluation.unlink()
    with pytest.raises(UserError, match=f"was not evaluated, .*`make evaluate RUN={SECOND}`"):
        put()
    with pytest.raises(UserError, match="RUN and JOB name an artifact each"):
        put(run=SECOND, job="j")
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    (damaged / "model.safetensors").write_bytes(b"other")
    runs.pack(damaged, tmp_path / "model.tar.gz")
    with pytest.raises(UserError, match="does not match its checksum"):
        put(artifact=tmp_path / "model.tar.gz")
    assert not written(calls)


def test_a_job_is_pulled_and_its_artifact_stays_where_it_is(calls: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = runs.ARTIFACTS / SECOND, list[str]()
    (folder / "run.json").write_text(json.dumps(FACTS | {"job": "the-job", "model_uri": "s3://b/jobs/model.tar.gz"}))

    def pulled(_: Any, job: str) -> Path:
        asked.append(job)
        return folder

    monkeypatch.setattr(pull, "pull", pulled)
    put(job="the-job")
    assert asked == ["the-job"]
    (request,) = calls.named("CreateModelPackage")
    assert request["InferenceSpecification"]["Containers"][0]["ModelDataUrl"] == "s3://b/jobs/model.tar.gz"
    assert request["MetadataProperties"] == {"CommitId": "abc", "GeneratedBy": "the-job"}
    assert not [put for put in calls.named("PutObject") if put["Key"].startswith("models/")]


def test_names_and_facts_that_aws_would_refuse(calls: Recorder, tmp_path: Path) -> None:
    """No empty value, and no character outside the pattern that botocore does not check."""
    odd = tmp_path / "a (copy) of 'it'"
    shutil.copytree(runs.ARTIFACTS / FIRST, odd)
    put(artifact=odd / "model.tar.gz")
    (request,) = calls.named("CreateModelPackage")
    metadata = request["CustomerMetadataProperties"]
    assert metadata["run"] == "a -copy- of -it-"
    assert "git_commit" not in metadata
    assert "CommitId" not in request["MetadataProperties"]
    assert all(0 < len(value) <= 256 for value in metadata.values())


@pytest.mark.parametrize("operation", ["CreateModelPackage", "CreateModelPackageGroup", "ListModelPackages"])
def test_refused(calls: Recorder, operation: str) -> None:
    error = {"Code": "AccessDeniedException", "Message": "not authorized"}
    calls.answers[operation] = ClientError({"Error": error}, operation)
    with pytest.raises(UserError, match=r"not authorized .*`make doctor` shows what is missing"):
        put()


def test_no_group_is_no_package(calls: Recorder) -> None:
    missing = {"Code": "ValidationException", "Message": f"Model Package Group {NAME} does not exist."}
    calls.answers["ListModelPackages"] = ClientError({"Error": missing}, "ListModelPackages")
    assert packages.champion(Account(settings())) is None
    with pytest.raises(UserError, match="has no package '1'; it has: none"):
        packages.find(Account(settings()), "1")


def test_everything_is_removed_only_with_all(calls: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    """Moto can delete neither packages nor groups: their requests are validated only."""
    put(run=FIRST)
    put(run=SECOND)
    order: list[str] = []
    for operation in ("DeleteModelPackage", "DeleteModelPackageGroup"):
        calls.answers[operation] = lambda asked: order.append("/".join(str(v) for v in asked.values()))
    destroy._delete_registry(Account(settings()), NAME)
    arn = f"arn:aws:sagemaker:us-east-1:123456789012:model-package/{NAME}"
    assert order == [f"{arn}/2", f"{arn}/1", NAME]
    assert f"deleted the model registry {NAME} with 2 packages" in capsys.readouterr().out


@pytest.mark.usefixtures("calls")
def test_nothing_registered_is_nothing_to_delete() -> None:
    destroy._delete_registry(Account(settings()), NAME)


def test_the_local_registry_has_the_same_fields(calls: Recorder, tmp_path: Path) -> None:
    put(run=SECOND)
    (sent,) = calls.named("CreateModelPackage")
    for number, run_name in enumerate((FIRST, SECOND)):
        (tmp_path / str(number)).mkdir()
        archive = runs.ARTIFACTS / run_name / "model.tar.gz"
        found = register.evidence(archive, tmp_path / str(number))
        folder = registry.register_local(found, "serving:1", archive, tmp_path / str(number), "Approved")
        assert folder == runs.ARTIFACTS / "registry" / NAME / str(number + 1)
        assert registry.register_local(found, "serving:1", archive, tmp_path / str(number)) == folder, "once"
    kept = json.loads((folder / "package.json").read_text())
    own = {"ModelPackageArn", "ModelPackageVersion"}
    assert sent.keys() - {"ClientToken"} | own == kept.keys(), "botocore adds the token"
    package = packages.package(kept)
    assert (package.version, package.status, package.accuracy) == (2, "Approved", 0.95)
    assert Path(package.uri).read_bytes() == (runs.ARTIFACTS / SECOND / "model.tar.gz").read_bytes()
    assert Path(kept["ModelMetrics"]["ModelQuality"]["Statistics"]["S3Uri"]).is_file()
    assert not list(folder.parent.glob(".*"))
    calls.clear()
    run(artifact=folder / "model.tar.gz")
    assert calls.named("CreateEndpoint"), "a locally registered model can be deployed"


SWAPS = [
    "other content",
    "other code, the same model.json",
    "the same size",
    "gone",
    "an archive that leads out",
    "text",
]


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("versions", [True, False])
def test_what_was_approved_is_what_is_deployed(
    calls: Recorder, tmp_path: Path, artifact: Path, archive: Path, swap: str, versions: bool
) -> None:
    s3 = boto3.client("s3")
    if versions:
        s3.put_bucket_versioning(Bucket=STACK.bucket, VersioningConfiguration={"Status": "Enabled"})
    package = put(run=SECOND)
    account = Account(settings())
    account.client("sagemaker").update_model_package(ModelPackageArn=package.arn, ModelApprovalStatus="Approved")
    where = dict(zip(("Bucket", "Key"), package.uri.removeprefix("s3://").split("/", 1), strict=True))
    assert ("artifact_version" in package.metadata) == versions
    chosen = Namespace(run=None, job=None, artifact=None, package="1")
    (tmp_path / "good").mkdir()
    assert source.find(account, chosen, tmp_path / "good").package == package.arn
    other = changed(artifact, tmp_path, "# swapped\n", honest=swap == "other content")
    body = other.read_bytes()
    if swap == "the same size":
        body = archive.read_bytes()[:-1] + bytes([archive.read_bytes()[-1] ^ 1])
    elif swap == "an archive that leads out":
        with tarfile.open(other, "w:gz") as tar:
            tar.add(archive, "../evil")
        body = other.read_bytes()
    elif swap == "text":
        body = b"text"
    calls.clear()
    s3.delete_object(**where) if swap == "gone" else s3.put_object(**where, Body=body)
    with pytest.raises(UserError) as error:
        run(package="1")
    assert "\n" not in str(error.value)
    assert "was written again after" in str(error.value)
    assert not calls.named("CreateModel", "CreateEndpoint")


@pytest.mark.parametrize("made", ["other content", "other code, the same model.json"])
def test_its_content_is_compared_where_the_package_names_no_object(
    calls: Recorder, tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    """As the SageMaker Pipeline registers: an execution knows what the artifact holds, not how S3 calls it."""
    monkeypatch.setattr(storage, "identity", lambda *_: {})
    package = put(run=SECOND)
    account = Account(settings())
    account.client("sagemaker").update_model_package(ModelPackageArn=package.arn, ModelApprovalStatus="Approved")
    other = changed(artifact, tmp_path, "# swapped\n", honest=made == "other content")
    bucket, key = package.uri.removeprefix("s3://").split("/", 1)
    boto3.client("s3").upload_file(str(other), bucket, key)
    message = "holds another artifact than the one" if made == "other content" else "does not match its checksum"
    calls.clear()
    with pytest.raises(UserError, match=message):
        run(package="1")
    assert not calls.named("CreateModel", "CreateEndpoint")


def test_what_lies_under_an_artifact_s_name_is_not_taken_for_it(calls: Recorder, archive: Path) -> None:
    account, s3 = Account(settings()), boto3.client("s3")
    uri = storage.artifact(account, archive)
    where = dict(zip(("Bucket", "Key"), uri.removeprefix("s3://").split("/", 1), strict=True))
    calls.clear()
    assert storage.artifact(account, archive) == uri
    assert not calls.named("PutObject")
    s3.put_object(**where, Body=bytes(archive.stat().st_size))  # the same size
    with pytest.raises(UserError, match="is not the artifact that its name says"):
        storage.artifact(account, archive)
