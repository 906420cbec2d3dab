"""Remove what costs by the hour: endpoints and all that belongs to them, jobs, warm pools: `make destroy`.

    python -m pipelines destroy --yes
    python -m pipelines destroy --endpoint image-classifier-old

It shows the list and asks, then looks again until nothing that bills is left. The stack, data, images and the registry
stay: they are `make bootstrap-destroy`'s, which follows with ALL=1 after the project's name was typed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pipelines import project, terminal
from pipelines.cloud import inventory
from pipelines.cloud.account import REASONS, Account, confirm, explained, missing, until
from pipelines.cloud.inventory import Item
from pipelines.config import load
from pipelines.terminal import UserError

PAUSE = 10.0  # seconds between two looks
PATIENCE = 20 * 60.0  # seconds; a job may take minutes to stop, an endpoint as many to go
LEAVING = ("Stopping", "Deleting")
DENIED = "not allowed: `make doctor` shows what is missing"


def destroy(account: Account, endpoint: str | None, yes: bool) -> None:
    """Remove what bills, then what only belonged to it; see the module's docstring.

    Raises:
        UserError: with what is left, and why.
    """
    found = chosen(inventory.everything(account), endpoint)
    where = f"{endpoint or project.name()} in {account.region}"
    if not found:
        print(f"there is nothing of {where} to remove")
        return
    confirm("\n".join([f"removes of {where}, keeping data, images and results:", *inventory.table(found)]), yes)
    names = {_key(item) for item in found} if endpoint else None
    scaling = [item for item in found if item.kind == "autoscaling"]
    kept = _remove(account, scaling)  # first, or it would start instances meanwhile
    refused, left = _until_gone(account, names, found)
    if not left:  # the schedule that ends an endpoint outlives it, and so does its config, which says what it costs
        rest = [item for item in found if not item.bills and (item not in scaling or _key(item) in kept)]
        refused = _remove(account, rest)
        left = [item for item in rest if _key(item) in refused]
    if left:
        reasons = [f"{item.kind} {item.name}{refused.get(_key(item), '')}" for item in left]
        raise UserError(f"still there: {'; '.join(reasons)}. Do it again, or see `make status`")
    print("nothing is left that costs by the hour")


def chosen(items: list[Item], endpoint: str | None) -> list[Item]:
    """All, or one endpoint with what belongs to it.

    Raises:
        UserError: when the project has no such endpoint, and nothing is left of one.
    """
    if endpoint is None:
        return items
    mine = next((item for item in items if item.kind == "endpoint" and item.name == endpoint), None)
    alone = [item for item in items if item.of == endpoint]  # when it has deleted itself
    if mine is None and alone:
        return alone
    if mine is None:
        there = ", ".join(item.name for item in items if item.kind == "endpoint") or "none"
        raise UserError(f"the project has no endpoint {endpoint}; it has: {there}")
    used = {name for name in mine.uses if name.startswith(endpoint)}  # another one may share a model of another name
    parts = ("endpoint config", "model")
    return [item for item in items if item is mine or item.of == endpoint or (item.kind in parts and item.name in used)]


def _key(item: Item) -> tuple[str, str]:
    return item.kind, item.name


def _until_gone(
    account: Account, names: set[tuple[str, str]] | None, found: list[Item]
) -> tuple[dict[tuple[str, str], str], list[Item]]:
    """Ask for removal and look again until nothing bills, all is refused for good, or patience ends."""
    left = [item for item in found if item.bills]
    refused: dict[tuple[str, str], str] = {}
    deadline = time.monotonic() + PATIENCE

    def look(say: Callable[[str], None]) -> tuple[bool | None, str]:
        nonlocal refused, left
        refused = _remove(account, [item for item in left if not item.detail.endswith(LEAVING)], say)
        left = [item for item in inventory.everything(account) if item.bills and (names is None or _key(item) in names)]
        if all(DENIED in refused.get(_key(item), "") for item in left):
            return True, ""
        over = time.monotonic() > deadline or None
        return over, f"waiting for {', '.join(f'{item.kind} {item.name}' for item in left)}"

    if left:
        until("AWS to remove that", PAUSE, look)
    return refused, left


def _remove(account: Account, items: list[Item], say: Callable[[str], None] = print) -> dict[tuple[str, str], str]:
    """Ask for the removal of each; returns why AWS refused, where it did: what is there then shows the next look."""
    from botocore.exceptions import ClientError

    refused = {}
    for item in items:
        service, operation, parameters = item.removal
        with explained(f"removing {item.kind} {item.name}"):
            try:
                getattr(account.client(service), operation)(**parameters)
                say(f"removing {item.kind} {item.name}")
            except ClientError as error:
                details = error.response["Error"]
                if missing(error) or details["Code"] == "ObjectNotFoundException":
                    continue
                denied = f", {DENIED}" if details["Code"] in REASONS["denied"] else ""
                refused[_key(item)] = f" ({' '.join(details['Message'].split())}{denied})"
    return refused


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Remove what costs by the hour.", settings=True)
    parser.add_argument("--endpoint", help="only this one, and what belongs to it (default: all of the project)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args()
    destroy(Account(load(options.set)), options.endpoint, options.yes)
    return 0


if __name__ == "__main__":
    terminal.run_verb(main)
