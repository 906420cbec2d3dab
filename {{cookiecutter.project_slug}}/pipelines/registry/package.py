"""The model registry: what a package says, the project's group in SageMaker, and its local twin.

`description` is written once and either sent (`register`) or kept in `artifacts/registry/<group>/<version>`
(`register_local`). The champion is the newest approved package. boto3, not SDK V3: `ModelPackage.create` of 3.27
drops the content types.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import aws, engine, runs
from pipelines.config import Settings
from pipelines.console import UserError

PENDING, APPROVED, REJECTED = "PendingManualApproval", "Approved", "Rejected"


@dataclass(frozen=True)
class Evidence:
    """What is known of an artifact.

    Attributes:
        identity: hash of its model.json, which has the hashes of all other files.
        run: what made it.
        model: its model.json.
        facts: run.json; empty when there is none.
        evaluation: evaluation.json.
        files: to attach, by name, with their SHA-256.
    """

    identity: str
    run: str
    model: dict[str, Any]
    facts: dict[str, Any]
    evaluation: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class Package:
    """A version of the model."""

    arn: str
    version: int
    status: str
    uri: str
    metadata: dict[str, str]

    @property
    def accuracy(self) -> float:
        """On the test split of its own data; 0 when it was registered by something else, which did not say."""
        return float(self.metadata.get("accuracy", 0.0))

    def __str__(self) -> str:
        known = (key for key in ("run", "accuracy", "accuracy_low", "accuracy_high") if key in self.metadata)
        return f"{'/'.join(self.arn.split('/')[-2:])} ({', '.join(f'{key} {self.metadata[key]}' for key in known)})"


def group() -> str:
    """The project's group of model packages."""
    return engine.project_name()


def package(facts: dict[str, Any]) -> Package:
    """From what AWS, or a local package.json, says."""
    uri = facts["InferenceSpecification"]["Containers"][0].get("ModelDataUrl", "")
    version, status = facts.get("ModelPackageVersion", 0), facts.get("ModelApprovalStatus", APPROVED)
    return Package(facts["ModelPackageArn"], version, status, uri, facts.get("CustomerMetadataProperties", {}))


def description(evidence: Evidence, image: str, uri: str, place: str) -> dict[str, Any]:
    """The request that registers an artifact.

    Args:
        evidence: of the artifact.
        image: that serves it.
        uri: of the artifact.
        place: where the evidence's files lie.
    """
    from payload import IMAGE_TYPES, JSON_TYPE, NPY_TYPE

    accuracy, model = evidence.evaluation["metrics"]["accuracy"], evidence.model
    files = {
        name: {"ContentType": "text/html" if name.endswith(".html") else JSON_TYPE,
               "ContentDigest": f"sha256:{digest}", "S3Uri": f"{place}/{name}"}
        for name, digest in evidence.files.items()
    }  # fmt: skip
    metadata = {
        "run": evidence.run, "git_commit": model["git_commit"], "dataset_fingerprint": model["dataset_fingerprint"],
        "artifact": evidence.identity, "accuracy": f"{accuracy['value']:.6f}",
        "accuracy_low": f"{accuracy['ci_low']:.6f}", "accuracy_high": f"{accuracy['ci_high']:.6f}",
        "test_images": evidence.evaluation["images"], "report": files.get("report.html", {}).get("S3Uri"),
    }  # fmt: skip
    quality = {"Statistics": files["evaluation.json"]}
    made = {"CommitId": model["git_commit"], "GeneratedBy": evidence.facts.get("job") or evidence.run}
    return {
        "ModelPackageGroupName": group(),
        "ModelPackageDescription": f"{evidence.run}, accuracy {accuracy['value']:.4f}, artifact {evidence.identity}",
        "ModelApprovalStatus": PENDING,
        "InferenceSpecification": {  # instance types may be left out, and then any will do
            "Containers": [{"Image": image, "ModelDataUrl": uri}],
            "SupportedContentTypes": [*IMAGE_TYPES, JSON_TYPE, NPY_TYPE],
            "SupportedResponseMIMETypes": [JSON_TYPE],
        },
        "ModelMetrics": {"ModelQuality": quality},
        "DriftCheckBaselines": {"ModelQuality": quality, "ModelDataQuality": {"Statistics": files["baseline.json"]}},
        "ModelCard": {"ModelCardStatus": "Draft", "ModelCardContent": json.dumps(card(evidence, image, uri))},
        "CustomerMetadataProperties": {key: str(value) for key, value in metadata.items() if value},
        "MetadataProperties": {key: value for key, value in made.items() if value},
        "Domain": "COMPUTER_VISION",
        "Task": "IMAGE_CLASSIFICATION",
    }


