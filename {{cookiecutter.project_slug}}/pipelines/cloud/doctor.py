"""What is missing on this machine and in AWS, each with its fix: `make doctor`; exit code 1 when something is.

    python -m pipelines doctor

Without credentials it checks this machine only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from typing import Any, Literal, NamedTuple

from pipelines import ROOT, project, terminal
from pipelines.cloud import images as cloud_images
from pipelines.cloud import limits, permissions, stack
from pipelines.cloud.account import Account, explained, pages
from pipelines.cloud.errors import STEPS
from pipelines.config import Settings, load
from pipelines.local import engine
from pipelines.local import images as local_images
from pipelines.terminal import UserError
from training.config import GPU_INSTANCE

GB = 1e9
SKEW = 240  # seconds; AWS refuses requests from 300 on


class Line(NamedTuple):
    """One finding."""

    level: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


def here() -> Iterator[Line]:
    """What needs no AWS account."""
    yield Line("ok", f"Python {platform.python_version()}")
    uv = shutil.which("uv") or shutil.which(str(ROOT / ".venv" / "bin" / "uv"))
    yield Line("ok", f"uv: {uv}") if uv else Line("warn", "uv is not installed", "`make setup` puts it into .venv")
    try:
        engine.check()
        yield Line("ok", "Docker engine and compose answer")
        if "containerd.snapshotter" in engine.docker("info").stdout:
            yield Line("warn", "this Docker pushes images in a form that SageMaker refuses",
                       "`make image-push` converts them; `docker push` by hand does not")  # fmt: skip
        try:
            engine.check_sees()
        except engine.EngineError as error:
            yield Line("warn", "no containers: local verbs run as processes", str(error))
    except engine.EngineError as error:
        yield Line("warn", "no containers: local verbs run as processes, `make image-push` cannot", str(error))
    free = shutil.disk_usage(ROOT).free / GB
    level: Literal["ok", "warn", "fail"] = "ok" if free > 20 else "warn" if free > 2 else "fail"
    yield Line(level, f"{free:.0f} GB of disk are free", "" if level == "ok" else "images take 10 GB; make room")
    yield from builds()


def builds() -> Iterator[Line]:
    """Whether PyTorch's index of builds gave what it was asked for, here and for the last image."""
    again = "let this machine reach PyTorch's index (see docs/setup.md about proxies), then "
    with contextlib.suppress(metadata.PackageNotFoundError):
        version = metadata.version("torch")
        if platform.system() == "Linux" and "+" not in version and not engine.gpus():
            yield Line("warn", f"torch {version} in .venv is PyPI's build: 5 GB of CUDA on a machine without a GPU",
                       f"{again}`make setup ARGS='--reinstall-package torch "
                       "--reinstall-package torchvision'`")  # fmt: skip
    if local_images.BUILD_LOG.is_file():
        log = local_images.BUILD_LOG.read_text(encoding="utf-8", errors="replace")
        if found := local_images.OTHER_BUILD.search(log):
            yield Line("warn", f"of the last image: {found[0]}", f"{again}`make image ARGS=--no-cache`")


def chosen(settings: Settings) -> Iterator[Line]:
    """What AWS would refuse of the settings, and which drivers torch's builds meet."""
    compute, endpoint = settings.compute, settings.endpoint
    refused = [*limits.machine(settings, "compute", compute.instance_type), *limits.endpoint(settings)]
    gpus = {use: kind for use, kind in (("compute", compute.instance_type), ("endpoint", endpoint.instance_type))
            if GPU_INSTANCE.match(kind) and (use == "compute" or endpoint.type != "serverless")
            and not any(kind in text for text in refused)}  # fmt: skip
    yield from (Line("fail", text, "change the settings in configs/infrastructure.yaml") for text in refused)
    yield from (Line("warn", text, "set endpoint.capture_percent to 0") for text in limits.doubts(settings))
    yield from (Line("ok", limits.driver(settings, use, kind)) for use, kind in gpus.items())
    if gpus and (text := limits.locked(settings)):
        yield Line("warn", text, "set images.torch to a build that it has, such as cu130 for drivers from 580 on")


