"""Put the project's images into the stack's ECR repository, when they are not there yet: `make image-push`.

    python -m pipelines image-push

An image's tag is a hash of all that goes into it, so a stale image is another one, which is built and pushed.
"""

from __future__ import annotations

import base64
import json
import subprocess
from typing import Any

from pipelines import terminal
from pipelines.cloud.account import Account, explained
from pipelines.config import load
from pipelines.local import engine, images
from pipelines.terminal import UserError
from training.config import GPU_INSTANCE

ARCHITECTURE = "amd64"  # of SageMaker's instances, but for Graviton
# Docker with containerd's store pushes other kinds of manifests, OCI's and indexes of several. SageMaker says
# "Unsupported manifest media type": https://github.com/aws/amazon-sagemaker-feedback/issues/180
TAKEN = "application/vnd.docker.distribution.manifest.v2+json"
# The names of the same bytes: https://github.com/opencontainers/image-spec/blob/main/media-types.md
SAME = {
    "application/vnd.oci.image.config.v1+json": "application/vnd.docker.container.image.v1+json",
    "application/vnd.oci.image.layer.v1.tar": "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip": "application/vnd.docker.image.rootfs.diff.tar.gzip",
}


def uri(account: Account, target: images.Target) -> str:
    """The image that SageMaker runs: in the stack's repository, or the one that the settings name."""
    name: str = getattr(account.settings.images, target)
    if name != "project":
        return name
    tag = images.image_name(account.settings, target, on_gpu(account, target)).rpartition(":")[2]
    return f"{account.stack().repository}:{tag}"


def on_gpu(account: Account, target: images.Target) -> bool:
    """Whether an image will compute on a GPU: by the type of instance of training, or of the endpoint."""
    settings = account.settings
    if target == "training":
        return bool(GPU_INSTANCE.match(settings.compute.instance_type))
    return settings.endpoint.type != "serverless" and bool(GPU_INSTANCE.match(settings.endpoint.instance_type))


def ensure(account: Account, target: images.Target) -> str:
    """The image's URI, after pushing it where it is the project's own and not in the repository."""
    image = uri(account, target)
    if getattr(account.settings.images, target) == "project" and not present(account, image):
        print(f"{image} is not in the repository, so it comes first (`make image-push`)", flush=True)
        push(account, target)
    return image


def present(account: Account, image: str) -> bool:
    """Whether an image is in its repository.

    Raises:
        UserError: when it is one that SageMaker does not take.
    """
    from botocore.exceptions import ClientError

    repository, tag = _place(image)
    with explained(f"looking for {image}"):
        try:
            described = account.client("ecr").describe_images(repositoryName=repository, imageIds=[{"imageTag": tag}])
        except ClientError as error:
            if error.response["Error"]["Code"] != "ImageNotFoundException":
                raise
            return False
    for kind in (details.get("imageManifestMediaType") for details in described["imageDetails"]):
        if not is_taken(kind):
            raise UserError(f"{image} has a manifest ({kind}) that SageMaker refuses; remove it and push again: "
                            f"{removal(account, repository, tag)} && make image-push")  # fmt: skip
    return True


def is_taken(kind: str | None) -> bool:
    """Whether SageMaker takes a manifest of this media type; where none is named it is Docker's own."""
    return (kind or TAKEN) == TAKEN


def removal(account: Account, repository: str, tag: str) -> str:
    """The command that removes an image: the verbs' own permissions do not."""
    where = f"--repository-name {repository} --region {account.region}"
    return f"aws ecr batch-delete-image {where} --image-ids imageTag={tag}"


def _place(image: str) -> tuple[str, str]:
    repository, _, tag = image.partition("/")[2].rpartition(":")
    return repository, tag


