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

from pipelines import runs
from pipelines.cloud import packages
from pipelines.cloud.account import Account, explained, unless_missing


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


def description(
    evidence: Evidence, image: str, uri: str, place: str, stored: dict[str, str] | None = None
) -> dict[str, Any]:
    """The request that registers an artifact.

    Args:
        evidence: of the artifact.
        image: that serves it.
        uri: of the artifact.
        place: where the evidence's files lie.
        stored: what tells the object at `uri` from any that is put in its place.
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
    } | (stored or {})  # fmt: skip
    quality = {"Statistics": files["evaluation.json"]}
    made = {"CommitId": model["git_commit"], "GeneratedBy": evidence.facts.get("job") or evidence.run}
    return {
        "ModelPackageGroupName": packages.group(),
        "ModelPackageDescription": f"{evidence.run}, accuracy {accuracy['value']:.4f}, artifact {evidence.identity}",
        "ModelApprovalStatus": packages.PENDING,
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
        "model_overview": {"model_creator": packages.group(), "model_artifact": [uri]},
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


def make_group(account: Account) -> None:
    """Make the project's group when it is missing; a package has the tags of its group."""
    sagemaker = account.client("sagemaker")
    with explained(f"registering in {packages.group()}"):
        if unless_missing(sagemaker.describe_model_package_group, ModelPackageGroupName=packages.group()) is None:
            sagemaker.create_model_package_group(
                ModelPackageGroupName=packages.group(), ModelPackageGroupDescription="Image classifiers of one project",
                Tags=account.tags(),
            )  # fmt: skip


def register(account: Account, request: dict[str, Any]) -> packages.Package:
    """Create a package, and the group when it is missing."""
    make_group(account)
    with explained(f"registering in {packages.group()}"):
        made = account.client("sagemaker").create_model_package(**request)
    return packages.find(account, made["ModelPackageArn"])


def local() -> list[packages.Package]:
    """What is in the local registry, oldest first."""
    files = (runs.ARTIFACTS / "registry" / packages.group()).glob("[0-9]*/package.json")
    there = [packages.package(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return sorted(there, key=lambda known: known.version)


def register_local(evidence: Evidence, image: str, archive: Path, files: Path, status: str = packages.PENDING) -> Path:
    """Copy an artifact and its evidence into the local registry; gives the version's folder, the first one's if any."""
    home, there = runs.ARTIFACTS / "registry" / packages.group(), local()
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
        "ModelPackageArn": f"local/{packages.group()}/{version}",
        "ModelPackageVersion": version,
        "ModelApprovalStatus": status,
    }
    (partial / "package.json").write_text(json.dumps(said | own, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)
    return folder
