"""The model registry, read: the project's group of packages, and the one that a person names.

The champion is the newest approved package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines import project
from pipelines.cloud.account import Account, explained, pages, unless_missing
from pipelines.terminal import UserError

PENDING, APPROVED, REJECTED = "PendingManualApproval", "Approved", "Rejected"


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
    return project.name()


def package(facts: dict[str, Any]) -> Package:
    """From what AWS, or a local package.json, says."""
    uri = facts["InferenceSpecification"]["Containers"][0].get("ModelDataUrl", "")
    version, status = facts.get("ModelPackageVersion", 0), facts.get("ModelApprovalStatus", APPROVED)
    return Package(facts["ModelPackageArn"], version, status, uri, facts.get("CustomerMetadataProperties", {}))


def summaries(account: Account, status: str | None = None) -> list[dict[str, Any]]:
    """The group's packages, newest first; none when there is no group."""
    wanted = {"ModelPackageGroupName": group(), "SortBy": "CreationTime", "SortOrder": "Descending"}
    wanted |= {"ModelApprovalStatus": status} if status else {}
    with explained(f"listing the model packages of {group()}"):
        listed = pages(account.client("sagemaker"), "list_model_packages", "ModelPackageSummaryList", **wanted)
        return unless_missing(lambda: list(listed)) or []


def find(account: Account, wanted: str) -> Package:
    """The package that a person names: `champion`, a version number, or an ARN.

    Raises:
        UserError: when there is none.
    """
    if wanted == "champion":
        best = champion(account)
        if best is None:
            raise UserError(f"no package of {group()} is approved, so there is no champion; `make approve` makes one")
        return best
    if not wanted.startswith("arn:"):
        there = {str(item["ModelPackageVersion"]): item["ModelPackageArn"] for item in summaries(account)}
        if wanted not in there:
            raise UserError(f"{group()} has no package {wanted!r}; it has: {', '.join(there) or 'none'}")
        wanted = there[wanted]
    with explained(f"looking up the model package {wanted}"):
        return package(account.client("sagemaker").describe_model_package(ModelPackageName=wanted))


def newest(account: Account, status: str | None = None, identity: str = "") -> Package | None:
    """The newest package, with an approval status or of an artifact where one is given."""
    for item in summaries(account, status):
        if identity in item.get("ModelPackageDescription", ""):
            return find(account, item["ModelPackageArn"])
    return None


def champion(account: Account) -> Package | None:
    """The newest approved package."""
    return newest(account, APPROVED)
