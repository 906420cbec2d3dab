"""What `make train`, `make tune` and `make deploy` would create, where, and the most that it can cost: `make plan`.

    python -m pipelines plan --set compute.instances=4

It creates nothing, and needs no more than the permission to read prices.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines import project, terminal
from pipelines.cloud import prices, train
from pipelines.cloud.account import Account
from pipelines.config import Settings, load
from pipelines.endpoint import model
from pipelines.terminal import UserError
from pipelines.tuning import cloud as tuning_cloud


def training(account: Account) -> Iterator[str]:
    """What a training job is and costs."""
    settings = account.settings
    compute = settings.compute
    price = prices.hourly(account, "training", compute.instance_type)
    hours = train.longest(settings)
    warm = f", with {compute.keep_alive_minutes} minutes of warm pool" if compute.keep_alive_minutes else ""
    cost = prices.cost(price, compute.instances * hours)
    yield f"make train: a training job in {_where(settings)}"
    yield f"  {compute.instances} x {compute.instance_type}, {compute.volume_gb} GB each, {hours:g} hours at most{warm}"
    if compute.spot:
        yield f"  on spot instances, {compute.max_wait_hours:g} hours with waiting; the price below is that on demand"
    yield f"  at most {_dollars(cost)}{_each(price)}{_judged(settings, cost)}"


def tuning(account: Account) -> Iterator[str]:
    """What a tuning job costs."""
    cost = tuning_cloud.most(account)
    jobs = f"{account.settings.tuning.max_jobs} such jobs without warm pools"
    yield f"make tune: at most {jobs}, at most {_dollars(cost)}{_judged(account.settings, cost)}"


def deployment(account: Account) -> Iterator[str]:
    """What an endpoint is and costs."""
    settings = account.settings
    endpoint = settings.endpoint
    name = project.name() if endpoint.name == "auto" else endpoint.name
    yield f"make deploy: the {endpoint.type} endpoint {name} in {_where(settings)}"
    kind, count, machine = model.fleet(settings)
    price = prices.hourly(account, kind, machine)
    if endpoint.type == "serverless":
        yield f"  {endpoint.memory_mb} MB, bills while it answers; the most is {count} requests at once all the time"
    else:
        scaling = f", up to {count} under load" if count > endpoint.instances else ""
        yield f"  {endpoint.instances} x {endpoint.instance_type}{scaling}"
    cost = prices.cost(price, count)
    end = endpoint.ttl_hours
    yield f"  at most {_dollars(cost)} an hour{_each(price)}"
    if end:
        all_of_it = prices.cost(cost, end)
        yield f"  at most {_dollars(all_of_it)} in {end:g} hours, when it deletes itself{_judged(settings, all_of_it)}"
    month = prices.cost(cost, prices.MONTH)
    if end:
        yield f"  at most {_dollars(month)} a month if it never ended"
    else:
        yield f"  at most {_dollars(month)} a month, and nothing ends it{_judged(settings, month)}"


def _where(settings: Settings) -> str:
    return f"{settings.aws.region}{', inside the VPC of aws.subnets' if settings.aws.subnets else ''}"


def _dollars(cost: float | None) -> str:
    return "an unknown number of USD" if cost is None else f"{cost:.2f} USD"


def _each(price: float | None) -> str:
    return "" if price is None else f" ({price:.3f} an hour each)"


def _judged(settings: Settings, cost: float | None) -> str:
    try:
        prices.check_budget(settings, cost, yes=False)
    except UserError:
        return f"; OVER aws.budget_usd ({settings.aws.budget_usd:g} USD): needs YES=1"
    return ""


def main() -> int:
    """Command line; see the module's docstring."""
    settings = load(
        terminal.parser("What train, tune and deploy would create and cost.", settings=True).parse_args().set
    )
    account = Account(settings)
    print("\n".join([*training(account), *tuning(account), *deployment(account)]))
    print("storage, traffic and logs apart; what costs now: `make status`")
    return 0