def there(account: Account) -> Iterator[Line]:
    """What is in AWS."""
    import botocore.session

    if account.session.get_credentials() is None:
        yield Line("warn", "no AWS credentials: nothing in AWS was checked", STEPS["no credentials"])
        return
    yield from clock(account)
    with explained("asking who these credentials are"):
        caller = account.client("sts").get_caller_identity()
    yield Line("ok", f"credentials of {caller['Arn']}")
    if (shell := botocore.session.get_session().get_config_variable("region")) not in (None, account.region):
        yield Line("warn", f"the shell's region is {shell}, aws.region is {account.region}",
                   "the verbs use aws.region; set AWS_DEFAULT_REGION to it for other programs")  # fmt: skip
    yield from _try("quotas", lambda: quotas(account))
    try:
        account.stack()
    except UserError as error:
        yield Line("fail", str(error), "`make bootstrap`")
        return
    yield from _try("stack", lambda: up_to_date(account, caller))
    yield from _try("execution role", lambda: role(account, caller["Account"]))
    yield from _try("own permissions", lambda: own(account, caller))
    yield from _try("images", lambda: images(account))


def _try(what: str, check: Callable[[], Iterable[Line]]) -> Iterator[Line]:
    """A check, or why it could not be made."""
    try:
        with explained("asking AWS"):
            yield from check()
    except UserError as error:
        yield Line("warn", f"{what}: not checked", str(error))


def clock(account: Account) -> Iterator[Line]:
    """AWS's clock is in every answer, also in one that refuses."""
    from botocore.exceptions import ClientError

    with explained("asking for the time"):
        try:
            answer = account.client("sts").get_caller_identity()
        except ClientError as error:
            answer = error.response
    said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    skew = (datetime.now(UTC) - parsedate_to_datetime(said)).total_seconds() if said else 0.0
    if abs(skew) > SKEW:
        yield Line("fail", f"this machine's clock is {skew:+.0f} s off AWS's", "turn on time synchronisation (NTP)")
    else:
        yield Line("ok", f"the clock is right ({skew:+.0f} s)")


def up_to_date(account: Account, caller: dict[str, str]) -> Iterator[Line]:
    """Whether `make bootstrap` would change the stack."""
    cloud, name = account.client("cloudformation"), project.name()
    made = account.stack()
    body = cloud.get_template(StackName=name)["TemplateBody"]
    wanted = stack.parameters(account, caller["Arn"], made.parameters)
    same = (json.loads(body) if isinstance(body, str) else body) == json.loads(
        stack.template(account.settings, caller["Account"])
    )
    differing = [] if same else ["what infrastructure/ says"]
    differing += [key for key, value in wanted.items() if made.parameters.get(key) != value]
    if differing or not made.status.endswith("_COMPLETE"):
        yield Line("warn", f"the stack {name} is {made.status} and differs in {', '.join(differing) or 'nothing'}",
                   "`make bootstrap` brings it up to date")  # fmt: skip
    else:
        yield Line("ok", f"the stack {name} is there and up to date")


def role(account: Account, number: str) -> Iterator[Line]:
    """Whether SageMaker may use the execution role, and what that may do."""
    made = account.stack().role
    policy = account.client("iam").get_role(RoleName=made.split("/")[-1])["Role"]["AssumeRolePolicyDocument"]
    services = json.dumps([entry["Principal"] for entry in policy["Statement"] if entry["Effect"] == "Allow"])
    if "sagemaker.amazonaws.com" not in services:
        yield Line("fail", f"{made} does not trust SageMaker", "`make bootstrap` puts its trust policy right")
    missing = permissions.refused(account, made, permissions.needs(account, number, "ExecutionRole"))
    if missing:
        yield Line("fail", f"the execution role may not {', '.join(missing)}",
                   "`make bootstrap`; if that does not help, a rule of the account forbids it")  # fmt: skip
    elif "sagemaker.amazonaws.com" in services:
        yield Line("ok", "SageMaker may use the execution role, which may do what jobs need")


