"""The model registry: groups, and packages with versions in them.

https://docs.aws.amazon.com/sagemaker/latest/dg/model-registry.html
"""

from __future__ import annotations

from typing import Any

from rehearsal.operations import Account, Answer, Request, missing, now, operation, page, refuse

GROUP, PACKAGE = "ModelPackageGroup", "ModelPackage"
SUMMARY = {  # what lists say of each
    GROUP: ("ModelPackageGroupName", "ModelPackageGroupArn", "ModelPackageGroupDescription", "CreationTime",
            "ModelPackageGroupStatus"),
    PACKAGE: ("ModelPackageName", "ModelPackageGroupName", "ModelPackageVersion", "ModelPackageArn", "CreationTime",
              "ModelPackageDescription", "ModelPackageStatus", "ModelApprovalStatus"),
}  # fmt: skip
TEXTS = ("ModelApprovalStatus", "ApprovalDescription", "SourceUri", "InferenceSpecification", "ModelCard")


def _short(name: str) -> str:
    """A name, of an ARN too: `group/3` of a version."""
    return name.partition("/")[2] if name.startswith("arn:") else name


def _found(account: Account, kind: str, name: str) -> dict[str, Any]:
    found = account.things.setdefault(kind, {}).get(_short(name))
    if found is None:
        raise missing(f"{kind} {name}")
    return found


def _listed(kind: str, request: Request, things: list[dict[str, Any]]) -> Answer:
    late = request.get("SortOrder", "Descending" if kind == GROUP else "Ascending") == "Descending"
    things = [item for item in things if request.get("NameContains", "") in item.get(f"{kind}Name", "")]
    things = [
        item for item in things
        if request.get("ModelApprovalStatus", item.get("ModelApprovalStatus")) == item.get("ModelApprovalStatus")
    ]  # fmt: skip
    things.sort(key=lambda item: (item["CreationTime"], item.get("ModelPackageVersion", 0)), reverse=late)
    rows = [{key: item[key] for key in SUMMARY[kind] if key in item} for item in things]
    return page(rows, request, f"{kind}SummaryList", 10 if kind == GROUP else 100)


@operation("sagemaker", "CreateModelPackageGroup")
def create_group(account: Account, request: Request) -> Answer:
    """A group, whose versions begin at 1."""
    name, groups = request["ModelPackageGroupName"], account.things.setdefault(GROUP, {})
    arn = account.arn("model-package-group", name)
    if name in groups:
        raise refuse("ValidationException", f"Model Package Group already exists: {arn}")
    account.tags[arn] = [*request.get("Tags", [])]
    groups[name] = {key: value for key, value in request.items() if key != "Tags"} | {
        "ModelPackageGroupArn": arn, "CreationTime": now(), "CreatedBy": {}, "ModelPackageGroupStatus": "Completed",
        "_versions": 0,
    }  # fmt: skip
    return {"ModelPackageGroupArn": arn}


@operation("sagemaker", "DescribeModelPackageGroup")
def describe_group(account: Account, request: Request) -> Answer:
    """One of them."""
    return {k: v for k, v in _found(account, GROUP, request["ModelPackageGroupName"]).items() if not k.startswith("_")}


@operation("sagemaker", "ListModelPackageGroups")
def list_groups(account: Account, request: Request) -> Answer:
    """All of them."""
    return _listed(GROUP, request, [*account.things.get(GROUP, {}).values()])


@operation("sagemaker", "DeleteModelPackageGroup")
def delete_group(account: Account, request: Request) -> Answer:
    """An empty one; `rules` look whether it is."""
    group = _found(account, GROUP, request["ModelPackageGroupName"])
    del account.things[GROUP][group["ModelPackageGroupName"]]
    account.tags.pop(group["ModelPackageGroupArn"], None)
    return {}


@operation("sagemaker", "CreateModelPackage")
def create(account: Account, request: Request) -> Answer:
    """A version of a group, or a package with a name of its own."""
    facts = {key: value for key, value in request.items() if key not in ("Tags", "ClientToken")}
    facts |= {"CreationTime": now(), "ModelPackageStatus": "Completed"}
    facts["ModelPackageStatusDetails"] = {"ValidationStatuses": []}
    with account.lock:
        if name := request.get("ModelPackageGroupName"):
            group = _found(account, GROUP, name)
            group["_versions"] += 1
            short = f"{group['ModelPackageGroupName']}/{group['_versions']}"
            facts |= {"ModelPackageVersion": group["_versions"], "ModelPackageGroupName": short.partition("/")[0]}
            facts.setdefault("ModelApprovalStatus", "PendingManualApproval")
        else:
            short = request["ModelPackageName"]
        packages = account.things.setdefault(PACKAGE, {})
        arn = account.arn("model-package", short)
        if short in packages:
            raise refuse("ValidationException", f"Model Package already exists: {arn}")
        packages[short] = facts | {"ModelPackageArn": arn}
        account.tags[arn] = [*request.get("Tags", [])]
    return {"ModelPackageArn": arn}


@operation("sagemaker", "DescribeModelPackage")
def describe(account: Account, request: Request) -> Answer:
    """One of them, with all that it was registered with."""
    return {"ModelPackageName": "", **_found(account, PACKAGE, request["ModelPackageName"])}


@operation("sagemaker", "ListModelPackages")
def list_packages(account: Account, request: Request) -> Answer:
    """Those of a group, or, where none is named, those without one unless others are asked for."""
    group, kind = request.get("ModelPackageGroupName"), request.get("ModelPackageType", "Unversioned")
    packages = account.things.get(PACKAGE, {}).values()
    if group:
        group = _found(account, GROUP, group)["ModelPackageGroupName"]
        return _listed(PACKAGE, request, [item for item in packages if item.get("ModelPackageGroupName") == group])
    wanted = [item for item in packages if kind in ("Both", "Versioned" if "ModelPackageVersion" in item else
                                                    "Unversioned")]  # fmt: skip
    return _listed(PACKAGE, request, wanted)


@operation("sagemaker", "UpdateModelPackage")
def update(account: Account, request: Request) -> Answer:
    """Its approval, or what was noted with it."""
    package = _found(account, PACKAGE, request["ModelPackageArn"])
    package |= {key: request[key] for key in TEXTS if key in request} | {"LastModifiedTime": now()}
    noted = package.get("CustomerMetadataProperties", {}) | request.get("CustomerMetadataProperties", {})
    gone = request.get("CustomerMetadataPropertiesToRemove", [])
    package["CustomerMetadataProperties"] = {key: value for key, value in noted.items() if key not in gone}
    return {"ModelPackageArn": package["ModelPackageArn"]}


@operation("sagemaker", "DeleteModelPackage")
def delete(account: Account, request: Request) -> Answer:
    """One of them; its number is not given again."""
    package = _found(account, PACKAGE, request["ModelPackageName"])
    del account.things[PACKAGE][_short(package["ModelPackageArn"])]
    account.tags.pop(package["ModelPackageArn"], None)
    return {}