def card(evidence: Evidence, image: str, uri: str) -> dict[str, Any]:
    """The content of the model card, by the schema of cards of packages; a draft for people to go on with."""
    model, facts, tested = evidence.model, evidence.facts, evidence.evaluation
    purpose = f"Tells which of these classes an image shows: {', '.join(model['classes'])}"
    data = [f"{facts.get('data', 'data set')}, fingerprint {model['dataset_fingerprint']}"]
    settled = list(facts.get("hyperparameters", {}).items())[:100]  # AWS takes no more
    metrics = [
        {"name": name, "type": "number", "value": metric["value"]}
        | ({"notes": f"95 % interval {metric['ci_low']:.6f} to {metric['ci_high']:.6f}"} if "ci_low" in metric else {})
        for name, metric in tested["metrics"].items()
    ]
    job = {
        "training_datasets": data, "training_environment": {"container_image": [facts.get("image") or image]},
        "user_provided_hyper_parameters": [{"name": name, "value": str(value)[:255]} for name, value in settled],
    }  # fmt: skip
    trained = f"{model['architecture']} at {model['image_size']} pixels, torch {model['torch_version']}"
    return {
        "model_overview": {"model_creator": group(), "model_artifact": [uri]},
        "intended_uses": {
            "purpose_of_model": purpose[:2048],
            "intended_uses": "Images like those of its training data. It has no answer 'none of these'.",
        },
        "training_details": {"training_observations": f"{trained}, run {evidence.run}", "training_job_details": job},
        "evaluation_details": [{
            "name": "test split", "datasets": data,
            "evaluation_observation": f"{tested['images']} images that training did not see",
            "metric_groups": [{"name": "classification", "metric_data": metrics}],
        }],
    }  # fmt: skip


def summaries(settings: Settings, status: str | None = None) -> list[dict[str, Any]]:
    """The group's packages, newest first; none when there is no group."""
    wanted = {"ModelPackageGroupName": group(), "SortBy": "CreationTime", "SortOrder": "Descending"}
    wanted |= {"ModelApprovalStatus": status} if status else {}
    sagemaker = aws.client(settings, "sagemaker")
    with aws.explained(f"listing the model packages of {group()}"):
        listed = aws.pages(sagemaker, "list_model_packages", "ModelPackageSummaryList", **wanted)
        return aws.unless_missing(lambda: list(listed)) or []


def find(settings: Settings, wanted: str) -> Package:
    """The package that a person names: `champion`, a version number, or an ARN.

    Raises:
        UserError: when there is none.
    """
    if wanted == "champion":
        best = champion(settings)
        if best is None:
            raise UserError(f"no package of {group()} is approved, so there is no champion; `make approve` makes one")
        return best
    if not wanted.startswith("arn:"):
        there = {str(item["ModelPackageVersion"]): item["ModelPackageArn"] for item in summaries(settings)}
        if wanted not in there:
            raise UserError(f"{group()} has no package {wanted!r}; it has: {', '.join(there) or 'none'}")
        wanted = there[wanted]
    with aws.explained(f"looking up the model package {wanted}"):
        return package(aws.client(settings, "sagemaker").describe_model_package(ModelPackageName=wanted))


def newest(settings: Settings, status: str | None = None, identity: str = "") -> Package | None:
    """The newest package, with an approval status or of an artifact where one is given."""
    for item in summaries(settings, status):
        if identity in item.get("ModelPackageDescription", ""):
            return find(settings, item["ModelPackageArn"])
    return None


def champion(settings: Settings) -> Package | None:
    """The newest approved package."""
    return newest(settings, APPROVED)


def make_group(settings: Settings) -> None:
    """Make the project's group when it is missing; a package has the tags of its group."""
    sagemaker = aws.client(settings, "sagemaker")
    with aws.explained(f"registering in {group()}"):
        if aws.unless_missing(sagemaker.describe_model_package_group, ModelPackageGroupName=group()) is None:
            sagemaker.create_model_package_group(
                ModelPackageGroupName=group(), ModelPackageGroupDescription="Image classifiers of one project",
                Tags=aws.tags(settings),
            )  # fmt: skip


def register(settings: Settings, request: dict[str, Any]) -> Package:
    """Create a package, and the group when it is missing."""
    make_group(settings)
    with aws.explained(f"registering in {group()}"):
        made = aws.client(settings, "sagemaker").create_model_package(**request)
    return find(settings, made["ModelPackageArn"])


def local() -> list[Package]:
    """What is in the local registry, oldest first."""
    files = (runs.ARTIFACTS / "registry" / group()).glob("[0-9]*/package.json")
    there = [package(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return sorted(there, key=lambda known: known.version)


def register_local(evidence: Evidence, image: str, archive: Path, files: Path, status: str = PENDING) -> Path:
    """Copy an artifact and its evidence into the local registry; gives the version's folder, the first one's if any."""
    home, there = runs.ARTIFACTS / "registry" / group(), local()
    for known in there:
        if known.metadata["artifact"] == evidence.identity:
            return home / str(known.version)
    version = there[-1].version + 1 if there else 1
    folder, partial = home / str(version), home / f".{version}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copyfile(archive, partial / "model.tar.gz")
    for name in evidence.files:
        shutil.copyfile(files / name, partial / name)
    said = description(evidence, image, str(folder / "model.tar.gz"), str(folder))
    own = {
        "ModelPackageArn": f"local/{group()}/{version}",
        "ModelPackageVersion": version,
        "ModelApprovalStatus": status,
    }
    (partial / "package.json").write_text(json.dumps(said | own, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)
    return folder
