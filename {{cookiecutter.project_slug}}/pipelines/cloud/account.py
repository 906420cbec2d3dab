"""What the cloud verbs share: the account with its clients and the project's stack, AWS's errors as one sentence."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipelines import project
from pipelines.cloud import answers, errors
from pipelines.cloud.errors import ATTEMPTS, missing
from pipelines.config import Settings
from pipelines.terminal import UserError
from progress import plain, waiting
from training.config import nearest

OWN_DISK = re.compile(r"ml\.(g[4-9]|p[4-9]|p3dn|trn|[a-z]+\d+[a-z]*d)")  # machines with disks of their own

T = TypeVar("T")


@dataclass(frozen=True)
class Stack:
    """The project's CloudFormation stack, which `make bootstrap` made: its outputs, parameters and status."""

    bucket: str
    role: str
    repository: str
    topic: str
    scheduler_role: str
    pipeline_role: str
    serving_role: str
    parameters: dict[str, str] = field(default_factory=dict)
    status: str = ""

    @property
    def partition(self) -> str:
        """Of ARNs: aws, aws-cn, aws-us-gov."""
        return self.role.split(":")[1]


# Stands for one that is not there yet, where only a price is asked for.
NO_STACK = Stack("<bucket>", "", "<repository>", "", "", "", "")


