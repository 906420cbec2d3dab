"""Approve or reject a registered model: `make approve`, `make approve PACKAGE=3`, `make approve ARGS=--reject`.

    python -m pipelines approve --package 3 --yes

Without PACKAGE it is the newest one that waits. The newest approved package is the champion: `make deploy
PACKAGE=champion`, and what the pipeline measures a new model against.
"""

from __future__ import annotations

from pipelines import terminal
from pipelines.cloud import packages
from pipelines.cloud.account import Account, confirm, explained
from pipelines.cloud.packages import APPROVED, PENDING, REJECTED
from pipelines.config import load
from pipelines.terminal import UserError


def approve(account: Account, wanted: str | None, reject: bool, yes: bool) -> None:
    """Show a package beside the champion, ask, and set its status.

    Raises:
        UserError: when there is none, or the answer is no.
    """
    chosen = packages.find(account, wanted) if wanted else packages.newest(account, PENDING)
    if chosen is None:
        raise UserError(f"no package of {packages.group()} waits for approval; `make register` makes one")
    best, status = packages.champion(account), REJECTED if reject else APPROVED
    if chosen.status == status:
        print(f"{chosen} is {status} already")
        return
    facts = [f"  {name:20} {value}" for name, value in chosen.metadata.items()]
    plan = [f"{'rejects' if reject else 'approves'} {chosen}, which is {chosen.status}", *facts,
            f"the champion is {best or 'none yet'}"]  # fmt: skip
    if best and not reject and chosen.accuracy < best.accuracy:
        plan.append(f"WARNING: its accuracy is {best.accuracy - chosen.accuracy:.4f} below the champion's")
    confirm("\n".join(plan), yes)
    with explained(f"setting {chosen.arn} to {status}"):
        account.client("sagemaker").update_model_package(ModelPackageArn=chosen.arn, ModelApprovalStatus=status)
    after = packages.champion(account)
    print(f"{chosen.arn} is {status}; the champion is {after or 'none'}")
    if after:
        print("deploy it with `make deploy PACKAGE=champion`")


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Approve or reject a registered model.", settings=True)
    parser.add_argument(
        "--package", variable="PACKAGE", help="version, or ARN (default: the newest that waits for approval)"
    )
    parser.add_argument("--reject", action="store_true", help="reject it instead")
    parser.add_argument("--yes", variable="YES", action="store_true", help="do not ask")
    options = parser.parse_args()
    approve(Account(load(options.set)), options.package, options.reject, options.yes)
    return 0
