"""Remove the project's stack: `make bootstrap-destroy`. Data, images and registry stay without ALL=1.

    python -m pipelines bootstrap-destroy --yes
    python -m pipelines bootstrap-destroy --all --confirm image-classifier

Refuses while the project has endpoints or running jobs: they need the stack's roles.
"""

from __future__ import annotations

import sys

from pipelines import project, terminal
from pipelines.cloud import inventory, stack
from pipelines.cloud import packages as cloud_packages
from pipelines.cloud.account import Account, ask, confirm, explained, unless_missing
from pipelines.config import load
from pipelines.terminal import UserError


def destroy(account: Account, everything: bool, confirmed: str, yes: bool) -> None:
    """Remove the stack, and with `everything` also data and images; see the module's docstring."""
    name = project.name()
    with explained(f"removing the stack {name}"):
        running = [f"{item.kind} {item.name}" for item in inventory.everything(account) if item.bills]
        if running:
            raise UserError(
                f"still there: {', '.join(running)}; remove endpoints with `make destroy` and stop or await jobs first"
            )
        cloud = account.client("cloudformation")
        number = account.client("sts").get_caller_identity()["Account"]
        bucket, found = stack.bucket_name(account.settings, number), stack.find(cloud, name)
        where = f"in {account.region}, account {number}"
        if found is None and not everything:
            print(f"there is no stack {name} {where}; ALL=1 deletes bucket and repository, should they be left")
            return
        kept = f"bucket {bucket} and repository {name}, with all that is in them"
        plan = f"removes the stack {name} {where}: roles, notifications" + (
            f";\nDELETES the {kept}; and the pipeline and the model registry {name}" if everything else ""
        )
        plan += "" if everything else f";\nkeeps the {kept}: the next `make bootstrap` takes them back"
        if everything:
            _typed(plan, name, confirmed)
        else:
            confirm(plan, yes)
        if found is not None:
            stack.remove(cloud, found["StackId"])
        if everything:
            _delete_pipeline(account, name)
            _delete_bucket(account, bucket, number)
            _delete_repository(account, name, number)
            _delete_registry(account, name)


def _typed(plan: str, name: str, confirmed: str) -> None:
    """Go on only when somebody has typed the project's name: YES=1 is not enough to lose data."""
    print(plan, flush=True)
    if not confirmed and sys.stdin.isatty():
        confirmed = ask(f"type {name} to delete it:")
    if confirmed != name:
        raise UserError(f"nothing was deleted: {confirmed!r} is not the project's name; say CONFIRM={name}")


def _delete_pipeline(account: Account, name: str) -> None:
    if unless_missing(account.client("sagemaker").delete_pipeline, PipelineName=name) is not None:
        print(f"deleted the pipeline {name}")


def _delete_bucket(account: Account, bucket: str, number: str) -> None:
    s3, owner, deleted = account.client("s3"), {"Bucket": bucket, "ExpectedBucketOwner": number}, 0
    # A page has at most 1000, which is what one request can delete.
    while (page := unless_missing(s3.list_object_versions, **owner)) is not None:
        versions = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
        batch = [{"Key": version["Key"], "VersionId": version["VersionId"]} for version in versions]
        if not batch:
            unless_missing(s3.delete_bucket, **owner)
            print(f"deleted the bucket {bucket}")
            return
        answer = s3.delete_objects(**owner, Delete={"Objects": batch, "Quiet": True})
        for error in answer.get("Errors", []):
            raise UserError(f"{error['Key']} in {bucket} cannot be deleted: {error['Message']} ({error['Code']})")
        deleted += len(batch)
        print(f"deleting objects: {deleted}", flush=True)


def _delete_repository(account: Account, name: str, number: str) -> None:
    delete = account.client("ecr").delete_repository
    if unless_missing(delete, registryId=number, repositoryName=name, force=True) is not None:
        print(f"deleted the repository {name}")


def _delete_registry(account: Account, name: str) -> None:
    sagemaker, group = account.client("sagemaker"), {"ModelPackageGroupName": name}
    if unless_missing(sagemaker.describe_model_package_group, **group) is None:
        return
    packages = cloud_packages.summaries(account)
    for package in packages:
        sagemaker.delete_model_package(ModelPackageName=package["ModelPackageArn"])
    sagemaker.delete_model_package_group(**group)
    print(f"deleted the model registry {name} with {len(packages)} packages")


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Remove the project's stack; data and images stay, unless --all.", settings=True)
    parser.add_argument("--all", action="store_true", help="delete data and images too")
    parser.add_argument("--confirm", default="", metavar="NAME", help="with --all: the project's name, typed")
    parser.add_argument("--yes", action="store_true", help="do not ask; with --all it asks all the same")
    options = parser.parse_args()
    destroy(Account(load(options.set)), options.all, options.confirm, options.yes)
    return 0


if __name__ == "__main__":
    terminal.run_verb(main)