class Account:
    """The account that a verb works in: its clients, each made once, and the project's stack, looked up once.

    What changes the stack, as `make bootstrap` does, asks CloudFormation itself.
    """

    def __init__(self, settings: Settings, stack: Stack | None = None) -> None:
        """Nothing is asked yet; a `stack` that is given is not looked up."""
        self.settings, self.region = settings, settings.aws.region  # where everything is, but for prices
        self._stack, self._key = stack, settings.aws.kms_key
        self._clients: dict[tuple[str, str], Any] = {}
        self._one = threading.Lock()  # threads may share a client, but not the session that makes it

    @functools.cached_property
    def session(self) -> Any:
        """The boto3 session that all clients come from, those of the SDK too; they give up after bounded attempts.

        Credentials are fetched here: a profile may fail in many ways.

        Raises:
            errors.ProfileError: when they are chosen, and cannot be had; where none are, the first request says so.
                Or when there is no such region.
        """
        import boto3
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        for name, value in {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": str(ATTEMPTS)}.items():
            os.environ.setdefault(name, value)  # not in a Config, instead of which the SDK has one of its own
        own = botocore.session.get_session()
        own.set_default_client_config(Config(connect_timeout=10, read_timeout=60))
        answers.watch(self, own)
        try:
            session = boto3.Session(botocore_session=own, region_name=self.region)
            if credentials := session.get_credentials():
                credentials.get_frozen_credentials()
        except (BotoCoreError, ClientError, OSError, ValueError, EOFError) as error:
            raise errors.ProfileError(errors.of_profile(error)) from error
        names = [name for part in session.get_available_partitions()
                 for name in session.get_available_regions("sagemaker", part)]  # fmt: skip
        if self.region not in names:
            raise errors.ProfileError(
                f"aws.region is {self.region}, which has no SageMaker that boto3 knows of; "
                f"{nearest(self.region, names)} `make setup ARGS=--upgrade` brings new ones"
            )
        return session

    def client(self, service: str, region: str | None = None) -> Any:
        """A boto3 client, in `aws.region` unless told otherwise."""
        key = service, region or self.region
        with self._one:
            if key not in self._clients:
                self._clients[key] = self.session.client(*key)
            return self._clients[key]

    def stack(self) -> Stack:
        """The project's stack.

        Raises:
            UserError: when it has not been made, with the command that makes it.
        """
        if self._stack:
            return self._stack
        name = project.name()
        with explained(f"looking up the stack {name}"):
            found = unless_missing(self.client("cloudformation").describe_stacks, StackName=name)
        if found is None:
            raise UserError(f"there is no stack {name} in {self.region}; make it with `make bootstrap`")
        facts = found["Stacks"][0]
        outputs = {output["OutputKey"]: output["OutputValue"] for output in facts.get("Outputs", [])}
        given = {item["ParameterKey"]: item["ParameterValue"] for item in facts.get("Parameters", [])}
        names = {"bucket": "Bucket", "role": "ExecutionRole", "repository": "Repository", "topic": "Topic",
                 "scheduler_role": "SchedulerRole", "pipeline_role": "PipelineRole",
                 "serving_role": "ServingRole"}  # fmt: skip
        if absent := [key for key in names.values() if key not in outputs]:
            raise UserError(f"the stack {name} has no output {', '.join(absent)}; bring it up to date with "
                            "`make bootstrap`")  # fmt: skip
        made = {part: outputs[key] for part, key in names.items()}
        self._stack = Stack(**made, parameters=given, status=facts["StackStatus"])
        return self._stack

    def assume(self, stack: Stack) -> Stack:
        """Take this for the project's stack from now on."""
        self._stack = stack
        return stack

    def tags(self) -> list[dict[str, str]]:
        """On everything that the verbs create; `project` is how `status` and `destroy` find it again."""
        named = {**self.settings.aws.tags, "project": project.name()}
        return [{"Key": key, "Value": value} for key, value in named.items()]

    def console(self, page: str) -> str:
        """The address of a page of SageMaker's console."""
        hosts = {"cn-": "amazonaws.cn", "us-gov": "amazonaws-us-gov.com"}
        host = next((hosts[part] for part in hosts if self.region.startswith(part)), "aws.amazon.com")
        return f"https://{self.region}.console.{host}/sagemaker/home?region={self.region}#/{page}"

    def kms_arn(self) -> str | None:
        """The ARN of `aws.kms_key`: an alias is not taken everywhere. None for the account's default keys."""
        if self._key != "none" and ":key/" not in self._key:
            with explained(f"looking up {self._key}, which is aws.kms_key"):
                self._key = str(self.client("kms").describe_key(KeyId=self._key)["KeyMetadata"]["Arn"])
        return None if self._key == "none" else self._key

    def encryption(self) -> dict[str, str]:
        """What a request that writes an object says of `aws.kms_key`."""
        key = self.kms_arn()
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn AWS's errors inside the block into one sentence with the next step.

    Args:
        doing: what the block does, as in "starting the training job".

    Raises:
        UserError: for every error that botocore raises.
    """
    from boto3.exceptions import Boto3Error
    from pydantic import ValidationError  # SDK V3 checks requests and answers

    try:
        yield
    except (Boto3Error, ValidationError, *errors.of_requests()) as error:
        text, reason = errors.said(error)
        kind = errors.ProfileError if reason in errors.HOPELESS else UserError
        raise kind(f"{doing} failed: {text}") from error


def unless_missing(call: Callable[..., Any], **request: Any) -> Any:
    """The answer to a request about one thing; None when there is no such thing, or no longer."""
    from botocore.exceptions import ClientError

    try:
        return call(**request)
    except ClientError as error:
        if not missing(error):
            raise
        return None


def pages(service: Any, operation: str, key: str, **request: Any) -> Iterator[dict[str, Any]]:
    """What a request lists under a key, over all of its pages."""
    for page in service.get_paginator(operation).paginate(**request):
        yield from page.get(key, [])


def confirm(plan: str, yes: bool) -> None:
    """Show what will be created and what it can cost; go on only when told to.

    Raises:
        UserError: when the answer is no, or nobody is there to give one.
    """
    print(plan, flush=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("nobody is there to answer; say YES=1 to go on")
    if ask("go on? [y/N]").lower() not in ("y", "yes"):
        raise UserError("nothing was done")


def ask(question: str) -> str:
    """What somebody types; nothing when that is the end of the input."""
    try:
        return input(f"{question} ").strip()
    except EOFError:
        return ""


def until(
    what: str, seconds: float, look: Callable[[Callable[[str], None]], tuple[T | None, str]],
    patience: float = math.inf, late: Callable[[], str] = str, stopped: str = "",
) -> T:  # fmt: skip
    """Look again and again until there is an answer.

    Args:
        what: is waited for, as in "the job".
        seconds: between two looks.
        look: gives the answer, or None while there is none, and a line for people, which is shown when it is another
            one than before. It is handed a function that shows more lines.
        patience: seconds.
        late: what to say when they are over.
        stopped: what to say when Ctrl-C ends the looking; nothing: that is the caller's.

    Raises:
        UserError: when patience or Ctrl-C ends the looking.
    """
    shown, deadline = "", time.monotonic() + patience
    try:
        with waiting(what) as say:
            while time.monotonic() < deadline:
                answer, line = look(say)
                if line not in ("", shown):
                    say(line)
                    shown = line
                if answer is not None:
                    return answer
                time.sleep(seconds)
    except KeyboardInterrupt:
        if not stopped:
            raise
        raise UserError(stopped, code=130) from None
    raise UserError(late())


def failure(facts: Mapping[str, Any]) -> str:
    """Why a job or an endpoint failed, as AWS describes it."""
    return plain(" ".join(facts.get("FailureReason", "AWS gives no reason").split()))


def place(uri: str) -> dict[str, str]:
    """`s3://bucket/key` as requests have it."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def volume_key(key: str | None, instance_type: str) -> str | None:
    """The key of a machine's volume; None where its own hardware encrypts that: AWS refuses a key then."""
    return None if OWN_DISK.match(instance_type) else key
