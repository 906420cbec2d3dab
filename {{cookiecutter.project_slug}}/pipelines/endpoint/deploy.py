"""Put an artifact behind an endpoint on SageMaker, or update the endpoint that is there: `make deploy`.

    python -m pipelines deploy --run 20261121-093000-a1b2 --type async --set endpoint.ttl_hours=2
    make deploy JOB=<training job>    PACKAGE=<ARN>    ARTIFACT=<file>     # instead of the newest run or RUN=
    make deploy RUN=<other run> WEIGHT=10           # a second variant beside the first, for 10 % of the requests

INFERENCE_... variables (see src/inference/serve.py) are handed on. The end of the endpoint is scheduled before it is
created; afterwards the artifact's golden samples go through it.
"""

from __future__ import annotations

import base64
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines import runs, terminal
from pipelines.cloud import artifact, images, limits, prices, storage
from pipelines.cloud.account import Account, explained, failure
from pipelines.config import Settings, load
from pipelines.endpoint import expiry, invoke, rollout, scaling, state
from pipelines.endpoint import model as endpoint_model
from pipelines.endpoint.rollout import SECOND, Plan
from pipelines.terminal import UserError

TOLERANCE = 0.02  # of a golden sample's probabilities, as in src/inference/inference.py


def deploy(account: Account, options: Namespace) -> None:
    """Create or update the endpoint, and see that it answers as the artifact did.

    Raises:
        UserError: when it does not run as it should; the message says what is left, and how to remove it.
    """
    settings, only_plan = account.settings, options.plan
    chosen, name = settings.endpoint, state.name(settings, options.endpoint)
    prices.stack(account, only_plan)
    with tempfile.TemporaryDirectory(prefix="deploy-") as folder:
        missing = artifact.Source("an artifact that is not there yet", Path(), [])
        model = prices.look(lambda: artifact.find(account, options, Path(folder)), missing, only_plan)
        facts = prices.look(lambda: state.describe(account, name), None, only_plan)
        old = _config(account, name, facts) if facts else {"ProductionVariants": []}
        _check_limits(settings, old, options.weight)
        image, config = images.uri(account, "serving"), f"{name}-{runs.new_name()}"
        plan = Plan(name, config, image, model.uri or "", model.package, old, options.weight)
        _agree(account, plan, model.label, options.yes, only_plan)
        if not plan.package:
            images.ensure(account, "serving")
        plan = replace(plan, uri=plan.uri or storage.artifact(account, model.archive))
    before, end = expiry.end(account, name), None
    if chosen.ttl_hours:
        end = expiry.end_after(chosen.ttl_hours)
    try:
        expiry.set_end(account, name, end)
        with explained(f"{'updating' if facts else 'creating'} the endpoint {name}"):
            rollout.create(account, plan)
            rollout.start(account, plan)
    except BaseException:
        rollout.undo(account, plan, before)
        raise
    ends = f"deletes itself on {end[3:13]} at {end[14:19]} UTC" if end else "never deletes itself"
    remove = f"`{terminal.command('destroy', ENDPOINT=name)}` removes it"
    try:
        difference = _see(account, plan, model.samples, remove, options.rollback)
    except KeyboardInterrupt:
        again = "its golden samples were not asked and its scaling is not set: `make deploy` again does that"
        raise UserError(f"stopped waiting; {name} goes on and bills, and {ends}; {again}; {remove}", code=130) from None
    print(f"{name} is in service, its {len(model.samples)} golden samples agree within {difference:.4f}")
    print(f"  {state.link(account, name)}")
    print(f"  {terminal.command('invoke', IMAGE='path/to/an/image', ENDPOINT=name)}")
    if plan.weight and Path(__file__).with_name("shift_traffic.py").exists():
        print(f"  {terminal.command('shift-traffic', VARIANT=SECOND, WEIGHT=50, ENDPOINT=name)}")
    if plan.weight:
        print("  `make deploy` goes back to one variant")
    print(f"  it {ends}; {remove}", flush=True)