def _convert(account: Account, sent: str, remote: str) -> None:
    """Give the tag to an image in ECR as SageMaker takes it: the one of an index for its processors, in Docker's names.

    Layers and configuration are the same bytes, so nothing is sent again.
    """
    ecr, (repository, tag) = account.client("ecr"), _place(remote)

    def manifest(**identity: str) -> dict[str, Any]:
        found = ecr.batch_get_image(repositoryName=repository, imageIds=[identity])
        if not found["images"]:
            raise UserError(f"{identity} is not in {repository}: {found.get('failures')}")
        return dict(json.loads(found["images"][0]["imageManifest"]))

    with explained(f"making {remote} of {sent}"):
        image = manifest(imageTag=_place(sent)[1])
        if (listed := image.get("manifests")) is not None:
            ours = [item["digest"] for item in listed if item.get("platform", {}).get("architecture") == ARCHITECTURE]
            if len(ours) != 1:
                raise UserError(f"{sent} has {len(ours)} images for {ARCHITECTURE}, not one; build it again: "
                                "`make image`")  # fmt: skip
            image = manifest(imageDigest=ours[0])
        parts = [image["config"], *image["layers"]]
        kinds = [SAME.get(part["mediaType"], part["mediaType"]) for part in parts]
        if strange := sorted({*kinds} - {*SAME.values()}):
            raise UserError(f"{sent} holds {', '.join(strange)}, which Docker's manifest, the one that SageMaker "
                            "takes, has no name for; build it again, not compressed by zstd: `make image`")  # fmt: skip
        config, *layers = [{"mediaType": kind, "size": part["size"], "digest": part["digest"]}
                           for kind, part in zip(kinds, parts, strict=True)]  # fmt: skip
        text = json.dumps({"schemaVersion": 2, "mediaType": TAKEN, "config": config, "layers": layers}, indent=3)
        ecr.put_image(repositoryName=repository, imageManifest=text, imageManifestMediaType=TAKEN, imageTag=tag)


def push(account: Account, target: images.Target) -> None:
    """Build the image when it is missing here, and push it.

    Raises:
        UserError: without an engine, when it runs on other processors, or when repository or SageMaker do not take it.
    """
    try:
        engine.check()
        local = images.image_for(account.settings, target, ARCHITECTURE, on_gpu(account, target))
    except engine.EngineError as error:
        raise UserError(f"{error}. Or push from another machine: `make image-push`") from error
    facts = images.inspected(local)
    made = facts.get("Architecture")
    if made != ARCHITECTURE:
        raise UserError(
            f"{local} is built for {made or 'an unknown processor'}, SageMaker runs {ARCHITECTURE}; build it "
            f"again with `{terminal.command('image', ARGS=f'--platform linux/{ARCHITECTURE}')}`"
        )
    remote = sent = uri(account, target)
    if not is_taken(facts.get("Descriptor", {}).get("mediaType")):
        sent = f"{remote}-{facts['Id'].rpartition(':')[2][:12]}"  # a tag is for good: it must get the right manifest
    registry = remote.partition("/")[0]
    with explained("asking ECR for a password"):
        token = account.client("ecr").get_authorization_token()["authorizationData"][0]["authorizationToken"]
    user, _, password = base64.b64decode(token).decode().partition(":")
    try:
        _checked("login", "--username", user, "--password-stdin", registry, text=password)
        _checked("tag", local, sent)
        if subprocess.run(["docker", "push", sent]).returncode:
            raise UserError(f"{sent} was not pushed (see above); do it again: layers that are there are not sent again")
    finally:
        _docker("logout", registry)  # or the password would stay in ~/.docker
    if sent != remote:
        _convert(account, sent, remote)
    if not present(account, remote):
        raise UserError(f"{remote} was pushed and is not in the repository; do it again")


def _docker(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *words], input=text, capture_output=True, text=True)


def _checked(*words: str, text: str | None = None) -> None:
    done = _docker(*words, text=text)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"`docker {words[0]}` failed: {lines[-1]}")


def main() -> int:
    """Command line; see the module's docstring."""
    settings = load(terminal.parser("Put the project's images into ECR.", settings=True).parse_args().set)
    account = Account(settings)
    for target in images.TARGETS:
        image = uri(account, target)
        if getattr(settings.images, target) != "project":
            print(f"images.{target} is {image}, which is not the project's to push")
        elif present(account, image):
            print(f"{image} is there already")
        else:
            push(account, target)
    return 0
