"""Make what the project needs in AWS once, or bring it up to date: `make bootstrap`, without a question with `YES=1`.

    python -m pipelines bootstrap --yes --set aws.email=me@example.com

One CloudFormation stack, of the files in `infrastructure/`. The plan that it shows before it asks is CloudFormation's.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from pipelines import project, terminal
from pipelines.cloud import stack
from pipelines.cloud.account import Account, confirm, explained, pages
from pipelines.config import Settings, load
from pipelines.terminal import UserError

COST = (
    "by itself it costs nothing; what is put into it does: "
    "about 0.02 USD a GB and month in the bucket, 0.10 in the repository"
)


def bootstrap(account: Account, yes: bool) -> None:
    """Make or update the stack; see the module's docstring."""
    from botocore.exceptions import ClientError

    name, settings = project.name(), account.settings
    with explained(f"making the stack {name}"):
        cloud = account.client("cloudformation")
        caller = account.client("sts").get_caller_identity()
        number = caller["Account"]
        found = stack.usable(cloud, name)
        near = neighbours(cloud, name, project.tuning_prefix())
        if near and not found:
            raise UserError(f"the name {name} begins like that of the project {near[0]}, which is in this account and "
                            "region: their roles could not tell what is whose; choose a name in pyproject.toml of "
                            f"which neither begins with the other (the first {len(project.tuning_prefix())} characters "
                            "are the name of tuning jobs)")  # fmt: skip
        current = {item["ParameterKey"]: item["ParameterValue"] for item in (found or {}).get("Parameters", [])}
        values = stack.parameters(account, caller["Arn"], current)
        made = cloud.create_change_set(
            StackName=name, ChangeSetName=f"bootstrap-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}",
            ChangeSetType="UPDATE" if found else "CREATE", TemplateBody=stack.template(settings, number),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in values.items()],
            Tags=account.tags(), Capabilities=["CAPABILITY_IAM"],
            ImportExistingResources=True,  # bucket and repository of a stack that was removed
        )  # fmt: skip
        change_set, made_id = made["Id"], made["StackId"]
        try:
            changes = stack.changes(cloud, change_set)
            if changes:
                bucket = stack.bucket_name(settings, number)
                head = f"stack {name} in {account.region}, account {number}, bucket {bucket}"
                told = [f"WARNING: its name begins like that of {other}: docs/aws.md, names" for other in near]
                confirm("\n".join([f"{head}:", *changes, *told, *_notes(settings, values), COST]), yes)
                cloud.execute_change_set(ChangeSetName=change_set)
        except (UserError, ClientError, KeyboardInterrupt):  # refused: nothing has begun
            stack.discard(cloud, change_set, None if found else made_id)
            raise
        if changes:
            stack.finish(cloud, made_id, name, new=not found)
        else:
            stack.discard(cloud, change_set, None)
            print(f"the stack {name} is up to date")
        described = stack.find(cloud, made_id) or {}
    for output in sorted(described.get("Outputs", []), key=lambda output: str(output["OutputKey"])):
        print(f"  {output['OutputKey']:15}{output['OutputValue']}")
    if changes and values["Email"]:
        print(f"AWS sends a mail to {values['Email']}: notifications begin when its link has been followed")


def neighbours(cloud: Any, name: str, short: str) -> list[str]:
    """Other projects of this template in account and region whose names policies cannot tell from this one's.

    What has no tags goes by its name: `fraud-cards-end` may be a schedule of `fraud` or of `fraud-cards`.
    """
    found = []
    for made in pages(cloud, "describe_stacks", "Stacks"):
        given = {item["ParameterKey"]: item.get("ParameterValue", "") for item in made.get("Parameters", [])}
        theirs = given.get("Project", "")
        if theirs in ("", name) or "ShortProject" not in given or made["StackStatus"] == "DELETE_COMPLETE":
            continue
        pairs = itertools.product((name, short), (theirs, given["ShortProject"]))
        found += [theirs] * any(a.startswith(b) or b.startswith(a) for a, b in pairs)
    return sorted(found)


def _notes(settings: Settings, values: dict[str, str]) -> list[str]:
    notes = []
    if values.get("GitHubRepository"):
        notes.append(f"workflows of {values['GitHubRepository']}, branch {values['GitHubBranch']}, may run the verbs")
    for name, what in {"PipelineSchedule": "", "Watch": "new data under "}.items():
        if values.get(name):
            notes.append(f"{what}{values[name]} starts the pipeline, at the price that `make pipeline` says")
    if settings.pipeline.deploy_on_approval:
        notes.append("an approved model package is deployed without a question, at the price that `make deploy` says")
    if values["Email"] and settings.aws.monthly_usd and "MonthlyUsd" not in values:
        notes.append(f"no budget alarm: CloudFormation has none in {settings.aws.region}")
    return notes


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Make what the project needs in AWS once, or bring it up to date.", settings=True)
    parser.add_argument("--yes", variable="YES", action="store_true", help="do not ask")
    options = parser.parse_args()
    bootstrap(Account(load(options.set)), options.yes)
    return 0