def _see(account: Account, plan: Plan, samples: list[dict[str, Any]], remove: str, rollback: bool) -> float:
    """Wait until the endpoint runs, send the golden samples through it, and let it scale.

    Returns:
        The largest difference of a probability.
    """
    facts = state.wait(account, plan.name)
    if facts["EndpointStatus"] != "InService" or facts["EndpointConfigName"] != plan.config:
        healthy = facts["EndpointStatus"] == "InService"
        if healthy:
            scaling.scale(account, plan.name, [variant["VariantName"] for variant in facts["ProductionVariants"]])
        what = "went back to what it was" if healthy else f"is {facts['EndpointStatus']}"
        raise UserError(f"{plan.name} {what}: {failure(facts)}; {remove}")
    back = remove
    if plan.old["ProductionVariants"]:
        back = (
            f"go back with `aws sagemaker update-endpoint --endpoint-name {plan.name} --endpoint-config-name "
            f"{plan.old['EndpointConfigName']} --region {account.region}`, or {remove}"
        )
    try:
        difference = _ask_golden(account, facts, samples, SECOND if plan.weight else None, back)
    except UserError as error:
        if rollback and plan.old["ProductionVariants"]:
            rollout.back(account, plan)
            raise UserError(f"{str(error).removesuffix(f'; {back}')}; {plan.name} is back on what it was") from error
        raise
    scaling.scale(account, plan.name, [variant["VariantName"] for variant in facts["ProductionVariants"]])
    return difference


