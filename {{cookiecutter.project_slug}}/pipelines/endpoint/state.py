"""What the verbs of an endpoint share: its name, its state, and waiting for it."""

from __future__ import annotations

import re
import time
from typing import Any

from pipelines import project
from pipelines.cloud.account import Account, explained, unless_missing, until
from pipelines.config import Settings
from pipelines.terminal import UserError

LONGEST = 42  # characters of a name: those of its models and configurations are 21 longer, and AWS takes 63
POLL = 10.0  # seconds between two looks at an endpoint
PATIENCE = 2 * 3600  # seconds for a change of an endpoint; a linear rollout takes an hour


def name(settings: Settings, given: str | None) -> str:
    """The endpoint that `ENDPOINT=` or the settings name.

    Raises:
        UserError: when the roles of the stack, which go by the project's name, would not let it be deleted.
    """
    own = project.name()
    found = given or (own if settings.endpoint.name == "auto" else settings.endpoint.name)
    if not re.fullmatch(rf"{re.escape(own)}(-[a-zA-Z0-9]+)*", found) or len(found) > LONGEST:
        raise UserError(
            f"the endpoint's name is {found!r}; the project's roles allow {own} and {own}-..., and a name has "
            f"at most {LONGEST} letters, digits and hyphens"
        )
    return found


def describe(account: Account, endpoint: str) -> dict[str, Any] | None:
    """What AWS knows of an endpoint; None when there is none."""
    with explained(f"looking up the endpoint {endpoint}"):
        describe_endpoint = account.client("sagemaker").describe_endpoint
        found: dict[str, Any] | None = unless_missing(describe_endpoint, EndpointName=endpoint)
        return found


def running(account: Account, endpoint: str) -> dict[str, Any]:
    """The same of an endpoint that answers.

    Raises:
        UserError: when it does not.
    """
    facts = describe(account, endpoint)
    if facts is None:
        raise UserError(f"there is no endpoint {endpoint} in {account.region}; make one with `make deploy`")
    if facts["EndpointStatus"] not in ("InService", "Updating", "SystemUpdating", "RollingBack"):
        raise UserError(f"{endpoint} is {facts['EndpointStatus']} and answers nothing; see {link(account, endpoint)}")
    return facts


def wait(account: Account, endpoint: str) -> dict[str, Any]:
    """Wait, and say so, until an endpoint does not change any more."""
    started, status = time.monotonic(), ""

    def look(_: object) -> tuple[dict[str, Any] | None, str]:
        nonlocal status
        facts = describe(account, endpoint)
        if facts is None:
            raise UserError(f"{endpoint} was deleted meanwhile")
        status, minutes = facts["EndpointStatus"], int(time.monotonic() - started) // 60
        if status in ("InService", "Failed", "OutOfService", "UpdateRollbackFailed"):
            return facts, ""
        return None, f"{endpoint}: {status}, {minutes} min"

    def late() -> str:
        return f"{endpoint} is still {status} after {PATIENCE // 60} minutes; see {link(account, endpoint)}"

    return until(f"the endpoint {endpoint}", POLL, look, PATIENCE, late)


def link(account: Account, endpoint: str) -> str:
    """Its page in the console."""
    return account.console(f"endpoints/{endpoint}")
