"""The registry keeps what packages were registered with, and their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

Clients = Callable[[str], Any]
NOTED = {"run": "r-1", "accuracy": "0.99"}


def test_an_approval_keeps_what_was_noted_and_numbers_are_given_once(account: object, client: Clients) -> None:
    registry = client("sagemaker")
    registry.create_model_package_group(ModelPackageGroupName="group", Tags=[{"Key": "project", "Value": "p"}])
    with pytest.raises(ClientError, match="already exists"):
        registry.create_model_package_group(ModelPackageGroupName="group")
    made = [
        registry.create_model_package(
            ModelPackageGroupName="group",
            CustomerMetadataProperties=NOTED,
            InferenceSpecification={
                "Containers": [{"Image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/i:1"}],
                "SupportedContentTypes": ["image/png"],
                "SupportedResponseMIMETypes": ["application/json"],
            },
        )["ModelPackageArn"]
        for _ in range(2)
    ]
    assert [arn.rpartition("/")[2] for arn in made] == ["1", "2"]
    registry.update_model_package(
        ModelPackageArn=made[1], ModelApprovalStatus="Approved", CustomerMetadataProperties={"by": "me"}
    )
    facts = registry.describe_model_package(ModelPackageName=made[1])
    assert facts["ModelApprovalStatus"] == "Approved"
    assert facts["CustomerMetadataProperties"] == NOTED | {"by": "me"}
    assert facts["InferenceSpecification"]["SupportedContentTypes"] == ["image/png"]
    listed = registry.list_model_packages(ModelPackageGroupName="group", ModelApprovalStatus="Approved")
    assert [item["ModelPackageArn"] for item in listed["ModelPackageSummaryList"]] == [made[1]]
    with pytest.raises(ClientError, match="still contains"):
        registry.delete_model_package_group(ModelPackageGroupName="group")
    registry.delete_model_package(ModelPackageName=made[1])
    third = registry.create_model_package(ModelPackageGroupName="group")["ModelPackageArn"]
    assert third.endswith("/3")
    for arn in (made[0], third):
        registry.delete_model_package(ModelPackageName=arn)
    registry.delete_model_package_group(ModelPackageGroupName="group")
    assert registry.list_model_package_groups()["ModelPackageGroupSummaryList"] == []
    with pytest.raises(ClientError, match="Could not find ModelPackage "):
        registry.describe_model_package(ModelPackageName=made[0])
