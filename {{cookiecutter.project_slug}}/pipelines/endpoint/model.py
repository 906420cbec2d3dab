"""What serves: a model in SageMaker, its tags, and the fleet that the settings ask for."""

from __future__ import annotations

import os
from typing import Any

from pipelines.cloud.account import Account
from pipelines.config import Settings

# Bytes of a request that an endpoint's type takes, and of the server's seconds, where they are not the server's own:
# https://docs.aws.amazon.com/sagemaker/latest/dg/async-inference.html and serverless-endpoints.html
MOST_BYTES = {"realtime": 6 * 2**20, "serverless": 4 * 2**20, "async": 2**30}
LIMITS = {"serverless": {"INFERENCE_MAX_BYTES": str(MOST_BYTES["serverless"])},
          "async": {"INFERENCE_MAX_BYTES": str(MOST_BYTES["async"]), "INFERENCE_TIMEOUT": "890"}}  # fmt: skip


def fleet(settings: Settings) -> tuple[str, int, str]:
    """An endpoint's kind of use, as prices have it, and how many of which machine at most; or of its memory."""
    chosen = settings.endpoint
    if chosen.type == "serverless":
        return chosen.type, chosen.max_concurrency, f"Mem-{chosen.memory_mb // 1024}GB"
    kind = "async" if chosen.type == "async" else "hosting"
    return kind, max(chosen.instances, chosen.max_instances), chosen.instance_type


def create(account: Account, name: str, image: str, uri: str, package: str | None, kind: str = "realtime") -> None:
    """Create a model: of an image and an artifact, or of a package; its role writes nothing but answers."""
    from sagemaker.core import resources, shapes

    own = {name: value for name, value in sorted(os.environ.items()) if name.startswith("INFERENCE_")}
    variables = LIMITS.get(kind, {}) | own
    settings = account.settings
    model: dict[str, Any] = {"enable_network_isolation": True} if settings.compute.isolation else {}
    if settings.aws.subnets:
        network = {"subnets": settings.aws.subnets, "security_group_ids": settings.aws.security_groups}
        model["vpc_config"] = shapes.VpcConfig(**network)
    if package:
        model["containers"] = [shapes.ContainerDefinition(model_package_name=package, environment=variables)]
    else:
        container = shapes.ContainerDefinition(image=image, model_data_url=uri, environment=variables)
        model["primary_container"] = container
    resources.Model.create(
        model_name=name,
        execution_role_arn=account.stack().serving_role,
        tags=tags(account),
        session=account.session,
        region=account.region,
        **model,
    )


def tags(account: Account) -> list[Any]:
    """The project's tags as the SDK takes them."""
    from sagemaker.core.shapes import Tag

    return [Tag(key=tag["Key"], value=tag["Value"]) for tag in account.tags()]
