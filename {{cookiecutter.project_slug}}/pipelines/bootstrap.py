"""Make what the project needs in AWS once, or bring it up to date: `make bootstrap`, without a question with `YES=1`.

    python -m pipelines.bootstrap --yes --set aws.email=me@example.com

One CloudFormation stack, `infrastructure/stack.yaml`. The plan that is shown before it asks is CloudFormation's own.
"""

from __future__ import annotations

import json
import re
import subprocess
import time

import yaml

from pipelines import ROOT, aws, console, engine, logs, stack
from pipelines.config import Settings, load
from pipelines.console import UserError

TEMPLATE = ROOT / "infrastructure" / "stack.yaml"
GITHUB = "token.actions.githubusercontent.com"
REGISTRY = re.compile(r"(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/([^:@]+)")
BUDGET_REGIONS = ["ap-northeast-1", "ap-northeast-2", "ap-south-1", "ap-southeast-1", "ap-southeast-2", "ca-central-1",
                  "eu-central-1", "eu-west-1", "eu-west-2", "eu-west-3", "me-south-1", "sa-east-1", "us-east-1",
                  "us-east-2", "us-west-1", "us-west-2"]  # where CloudFormation has budgets in dollars  # fmt: skip
COST = (
    "by itself it costs nothing; what is put into it does: "
    "about 0.02 USD a GB and month in the bucket, 0.10 in the repository"
)


def bucket_name(settings: Settings, account: str) -> str:
    """The project's bucket; its name is unique because an account's number is."""
    return f"{engine.project_name()}-{account}-{settings.aws.region}"


def template(settings: Settings, account: str) -> str:
    """The template as it is sent, with literal names for what survives the stack."""
    document = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    resources = document["Resources"]
    resources["Bucket"]["Properties"]["BucketName"] = bucket_name(settings, account)
    resources["ImageRepository"]["Properties"]["RepositoryName"] = engine.project_name()
    if settings.aws.region not in BUDGET_REGIONS:  # an unknown type is refused even when its condition is false
        del resources["Budget"], document["Conditions"]["HasBudget"], document["Parameters"]["MonthlyUsd"]
    if not settings.pipeline.deploy_on_approval:
        del resources["Deployment"]
    return json.dumps(document)


def parameters(settings: Settings, identity: str, current: dict[str, str]) -> dict[str, str]:
    """Values of the template's parameters.

    Args:
        settings: what they are made of.
        identity: ARN of the caller, for the partition.
        current: those of the stack as it is.
    """
    found = {
        "Project": engine.project_name(),
        "ShortProject": logs.short(),
        "UseVpc": str(bool(settings.aws.subnets)).lower(),
    }
    found["RemoteDebug"] = str(settings.compute.remote_debug).lower()
    found["Email"] = "" if settings.aws.email == "none" else settings.aws.email
    if settings.aws.region in BUDGET_REGIONS:
        found["MonthlyUsd"] = f"{settings.aws.monthly_usd:g}"
    found["KmsKey"] = ""
    if settings.aws.kms_key != "none":  # a policy needs the key itself, not an alias
        described = aws.client(settings, "kms").describe_key(KeyId=settings.aws.kms_key)
        found["KmsKey"] = described["KeyMetadata"]["Arn"]
    images = filter(None, map(REGISTRY.match, (settings.images.training, settings.images.serving)))
    repositories = {f"arn:{identity.split(':')[1]}:ecr:{i[2]}:{i[1]}:repository/{i[3]}" for i in images}
    found["MoreRepositories"] = ",".join(sorted(repositories))
    repository, subjects, branch = _parsed(_github(settings))
    found |= {"GitHubRepository": repository, "GitHubSubjects": subjects, "GitHubBranch": branch}
    found["CreateGitHubProvider"] = "false"
    chosen = settings.pipeline
    if chosen.deploy_on_approval and not repository:
        raise UserError("pipeline.deploy_on_approval needs the repository to deploy from; set aws.github to owner/name")
    found["DeployOnApproval"] = str(chosen.deploy_on_approval).lower()
    asked = {"PipelineSchedule": chosen.schedule, "Watch": chosen.watch, "Connection": chosen.connection}
    found |= {name: "" if value == "none" else value for name, value in asked.items()}
    if repository:
        owned = current.get("GitHubRepository") and current.get("CreateGitHubProvider") == "true"
        listed = aws.client(settings, "iam").list_open_id_connect_providers()["OpenIDConnectProviderList"]
        taken = any(provider["Arn"].endswith(f"/{GITHUB}") for provider in listed)
        found["CreateGitHubProvider"] = "true" if owned or not taken else "false"
    return found