def own(account: Account, caller: dict[str, str]) -> Iterator[Line]:
    """What these credentials may not do of what the verbs do."""
    principal = caller["Arn"]
    if principal.endswith(":root"):
        yield Line("warn", "these are the credentials of the account itself, which may do everything", "use a role")
        return
    if ":assumed-role/" in principal:  # the simulator wants the role, whose path is not in the session's name
        principal = account.client("iam").get_role(RoleName=principal.split("/")[1])["Role"]["Arn"]
    both = (permissions.needs(account, caller["Account"], policy) for policy in ("VerbsPolicy", "AroundPolicy"))
    missing = permissions.refused(account, principal, itertools.chain.from_iterable(both))
    if missing:
        yield Line("fail", f"these credentials may not {', '.join(missing)}",
                   "attach the stack's policies VerbsPolicy and AroundPolicy (see `make bootstrap`)")  # fmt: skip
    else:
        yield Line("ok", "these credentials may do what the verbs do")


def quotas(account: Account) -> Iterator[Line]:
    """How many instances of the chosen types the account may run at once."""
    compute, endpoint = account.settings.compute, account.settings.endpoint
    wanted = {f"{compute.instance_type} for {'spot ' if compute.spot else ''}training job usage": compute.instances}
    if compute.keep_alive_minutes:
        wanted[f"{compute.instance_type} for training warm pool usage"] = compute.instances
    if endpoint.type != "serverless":
        wanted[f"{endpoint.instance_type} for endpoint usage"] = max(endpoint.instances, endpoint.max_instances)
    service = account.client("service-quotas")
    listed = pages(service, "list_service_quotas", "Quotas", ServiceCode="sagemaker")
    found: dict[str, Any] = {quota["QuotaName"]: quota for quota in listed}
    for name, count in wanted.items():
        quota = found.get(name)
        if quota is None:
            yield Line("warn", f"there is no quota {name!r} in {account.region}", "is the instance type right?")
        elif quota["Value"] < count:
            yield Line("fail", f"{name}: {quota['Value']:g} allowed, {count} wanted",
                       "aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code "
                       f"{quota['QuotaCode']} --desired-value {count} --region {account.region}")  # fmt: skip
        else:
            yield Line("ok", f"{name}: {quota['Value']:g} allowed, {count} wanted")


def images(account: Account) -> Iterator[Line]:
    """Whether the images of the project as it is now are in ECR: a stale image has another name."""
    ecr, name = account.client("ecr"), account.stack().repository.partition("/")[2]
    listed = pages(ecr, "describe_images", "imageDetails", repositoryName=name)
    there = {tag: image.get("imageManifestMediaType") for image in listed for tag in image.get("imageTags", [])}
    for target in local_images.TARGETS:
        if getattr(account.settings.images, target) == "project":
            tag = cloud_images.uri(account, target).rpartition(":")[2]
            old = any(other.startswith(f"{target}-") for other in there)
            if tag in there and not cloud_images.is_taken(there[tag]):
                yield Line("fail", f"the image {tag} in ECR has a manifest ({there[tag]}) that SageMaker refuses",
                           f"{cloud_images.removal(account, name, tag)}, then `make image-push`")  # fmt: skip
            elif tag in there:
                yield Line("ok", f"the image {tag} is in ECR")
            else:
                yield Line("warn", f"the {target} image in ECR is {'stale' if old else 'missing'}", "`make image-push`")


def main() -> int:
    """Command line; see the module's docstring."""
    settings = load(terminal.parser("What is missing, with its fix.", settings=True).parse_args().set)
    failed = False
    for lines in (here(), chosen(settings), there(Account(settings))):
        try:
            for line in lines:
                failed |= line.level == "fail"
                print(f"{line.level:4}  {line.text}" + (f"\n      fix: {line.fix}" if line.fix else ""), flush=True)
        except UserError as error:
            failed = True
            print(f"fail  {error}", flush=True)
    return int(failed)
