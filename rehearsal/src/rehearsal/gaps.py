"""What moto 5.2.5 does not do, or not as AWS does, beyond what the other modules take over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from moto.cloudformation import models, parsing

from rehearsal import iam, policies
from rehearsal.operations import CALLER, Account, Answer, Request, operation, page

# USD an hour on demand in us-east-1, for each use; a second of a GB of memory without instances.
RECORDED = {
    "ml.t3.medium": 0.05, "ml.m5.large": 0.115, "ml.m5.xlarge": 0.23, "ml.m5.2xlarge": 0.461, "ml.m5.4xlarge": 0.922,
    "ml.c5.xlarge": 0.204, "ml.c5.2xlarge": 0.408, "ml.g4dn.xlarge": 0.7364, "ml.g5.xlarge": 1.408,
    "ml.g5.2xlarge": 1.515, "ml.p3.2xlarge": 3.825,
}  # fmt: skip
SERVERLESS = 0.00002
NOTE = "recorded by the rehearsal; ask https://aws.amazon.com/sagemaker/pricing/ for what it is today"


def mend() -> None:
    """What moto does to stacks: no outputs after a change set, lists as parameters, roles that nobody deletes.

    Asking for what a stack gives out, or for its resources, makes them: before it is there, and again when it is gone.
    """
    stacks: Any = models.Stack
    changes: Any = models.ChangeSet
    resource_map: Any = parsing.ResourceMap
    original = changes.apply
    if original.__name__ != "apply":
        return
    listed = stacks.parameter_list.fget

    def as_text(self: Any) -> list[dict[str, Any]]:
        given: list[dict[str, Any]] = listed(self)
        for item in given:
            if isinstance(item["ParameterValue"], list):
                item["ParameterValue"] = ",".join(item["ParameterValue"])
        return given

    stacks.parameter_list = property(as_text)
    for name in ("outputs", "exports"):
        asked = getattr(stacks, name).fget
        setattr(stacks, name, property(partial(_while_there, asked)))

    deleted, resources = resource_map.delete, stacks.stack_resources.fget

    def remembered(self: Any) -> None:
        self.gone = [made for name, made in self._parsed_resources.items() if name in self._resource_json_map and made]
        deleted(self)

    resource_map.delete = remembered
    stacks.stack_resources = property(
        lambda self: self.resource_map.gone if self.status.startswith("DELETE") else resources(self)
    )

    def with_outputs(self: Any) -> None:
        original(self)
        self.stack.output_map = parsing.OutputMap(self.stack.resource_map, self.template_dict, self.stack_id)

    changes.apply = with_outputs


def _while_there(asked: Callable[[Any], list[Any]], stack: Any) -> list[Any]:
    return [] if stack.status.startswith(("REVIEW", "DELETE")) else asked(stack)


@operation("sts", "GetCallerIdentity")
def identity(account: Account, _: Request) -> Answer:
    """Who asks."""
    arn = CALLER.get().principal
    return {"UserId": arn.rpartition("/")[2].rpartition(":")[2], "Account": account.number, "Arn": arn}


@operation("pricing", "GetProducts")
def prices(_: Account, request: Request) -> Answer:
    """What a use of an instance type costs, as recorded; nothing for one that is not."""
    usage = next((entry["Value"] for entry in request.get("Filters", []) if entry["Field"] == "usagetype"), "")
    kind, machine = usage.split(":", 1) if ":" in usage else ("", usage)
    memory = re.fullmatch(r"Mem-(\d)GB", machine) if kind == "ServerlessInf" else None
    price = SERVERLESS * int(memory[1]) if memory else RECORDED.get(machine)
    if price is None:
        return {"PriceList": []}
    step = {"unit": "Seconds" if memory else "Hrs", "pricePerUnit": {"USD": f"{price:.7f}"}, "description": NOTE}
    terms = {"OnDemand": {"recorded": {"priceDimensions": {"recorded": step}}}}
    return {"PriceList": [json.dumps({"product": {"attributes": {"usagetype": usage}}, "terms": terms})]}


@operation("iam", "SimulatePrincipalPolicy")
def simulate(account: Account, request: Request) -> Answer:
    """What the policies of a user or role say of requests that nobody makes."""
    found = iam.policies(account, request["PolicySourceArn"])
    context = {entry["ContextKeyName"]: entry["ContextKeyValues"] for entry in request.get("ContextEntries", [])}
    context = {key: values[0] if len(values) == 1 else values for key, values in context.items()}
    results = []
    for action in request["ActionNames"]:
        for resource in request.get("ResourceArns") or ["*"]:
            right = found is None or policies.allowed(found, action, resource, context, request["PolicySourceArn"])
            decision = "allowed" if right else "implicitDeny"
            results.append({"EvalActionName": action, "EvalResourceName": resource, "EvalDecision": decision})
    return {"IsTruncated": False} | page(results, {}, "EvaluationResults", len(results))
