"""Move requests between the variants of an endpoint: `make shift-traffic VARIANT=challenger WEIGHT=50`.

python -m pipelines shift-traffic --variant challenger --weight 100 --endpoint image-classifier-eu
"""

from __future__ import annotations

from pipelines import terminal
from pipelines.cloud.account import Account, explained, failure
from pipelines.config import load
from pipelines.endpoint import state
from pipelines.terminal import UserError


def shift(account: Account, name: str, chosen: str, percent: int) -> dict[str, float]:
    """Give a variant its percentage; the others share the rest as before. Returns the percentage of each.

    Raises:
        UserError: when there is no such variant, or only one.
    """
    facts = state.running(account, name)
    weights = {item["VariantName"]: float(item.get("CurrentWeight") or 0.0) for item in facts["ProductionVariants"]}
    if chosen not in weights or len(weights) < 2:
        raise UserError(
            f"VARIANT is {chosen!r}; {name} has {', '.join(weights)}; `make deploy WEIGHT=10` makes a second one"
        )
    if not 0 <= percent <= 100:
        raise UserError(f"WEIGHT is {percent}; a variant gets from 0 to 100 percent of the requests")
    others = {key: weight for key, weight in weights.items() if key != chosen}
    total = sum(others.values())
    shares = {
        key: (100 - percent) * (weight / total if total else 1 / len(others)) for key, weight in others.items()
    } | {chosen: float(percent)}
    with explained(f"moving requests to {chosen}"):  # by boto3: the SDK leaves a weight of 0 out of the request
        account.client("sagemaker").update_endpoint_weights_and_capacities(
            EndpointName=name,
            DesiredWeightsAndCapacities=[{"VariantName": key, "DesiredWeight": share} for key, share in shares.items()],
        )
    return shares


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Move requests between the variants of an endpoint.", settings=True)
    parser.add_argument("--variant", variable="VARIANT", required=True, help="the one that gets WEIGHT percent")
    parser.add_argument("--weight", variable="WEIGHT", type=int, required=True, help="percent of the requests")
    parser.add_argument("--endpoint", variable="ENDPOINT", help="default: endpoint.name")
    options = parser.parse_args()
    account = Account(load(options.set))
    name = state.name(account.settings, options.endpoint)
    shares = shift(account, name, options.variant, options.weight)
    now = state.wait(account, name)
    print(f"{name}: {', '.join(f'{key} {share:g} %' for key, share in sorted(shares.items()))}")
    if now["EndpointStatus"] != "InService":
        raise UserError(f"{name} is {now['EndpointStatus']}: {failure(now)}")
    return 0
