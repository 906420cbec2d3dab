"""What modules agree on: the account, the operations that they take over, and who looks at a request before and after.

    @operation("sagemaker", "CreateTrainingJob")
    def create(account: Account, request: Request) -> Answer: ...

A handler gets the request's members by botocore's model of the service, whatever the protocol, and answers with the
members of the response (`Body` is bytes). What no module takes over is forwarded to moto.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

Request = dict[str, Any]
Answer = dict[str, Any]
# Access keys: of who may do all, and of the user `person`, who may do what the policies allow that are attached to it.
OWNER, PERSON = "AKIAREHEARSALOWNER00", "AKIAREHEARSALPERSON0"
SECRET = "rehearsal"  # noqa: S105  of both, and looked at by nobody


class Refused(Exception):  # noqa: N818  a word that modules use, not a fault
    """AWS's answer to a request that it does not carry out."""

    def __init__(self, code: str, message: str, status: int = 400, **members: Any) -> None:
        super().__init__(message)
        self.code, self.status, self.members = code, status, members


class NoAnswer(Exception):  # noqa: N818
    """Raised by who looks at an answer: the connection is cut and the answer never comes."""


@dataclass
class Call:
    """One request as it came over HTTP, and what it says."""

    service: str  # as boto3 names it
    operation: str  # empty where botocore knows none
    request: Request
    principal: str  # the ARN of who asks
    headers: dict[str, str] = field(default_factory=dict)  # names in small letters
    raw: bytes = b""


@dataclass
class Account:
    """An AWS account: moto's address, the front's, and what has to be torn down."""

    folder: Path
    moto: str = ""  # http://127.0.0.1:…, behind the front: no hook looks at a request that goes there
    front: str = ""  # what the variables name
    region: str = "us-east-1"
    number: str = "123456789012"
    name: str = field(default_factory=lambda: f"rehearsal-{secrets.token_hex(3)}")  # in names and labels of containers
    faults: list[str] = field(default_factory=list)  # the words of --fault
    events: list[dict[str, Any]] = field(default_factory=list)  # what happened, for a summary
    keys: dict[str, str] = field(default_factory=dict)  # access key: ARN of who has it
    lock: threading.RLock = field(default_factory=threading.RLock)
    closing: threading.Event = field(default_factory=threading.Event)
    things: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # kind: name: what Describe says
    tags: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # by ARN, of what modules keep themselves
    _clients: dict[tuple[str, str], Any] = field(default_factory=dict)
    _ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.keys |= {OWNER: f"arn:aws:iam::{self.number}:root", PERSON: f"arn:aws:iam::{self.number}:user/person"}

    def client(self, service: str, role: str = "") -> Any:
        """A client of boto3: straight onto moto, or, where a role is named, through the front with its rights."""
        with self.lock:
            if (service, role) not in self._clients:
                key = OWNER if not role else next((k for k, arn in self.keys.items() if arn == role), "")
                if not key:
                    key = f"ASIA{secrets.token_hex(8).upper()}"
                    self.keys[key] = role
                once = Config(
                    retries={"total_max_attempts": 1}, parameter_validation=bool(role), max_pool_connections=50
                )
                self._clients[service, role] = boto3.session.Session().client(
                    service, region_name=self.region, endpoint_url=self.front if role else self.moto, config=once,
                    aws_access_key_id=key, aws_secret_access_key=SECRET,
                )  # fmt: skip
            return self._clients[service, role]

    def pass_on(self, service: str, operation: str, request: Request) -> Answer:
        """What moto answers to a request, without what a response of HTTP has around it; refusals are raised."""
        client = self.client(service)
        answer: Answer = client._make_api_call(operation, request)
        answer.pop("ResponseMetadata", None)
        return answer

    def arn(self, kind: str, name: str) -> str:
        """The ARN of a thing of SageMaker's, as `training-job`."""
        return f"arn:aws:sagemaker:{self.region}:{self.number}:{kind}/{name}"

    def spawn(self, work: Callable[..., None], *args: Any) -> threading.Thread:
        """Do something beside the requests."""
        thread = threading.Thread(target=work, args=args, daemon=True)
        thread.start()
        return thread

    def at_end(self, undo: Callable[..., Any], *args: Any) -> None:
        """Call something when the account is torn down, the newest first."""
        with self.lock:
            self._ends.callback(undo, *args)

    def note(self, kind: str, what: str, text: str = "") -> None:
        """Remember what happened: kind is `executed`, `refused`, `failed`, `fault` or a word of a module's own."""
        with self.lock:
            self.events.append({"at": time.time(), "kind": kind, "what": what, "text": text})

    def close(self) -> None:
        """Tear everything down."""
        self.closing.set()
        self._ends.close()


