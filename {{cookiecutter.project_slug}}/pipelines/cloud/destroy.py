"""Remove what costs by the hour: endpoints and all that belongs to them, jobs, warm pools: `make destroy`.

    python -m pipelines destroy --yes
    python -m pipelines destroy --endpoint image-classifier-old
    make destroy ALL=1 CONFIRM=image-classifier           # then the stack, data, images and the registry
    make destroy ARGS=--stack                             # then the stack; `make bootstrap` takes the rest back

It shows the list and asks, then looks again until nothing that bills is left. ALL=1 wants the project's name typed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from pipelines import project, terminal
from pipelines.cloud import inventory, stack
from pipelines.cloud import packages as cloud_packages
from pipelines.cloud.account import Account, ask, confirm, explained, unless_missing, until
from pipelines.cloud.errors import REASONS, missing
from pipelines.cloud.inventory import Item
from pipelines.config import load
from pipelines.terminal import UserError

PAUSE = 10.0  # seconds between two looks
PATIENCE = 20 * 60.0  # seconds; a job may take minutes to stop, an endpoint as many to go
LEAVING = ("Stopping", "Deleting")
DENIED = "not allowed: `make doctor` shows what is missing"


def destroy(account: Account, endpoint: str | None, yes: bool) -> None:
    """Remove what bills, then what only belonged to it; see the module's docstring.

    Raises:
        UserError: with what is left, and why.
    """
    found = chosen(inventory.everything(account), endpoint)
    where = f"{endpoint or project.name()} in {account.region}"
    if not found:
        print(f"there is nothing of {where} to remove")
        return
    confirm("\n".join([f"removes of {where}, keeping data, images and results:", *inventory.table(found)]), yes)
    names = {_key(item) for item in found} if endpoint else None
    scaling = [item for item in found if item.kind == "autoscaling"]
    kept = _remove(account, scaling)  # first, or it would start instances meanwhile
    refused, left = _until_gone(account, names, found)
    if not left:  # the schedule that ends an endpoint outlives it, and so does its config, which says what it costs
        rest = [item for item in found if not item.bills and (item not in scaling or _key(item) in kept)]
        refused = _remove(account, rest)
        left = [item for item in rest if _key(item) in refused]
    if left:
        reasons = [f"{item.kind} {item.name}{refused.get(_key(item), '')}" for item in left]
        raise UserError(f"still there: {'; '.join(reasons)}. Do it again, or see `make status`")
    print("nothing is left that costs by the hour")


def chosen(items: list[Item], endpoint: str | None) -> list[Item]:
    """All, or one endpoint with what belongs to it.

    Raises:
        UserError: when the project has no such endpoint, and nothing is left of one.
    """
    if endpoint is None:
        return items
    mine = next((item for item in items if item.kind == "endpoint" and item.name == endpoint), None)
    alone = [item for item in items if item.of == endpoint]  # when it has deleted itself
    if mine is None and alone:
        return alone
    if mine is None:
        there = ", ".join(item.name for item in items if item.kind == "endpoint") or "none"
        raise UserError(f"the project has no endpoint {endpoint}; it has: {there}")
    used = {name for name in mine.uses if name.startswith(endpoint)}  # another one may share a model of another name
    parts = ("endpoint config", "model")
    return [item for item in items if item is mine or item.of == endpoint or (item.kind in parts and item.name in used)]


def _key(item: Item) -> tuple[str, str]:
    return item.kind, item.name


def _until_gone(
    account: Account, names: set[tuple[str, str]] | None, found: list[Item]
) -> tuple[dict[tuple[str, str], str], list[Item]]:
    """Ask for removal and look again until nothing bills, all is refused for good, or patience ends."""
    left = [item for item in found if item.bills]
    refused: dict[tuple[str, str], str] = {}
    deadline = time.monotonic() + PATIENCE

    def look(say: Callable[[str], None]) -> tuple[bool | None, str]:
        nonlocal refused, left
        refused = _remove(account, [item for item in left if not item.detail.endswith(LEAVING)], say)
        left = [item for item in inventory.everything(account) if item.bills and (names is None or _key(item) in names)]
        if all(DENIED in refused.get(_key(item), "") for item in left):
            return True, ""
        over = time.monotonic() > deadline or None
        return over, f"waiting for {', '.join(f'{item.kind} {item.name}' for item in left)}"

    if left:
        until("AWS to remove that", PAUSE, look)
    return refused, left


def _remove(account: Account, items: list[Item], say: Callable[[str], None] = print) -> dict[tuple[str, str], str]:
    """Ask for the removal of each; returns why AWS refused, where it did: what is there then shows the next look."""
    from botocore.exceptions import ClientError

    refused = {}
    for item in items:
        service, operation, parameters = item.removal
        with explained(f"removing {item.kind} {item.name}"):
            try:
                getattr(account.client(service), operation)(**parameters)
                say(f"removing {item.kind} {item.name}")
            except ClientError as error:
                details = error.response["Error"]
                if missing(error) or details["Code"] == "ObjectNotFoundException":
                    continue
                denied = f", {DENIED}" if details["Code"] in REASONS["denied"] else ""
                refused[_key(item)] = f" ({' '.join(details['Message'].split())}{denied})"
    return refused


def destroy_stack(account: Account, everything: bool, confirmed: str, yes: bool) -> None:
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
    parser = terminal.parser("Remove what costs by the hour; more only when told to.", settings=True)
    parser.add_argument(
        "--endpoint", variable="ENDPOINT", help="only this one, and what belongs to it (default: all of the project)"
    )
    parser.add_argument("--all", variable="ALL", action="store_true", help="then the stack, data, images and registry")
    parser.add_argument("--stack", action="store_true", help="then the stack; data, images and registry stay")
    parser.add_argument(
        "--confirm", variable="CONFIRM", default="", metavar="NAME", help="with --all: the project's name, typed"
    )
    parser.add_argument("--yes", variable="YES", action="store_true", help="do not ask; --all asks all the same")
    options = parser.parse_args()
    account = Account(load(options.set))
    destroy(account, options.endpoint, options.yes)
    if options.all or options.stack:
        destroy_stack(account, options.all, options.confirm, options.yes)
    return 0
