"""Put the project's images into the stack's ECR repository, when they are not there yet: `make image-push`.

    python -m pipelines image-push

An image's tag is a hash of all that goes into it, so a stale image is another one, which is built and pushed.
"""

from __future__ import annotations

import base64
import json
import subprocess

from pipelines import terminal
from pipelines.cloud.account import Account, explained
from pipelines.config import load
from pipelines.local import engine, images
from pipelines.terminal import UserError

ARCHITECTURE = "amd64"  # of SageMaker's instances, but for Graviton


def uri(account: Account, target: images.Target) -> str:
    """The image that SageMaker runs: in the stack's repository, or the one that the settings name."""
    name: str = getattr(account.settings.images, target)
    if name != "project":
        return name
    return f"{account.stack().repository}:{images.image_name(account.settings, target).rpartition(':')[2]}"


def ensure(account: Account, target: images.Target) -> str:
    """The image's URI, after pushing it where it is the project's own and not in the repository."""
    image = uri(account, target)
    if getattr(account.settings.images, target) == "project" and not present(account, image):
        print(f"{image} is not in the repository, so it comes first (`make image-push`)", flush=True)
        push(account, target)
    return image


def present(account: Account, image: str) -> bool:
    """Whether an image is in its repository."""
    from botocore.exceptions import ClientError

    repository, _, tag = image.partition("/")[2].rpartition(":")
    with explained(f"looking for {image}"):
        try:
            account.client("ecr").describe_images(repositoryName=repository, imageIds=[{"imageTag": tag}])
        except ClientError as error:
            if error.response["Error"]["Code"] != "ImageNotFoundException":
                raise
            return False
    return True


def push(account: Account, target: images.Target) -> None:
    """Build the image when it is missing here, and push it.

    Raises:
        UserError: without an engine, when it runs on other processors, or when the repository does not take it.
    """
    try:
        engine.check()
        local = images.image_for(account.settings, target, ARCHITECTURE)
    except engine.EngineError as error:
        raise UserError(f"{error}. Or push from another machine: `make image-push`") from error
    facts = json.loads(_docker("image", "inspect", local).stdout or "[{}]")
    made = facts[0].get("Architecture")
    if made != ARCHITECTURE:
        raise UserError(
            f"{local} is built for {made or 'an unknown processor'}, SageMaker runs {ARCHITECTURE}; build it "
            f"again with `{terminal.command('image', ARGS=f'--platform linux/{ARCHITECTURE}')}`"
        )
    remote = uri(account, target)
    registry = remote.partition("/")[0]
    with explained("asking ECR for a password"):
        token = account.client("ecr").get_authorization_token()["authorizationData"][0]["authorizationToken"]
    user, _, password = base64.b64decode(token).decode().partition(":")
    try:
        _checked("login", "--username", user, "--password-stdin", registry, text=password)
        _checked("tag", local, remote)
        if subprocess.run(["docker", "push", remote]).returncode:
            raise UserError(
                f"{remote} was not pushed (see above); do it again: layers that are there are not sent again"
            )
    finally:
        _docker("logout", registry)  # or the password would stay in ~/.docker


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
    targets: tuple[images.Target, ...] = ("training", "serving")
    for target in targets:
        image = uri(account, target)
        if getattr(settings.images, target) != "project":
            print(f"images.{target} is {image}, which is not the project's to push")
        elif present(account, image):
            print(f"{image} is there already")
        else:
            push(account, target)
    return 0