CALLER: ContextVar[Call] = ContextVar("CALLER")  # the request that a handler answers, for those who ask who asks
Handler = Callable[[Account, Request], Answer]
Hook = Callable[[Account, Call], None]
HANDLERS: dict[tuple[str, str], Handler] = {}
CONTROLS: dict[str, Handler] = {}
BEFORE: list[Hook] = []
AFTER: list[Callable[[Account, Call, Answer], None]] = []
STARTED: list[Callable[[Account, str, str, Callable[[str], None]], None]] = []
ACCELERATED = re.compile(r"ml\.(g|p|inf|trn)\d")


def operation(service: str, *names: str) -> Callable[[Handler], Handler]:
    """Take over operations of a service."""

    def take(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys([(service, name) for name in names], handler))
        return handler

    return take


def control(name: str) -> Callable[[Handler], Handler]:
    """Answer `POST /_rehearsal/<name>`, which is the rehearsal's own and no request to AWS; JSON in, JSON out."""

    def take(handler: Handler) -> Handler:
        CONTROLS[name] = handler
        return handler

    return take


def before(hook: Hook) -> Hook:
    """Look at every request, forwarded ones too, before it is carried out; raise `refuse(…)` to refuse it."""
    BEFORE.append(hook)
    return hook


def after(hook: Callable[[Account, Call, Answer], None]) -> Callable[[Account, Call, Answer], None]:
    """Look at the answer to a request that was carried out (empty for forwarded ones); `NoAnswer` cuts the line."""
    AFTER.append(hook)
    return hook


def started(
    hook: Callable[[Account, str, str, Callable[[str], None]], None],
) -> Callable[[Account, str, str, Callable[[str], None]], None]:
    """Be told that a job's containers run: account, kind (`training-job`), name, and a function that plays an accident.

    It takes `reclaim` (the instances are gone, as with spot) or `die` (the containers are killed).
    """
    STARTED.append(hook)
    return hook


def refuse(code: str, message: str, status: int = 400, **members: Any) -> Refused:
    """AWS's refusal, to be raised; `members` are further members of the error's shape."""
    return Refused(code, message, status, **members)


def missing(what: str) -> Refused:
    """What SageMaker says of things that do not exist."""
    return refuse("ValidationException", f"Could not find {what}.")


def no_gpu(instance_type: str) -> str:
    """Why nothing runs on a type of instance; empty where the rehearsal plays it."""
    if not ACCELERATED.match(instance_type or ""):
        return ""
    return f"CapacityError: the rehearsal plays no GPU, and {instance_type} has one; take a type without"


def now() -> datetime:
    """A time as answers have it."""
    return datetime.now(UTC)


def page(items: list[Any], request: Request, key: str, default: int = 100) -> Answer:
    """One page of a list, by the request's MaxResults and NextToken."""
    start, size = int(request.get("NextToken") or 0), int(request.get("MaxResults") or default)
    rest = {"NextToken": str(start + size)} if start + size < len(items) else {}
    return {key: items[start : start + size], **rest}
