"""What an instance costs an hour, from AWS's Price List, and whether a sum is inside the budget.

A price is kept for a day in `.cache/prices.json`, unless another address than AWS's was asked (`AWS_ENDPOINT_URL`). One
that cannot be known counts as over budget.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipelines import ROOT
from pipelines.cloud.account import NO_STACK, Account, Stack, confirm
from pipelines.cloud.errors import ProfileError, of_requests
from pipelines.config import Settings
from pipelines.terminal import Finished, Parser, UserError

CACHE = ROOT / ".cache" / "prices.json"
DAY = 86400  # seconds
MONTH = 730  # hours: what is counted for what nothing ends
USAGE = {  # of an instance type; a serverless "instance type" is its memory, as in Mem-4GB
    "training": "Train", "hosting": "Host", "async": "AsyncInf", "processing": "Processing", "transform": "Tsform",
    "serverless": "ServerlessInf",
}  # fmt: skip
# Where the Price List is asked, else us-east-1: an account's rules may allow no other continent.
HOME = {"eu": "eu-central-1", "ap": "ap-south-1"}
T = TypeVar("T")


def hourly(account: Account, kind: str, instance_type: str) -> float | None:
    """USD for an hour of one instance, on demand.

    Args:
        account: to work in.
        kind: of use, a key of `USAGE`.
        instance_type: such as ml.g5.xlarge.

    Returns:
        None when it cannot be known: no permission, no network, no such product, or another currency (China).
    """
    elsewhere = "AWS_ENDPOINT_URL" in os.environ
    name, known = f"{account.region} {kind} {instance_type}", {} if elsewhere else _cached()
    price: float | None
    price, when = known.get(name, (None, 0.0))
    if price is None or not 0 <= time.time() - when < DAY:
        price = _ask(account, kind, instance_type)
        if price is not None and not elsewhere:
            CACHE.parent.mkdir(parents=True, exist_ok=True)
            whole = CACHE.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(known | {name: (price, time.time())}), encoding="utf-8")
            whole.replace(CACHE)
    return price


def cost(hourly: float | None, hours: float) -> float | None:
    """USD for hours of instances; None when their price is not known."""
    return None if hourly is None else hourly * hours


def check_budget(settings: Settings, dollars_at_most: float | None, yes: bool) -> None:
    """Make sure that a sum is inside `aws.budget_usd`, or that somebody said to go on all the same.

    Raises:
        UserError: when it is not; None, an unknown price, never is.
    """
    budget = settings.aws.budget_usd
    if not yes and dollars_at_most is None:
        raise UserError(
            f"a price that is not known counts as over aws.budget_usd ({budget:g} USD), so nothing was created; "
            "`make doctor` says whether AWS can be asked, and YES=1 without PLAN=1 goes on all the same"
        )
    if not yes and dollars_at_most is not None and dollars_at_most > budget:
        raise UserError(
            f"{dollars_at_most:.2f} USD is over aws.budget_usd ({budget:g} USD), so nothing was created; "
            "raise the budget, or say YES=1 without PLAN=1 to go on"
        )


def usd(hourly: float | None, hours: float = 1) -> str:
    """What some hours cost, for people."""
    return "an unknown price" if hourly is None else f"{hourly * hours:.2f} USD"


def where(settings: Settings) -> str:
    """The region, for people, and whether it is inside a network of one's own."""
    return f"{settings.aws.region}{', inside the VPC of aws.subnets' if settings.aws.subnets else ''}"


def add_plan(parser: Parser) -> None:
    """The option that asks for the price only."""
    parser.add_argument(
        "--plan", variable="PLAN", action="store_true",
        help="say what would be created, where, and the most it can cost; create nothing, whatever else is said",
    )  # fmt: skip


def look(find: Callable[[], T], instead: T, only_plan: bool) -> T:
    """What is found; where only a price is asked for, something else in place of what is not there yet."""
    try:
        return find()
    except UserError as error:
        if not only_plan or isinstance(error, ProfileError):
            raise
        print(f"note: {error}", flush=True)
        return instead


def stack(account: Account, only_plan: bool) -> Stack:
    """The project's stack; where only a price is asked for and there is none, one that stands for it."""
    return account.assume(look(account.stack, NO_STACK, only_plan))


def agree(settings: Settings, plan: str, dollars_at_most: float | None, yes: bool, only_plan: bool = False) -> None:
    """Show what will be created; go on only inside the budget, and when told to.

    Raises:
        UserError: when it is over budget, or somebody says no.
        Finished: when only this was asked for.
    """
    if not yes or only_plan:
        try:
            check_budget(settings, dollars_at_most, yes=False)
        except UserError:
            print(plan, flush=True)
            raise
    confirm(plan, yes or only_plan)
    _finish(only_plan)


def afford(
    settings: Settings,
    plan: str,
    dollars_at_most: float | None,
    yes: bool,
    only_plan: bool = False,
    each: float | None = None,
) -> None:
    """Show what will be created and the most it can cost, and check that against the budget.

    Args:
        settings: with the budget.
        plan: what will be created, and where.
        dollars_at_most: None where a price is not known.
        yes: go on although it is over budget.
        only_plan: create nothing, which wins over `yes`.
        each: USD for an hour of one instance, where all are of one kind.

    Raises:
        UserError: when it is over budget.
        Finished: when only this was asked for.
    """
    known = "a price that is not known" if dollars_at_most is None else f"at most {dollars_at_most:.2f} USD"
    part = "" if each is None else f" ({each:.3f} USD an hour each)"
    print(f"{plan}\ncosts {known}{part}, storage and traffic apart", flush=True)
    check_budget(settings, dollars_at_most, yes and not only_plan)
    _finish(only_plan)


def _finish(only_plan: bool) -> None:
    if only_plan:
        print("PLAN=1: nothing was created")
        raise Finished


def _cached() -> dict[str, Any]:
    try:
        known = json.loads(CACHE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _ask(account: Account, kind: str, instance_type: str) -> float | None:
    """The dearest offer on demand: the tier below it may be a free one that is used up."""
    region, usage = account.region, f"{USAGE[kind]}:{instance_type}"
    if region.startswith("cn-"):
        return None
    filters = [
        {"Type": "TERM_MATCH", "Field": "regionCode", "Value": region},
        {"Type": "CONTAINS", "Field": "usagetype", "Value": usage},
    ]
    prices = []
    try:
        pricing = account.client("pricing", HOME.get(region[:2], "us-east-1"))
        for page in pricing.get_paginator("get_products").paginate(ServiceCode="AmazonSageMaker", Filters=filters):
            for product in map(json.loads, page["PriceList"]):
                if re.fullmatch(rf"([A-Z0-9]+-)?{re.escape(usage)}", product["product"]["attributes"]["usagetype"]):
                    offers = product["terms"].get("OnDemand", {}).values()
                    steps = [step for offer in offers for step in offer["priceDimensions"].values()]
                    prices += [float(step["pricePerUnit"]["USD"]) * _units(step["unit"]) for step in steps]
    except (KeyError, ValueError, *of_requests()):
        return None
    return max(prices, default=0.0) or None


def _units(unit: str) -> int:
    """How many of a unit an hour has."""
    return {"h": 1, "s": 3600}[unit[0].lower()]  # Hrs; seconds of a serverless endpoint
