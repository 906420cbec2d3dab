"""Images as SageMaker takes them: it refuses an index, as Docker's containerd store pushes it.

https://github.com/aws/amazon-sagemaker-feedback/issues/180; the manifests that ECR takes are more:
https://docs.aws.amazon.com/AmazonECR/latest/userguide/image-manifest-formats.html
"""

from __future__ import annotations

from collections.abc import Iterator

from botocore.exceptions import ClientError

from rehearsal import docker
from rehearsal.operations import Account, Request
from rehearsal.rules import rule

TAKEN = ("application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json")


@rule("https://github.com/aws/amazon-sagemaker-feedback/issues/180", "CreateModel", "CreateTrainingJob",
      "CreateProcessingJob", "CreateHyperParameterTuningJob")  # fmt: skip
def manifests(account: Account, asked: Request) -> Iterator[str]:
    """Each image is there, and one image."""
    definition = asked.get("TrainingJobDefinition") or asked
    containers = [asked.get("PrimaryContainer") or {}, *asked.get("Containers", [])]
    images = [container.get("Image") for container in containers]
    images += [definition.get("AlgorithmSpecification", {}).get("TrainingImage"),
               asked.get("AppSpecification", {}).get("ImageUri")]  # fmt: skip
    for image in filter(None, images):
        place = docker.ECR.fullmatch(image)
        if place is None:
            continue
        identity = {"imageDigest": place["digest"]} if place["digest"] else {"imageTag": place["tag"] or "latest"}
        try:
            found = account.client("ecr").describe_images(repositoryName=place["name"], imageIds=[identity])
        except ClientError as error:
            yield f"Requested image {image} not found: {error.response['Error']['Message']}"
            continue
        kind = found["imageDetails"][0].get("imageManifestMediaType") or TAKEN[0]
        if kind not in TAKEN:
            yield f"Unsupported manifest media type {kind} for image {image}."
