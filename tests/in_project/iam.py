"""The policies of the stack's template, with their values in place; `policies.py`, the rehearsal's, evaluates them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipelines.cloud import stack
from tests.policies import Context, UnknownError, allowed


class Template:
    """The stack's template with parameters and pseudo parameters in place."""

    def __init__(self, values: Mapping[str, Any], arns: Mapping[str, str]) -> None:
        """`arns`: of resources, as `GetAtt` gives them; a list's value is written as CloudFormation takes it."""
        self.document = stack.joined()
        given = self.document["Parameters"]
        defaults = {name: parameter.get("Default", "") for name, parameter in given.items()}
        self.values = defaults | dict(values)
        for name, parameter in given.items():
            if parameter["Type"] == "CommaDelimitedList":
                self.values[name] = str(self.values[name]).split(",")
        self.arns = arns

    def condition(self, name: str) -> bool:
        """A condition of the template."""
        return bool(self.true(self.document["Conditions"][name]))

    def true(self, node: Any) -> bool:
        """A condition function."""
        ((function, given),) = node.items()
        if function == "Condition":
            return self.condition(given)
        if function == "Fn::Not":
            return not self.true(given[0])
        if function in ("Fn::And", "Fn::Or"):
            return (all if function == "Fn::And" else any)(self.true(part) for part in given)
        if function == "Fn::Equals":
            return str(self.resolve(given[0])) == str(self.resolve(given[1]))
        raise UnknownError(function)

    def resolve(self, node: Any) -> Any:
        """A part of the template as CloudFormation would hand it on; None for AWS::NoValue."""
        if isinstance(node, list):
            found = [self.resolve(item) for item in node]
            return [item for item in found if item is not None]
        if not isinstance(node, dict):
            return node
        if len(node) == 1 and (name := str(next(iter(node)))).startswith(("Ref", "Fn::")):
            return self.function(name, node[name])
        resolved = {key: self.resolve(item) for key, item in node.items()}
        return {key: item for key, item in resolved.items() if item is not None}

    def function(self, name: str, given: Any) -> Any:
        """An intrinsic function."""
        if name == "Ref":
            if given == "AWS::NoValue":
                return None
            return self.values[given] if given in self.values else self.arns[given]
        if name == "Fn::GetAtt":
            return self.arns[given[0]] if given[1] == "Arn" else self.arns[".".join(given)]
        if name == "Fn::If":
            return self.resolve(given[1] if self.condition(given[0]) else given[2])
        if name == "Fn::Sub":
            text, own = (given[0], self.resolve(given[1])) if isinstance(given, list) else (given, {})
            values = {**self.values, **{f"{key}.Arn": arn for key, arn in self.arns.items()}, **own}
            return re.sub(r"\$\{(.+?)\}", lambda match: str(values[match[1]]), text)
        if name == "Fn::Select":
            return self.resolve(given[1])[int(given[0])]
        if name == "Fn::Join":
            return str(given[0]).join(self.resolve(given[1]))
        raise UnknownError(name)

    def policies(self, name: str) -> list[dict[str, Any]]:
        """Those of a role, with the managed policies of the stack that it has, or of a managed policy."""
        resources = self.document["Resources"]
        properties = resources[name]["Properties"]
        found = [self.resolve(properties["PolicyDocument"])] if "PolicyDocument" in properties else []
        found += [self.resolve(policy["PolicyDocument"]) for policy in properties.get("Policies", [])]
        attached = self.resolve(properties.get("ManagedPolicyArns", []))
        for other, resource in resources.items():
            if resource["Type"] == "AWS::IAM::ManagedPolicy" and other != name:
                there = "Condition" not in resource or self.condition(resource["Condition"])
                if there and (
                    self.arns[other] in attached
                    or self.arns.get(name) in self.resolve(resource["Properties"].get("Roles", []))
                ):
                    found.append(self.resolve(resource["Properties"]["PolicyDocument"]))  # fmt: skip
        return found

    def trusts(self, role: str, who: str, action: str, context: Context) -> bool:
        """Whether a role's trust policy lets somebody in."""
        document = self.resolve(self.document["Resources"][role]["Properties"]["AssumeRolePolicyDocument"])
        return allowed([document], action, "", context, who)
