"""Answers that were lost: the request was carried out, botocore sends it again, and AWS refuses that as a repetition.

A name of a job, a model or a configuration is given once, so what is there under it is what the first attempt made.
Every client of an account looks, those of the SDK too, and hands on the answer that did not come. Pipelines, packages
and schedules do without: their requests have a token by which AWS knows a repetition.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pipelines.cloud import errors

if TYPE_CHECKING:
    from pipelines.cloud.account import Account

REPEATED = re.compile(r"already exist|in-progress", re.IGNORECASE)  # of something new; of an update of an endpoint
CHANGE = re.compile(r"(?:Create|Update)(.+?)(?:WeightsAndCapacities)?")


def watch(account: Account, session: Any) -> None:
    """Let the clients that come from botocore's `session` find the answers of SageMaker's that were lost."""
    from botocore import xform_name

    def remember(params: Any, context: Any, **_: Any) -> None:
        context["asked"] = params

    def recover(http_response: Any, parsed: Any, model: Any, context: Any, **_: Any) -> None:
        change, error = CHANGE.fullmatch(model.name), parsed.get("Error")
        if not change or not error or not parsed["ResponseMetadata"].get("RetryAttempts"):
            return
        if error["Code"] != "ResourceInUse" and not REPEATED.search(error["Message"]):
            return
        kind, asked = change[1], context["asked"]
        try:
            describe = getattr(account.client("sagemaker"), f"describe_{xform_name(kind)}")
            facts = describe(**{f"{kind}Name": asked[f"{kind}Name"]})
        except errors.of_requests():
            return  # what AWS said stands
        if _same(facts, asked):
            http_response.status_code = 200
            del parsed["Error"]
            parsed[f"{kind}Arn"] = facts[f"{kind}Arn"]

    session.register("before-parameter-build.sagemaker", remember)
    session.register("after-call.sagemaker", recover)


def _same(facts: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether what is there is what was asked for: a name may be somebody else's."""
    facts = {**facts, **facts.get("PendingDeploymentSummary", {})}
    weights = {item["VariantName"]: item.get("DesiredWeight") for item in facts.get("ProductionVariants", [])}
    wanted = {item["VariantName"]: item["DesiredWeight"] for item in asked.get("DesiredWeightsAndCapacities", [])}
    return weights | wanted == weights and all(
        facts.get(key, value) == value for key, value in asked.items() if isinstance(value, str)
    )