def _github(settings: Settings) -> str:
    if settings.aws.github != "auto":
        return settings.aws.github.removeprefix("none")
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    origin = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    match = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(\.git)?/?$", origin)
    if match is None:
        raise UserError(f"aws.github is auto, but git's origin is {origin or 'not set'!r}, not on github.com; "
                        "write owner/name, or none")  # fmt: skip
    return match[1]


def _parsed(github: str) -> tuple[str, str, str]:
    """Repository, the two names that GitHub's tokens may give it, and branch.

    In tokens of repositories made after July 2026 the numbers of owner and repository follow their names. Where they
    are not known any will do: owner and name still have to agree.
    """
    owner, _, rest = github.partition("/")
    owner, _, number = owner.partition("@")
    name, *more = rest.split("@")
    repository, branch = f"{owner}/{name}" if owner else "", more[-1] if len(more) > bool(number) else "main"
    numbered = f"{owner}@{number}/{name}@{more[0]}" if number else f"{owner}@*/{name}@*"
    names = [numbered if number else repository, numbered] if owner else ["", ""]
    return repository, ",".join(names), branch


def bootstrap(settings: Settings, yes: bool) -> None:
    """Make or update the stack; see the module's docstring."""
    from botocore.exceptions import ClientError

    name = engine.project_name()
    with aws.explained(f"making the stack {name}"):
        cloud = aws.client(settings, "cloudformation")
        caller = aws.client(settings, "sts").get_caller_identity()
        account = caller["Account"]
        found = stack.usable(cloud, name)
        current = {item["ParameterKey"]: item["ParameterValue"] for item in (found or {}).get("Parameters", [])}
        values = parameters(settings, caller["Arn"], current)
        made = cloud.create_change_set(
            StackName=name, ChangeSetName=f"bootstrap-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}",
            ChangeSetType="UPDATE" if found else "CREATE", TemplateBody=template(settings, account),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in values.items()],
            Tags=aws.tags(settings), Capabilities=["CAPABILITY_IAM"],
            ImportExistingResources=True,  # bucket and repository of a stack that was removed
        )  # fmt: skip
        change_set, made_id = made["Id"], made["StackId"]
        try:
            changes = stack.changes(cloud, change_set)
            if changes:
                head = (
                    f"stack {name} in {settings.aws.region}, account {account}, bucket {bucket_name(settings, account)}"
                )
                aws.confirm("\n".join([f"{head}:", *changes, *_notes(settings, values), COST]), yes)
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


def _notes(settings: Settings, values: dict[str, str]) -> list[str]:
    notes = []
    if values["GitHubRepository"]:
        notes.append(f"workflows of {values['GitHubRepository']}, branch {values['GitHubBranch']}, may run the verbs")
    for name, what in {"PipelineSchedule": "", "Watch": "new data under "}.items():
        if values[name]:
            notes.append(f"{what}{values[name]} starts the pipeline, at the price that `make pipeline` says")
    if settings.pipeline.deploy_on_approval:
        notes.append("an approved model package is deployed without a question, at the price that `make deploy` says")
    if values["Email"] and settings.aws.monthly_usd and "MonthlyUsd" not in values:
        notes.append(f"no budget alarm: CloudFormation has none in {settings.aws.region}")
    return notes


def main() -> int:
    """Command line; see the module's docstring."""
    parser = console.parser("Make what the project needs in AWS once, or bring it up to date.", settings=True)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args()
    bootstrap(load(options.set), options.yes)
    return 0


if __name__ == "__main__":
    console.run_verb(main)