def _config(account: Account, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an endpoint that can be updated.

    Raises:
        UserError: when it is another project's, changes right now, or would change its kind.
    """
    sagemaker = account.client("sagemaker")
    with explained(f"looking up the endpoint {name}"):
        tags = sagemaker.list_tags(ResourceArn=facts["EndpointArn"])["Tags"]
        if not [tag for tag in account.tags() if tag["Key"] == "project" and tag in tags]:
            raise UserError(f"the name {name} is taken by an endpoint of something else; choose another: ENDPOINT=...")
        if facts["EndpointStatus"] != "InService":
            failed = facts["EndpointStatus"] in ("Failed", "OutOfService", "UpdateRollbackFailed")
            step = (
                f"remove it first: `{terminal.command('destroy', ENDPOINT=name)}`"
                if failed
                else "wait until that is over"
            )
            raise UserError(f"{name} is {facts['EndpointStatus']}, so it cannot be updated; {step}")
        config: dict[str, Any] = sagemaker.describe_endpoint_config(EndpointConfigName=facts["EndpointConfigName"])
    kind, serverless = account.settings.endpoint.type, "ServerlessConfig" in config["ProductionVariants"][0]
    now = "async" if "AsyncInferenceConfig" in config else "serverless" if serverless else "realtime"
    if kind != now:  # https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints.html, feature exclusions
        raise UserError(f"{name} is {now} and would become {kind}: AWS does not do that, or its clients could not ask "
                        "it any more; deploy beside it: ENDPOINT=<another name>")  # fmt: skip
    counts = {item["VariantName"]: item.get("DesiredInstanceCount") for item in facts["ProductionVariants"]}
    for variant in config["ProductionVariants"]:  # what runs: its scaling may have made it more than was asked for
        if (count := counts[variant["VariantName"]]) is not None:
            variant["InitialInstanceCount"] = max(count, 1)
    return config


def _check_limits(settings: Settings, old: dict[str, Any], weight: int | None) -> None:
    """Refuse what AWS would refuse, or silently leave out."""
    chosen, serverless = settings.endpoint, settings.endpoint.type == "serverless"
    for reason in limits.endpoint(settings):
        raise UserError(reason)
    if weight is not None:
        if not 1 <= weight <= 99:
            raise UserError(f"WEIGHT is {weight}; the new variant can get from 1 to 99 percent of the requests")
        if chosen.type != "realtime":
            raise UserError(f"TYPE is {chosen.type}; only a realtime endpoint has two variants that can be told apart")
        if not old["ProductionVariants"]:
            raise UserError("there is no endpoint yet for a second variant to stand beside; deploy without WEIGHT")
    elif old["ProductionVariants"] and chosen.rollout != "all_at_once" and chosen.instances < 2 and not serverless:
        raise UserError(f"endpoint.rollout is {chosen.rollout}, whose steps are at most half of the instances; "
                        "set endpoint.instances to at least 2")  # fmt: skip


def _agree(account: Account, plan: Plan, label: str, yes: bool, only_plan: bool) -> None:
    """Say what will be made, where, and what it can cost; go on only inside the budget, and when told to."""
    settings = account.settings
    chosen, update = settings.endpoint, bool(plan.old["ProductionVariants"])
    kind, most, largest = endpoint_model.fleet(settings)
    fleet = [(most, largest)]
    fleet += [(max(old["InitialInstanceCount"], chosen.max_instances), old["InstanceType"]) for old in plan.beside]
    each = [prices.cost(prices.hourly(account, kind, machine), count) for count, machine in fleet]
    hourly = None if None in each else sum(cost or 0.0 for cost in each)
    hours = (chosen.ttl_hours or prices.MONTH) + (rollout.UPDATE_HOURS if update else 0)
    month, where = f"{prices.usd(hourly, prices.MONTH)} a month", prices.where(settings)
    end = f"until it deletes itself after {chosen.ttl_hours:g} hours, {month} if it never did"
    lines = [
        f"{'update' if update else 'create'} the {chosen.type} endpoint {plan.name} in {where}: {label}"
        f"{f' as {SECOND} for {plan.weight} % of the requests' if plan.weight else ''}",
        f"  on {' and '.join(f'at most {count} x {machine}' for count, machine in fleet)}, in "
        f"{'the image of the package' if plan.package else plan.image}",
        f"  {prices.usd(hourly)} an hour at most, {prices.usd(hourly, hours)} {end if chosen.ttl_hours else 'a month'}",
    ]
    lines += [f"  note: {text}" for text in limits.doubts(settings)]
    if kind == "serverless":
        lines.append("  it bills while it answers: that is the price of so many requests at once all the time")
    if not chosen.ttl_hours:
        lines.append(
            f"  WARNING: endpoint.ttl_hours is 0: it never deletes itself and costs {prices.usd(hourly, 24)} a day"
        )
    prices.agree(settings, "\n".join(lines), prices.cost(hourly, hours), yes, only_plan)


def _ask_golden(
    account: Account, facts: dict[str, Any], samples: list[dict[str, Any]], variant: str | None, back: str
) -> float:
    """Compare the endpoint's answers with the artifact's; gives the largest difference of a probability."""
    largest = 0.0
    for number, sample in enumerate(samples):
        try:
            body = base64.b64decode(sample["body"])
            answer = invoke.ask(account, facts, body, sample["content_type"], variant)
        except UserError as error:
            raise UserError(f"golden sample {number} got no answer: {error}; {back}") from error
        pairs = zip(sample["probabilities"], answer["probabilities"][0], strict=True)
        difference = max(abs(expected - found) for expected, found in pairs)
        if answer["labels"][0] != sample["label"] or difference > TOLERANCE:
            raise UserError(
                f"golden sample {number} was {sample['label']!r} and is {answer['labels'][0]!r} at "
                f"{facts['EndpointName']}, with a probability {difference:.3f} apart (allowed: {TOLERANCE}); {back}"
            )
        largest = max(largest, difference)
    return largest


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Put an artifact behind an endpoint on SageMaker.", settings=True)
    artifact.add_options(parser)
    parser.add_argument("--endpoint", variable="ENDPOINT", help="default: endpoint.name")
    parser.add_argument(
        "--type", variable="TYPE", choices=["realtime", "serverless", "async"], help="default: endpoint.type"
    )
    parser.add_argument(
        "--weight", variable="WEIGHT", type=int, help="percent of the requests that a second variant gets"
    )
    parser.add_argument("--rollback", action="store_true", help="undo an update that fails the golden samples")
    parser.add_argument(
        "--yes", variable="YES", action="store_true", help="do not ask, and go on although it is over budget"
    )
    prices.add_plan(parser)
    options = parser.parse_args()
    deploy(Account(load(options.set, options={"endpoint.type": options.type})), options)
    return 0
