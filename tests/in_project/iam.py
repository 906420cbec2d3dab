"""What IAM would answer: the template's policies with their values in place, and the rules by which AWS evaluates them.

It knows what our policies use: allow and deny, wildcards of actions and resources, NotAction and NotResource, and the
operators below. Whatever else a policy says is refused, because a guess would make a test that proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.cloud import stack

Context = Mapping[str, str | list[str]]
STATEMENT = {"Sid", "Effect", "Action", "NotAction", "Resource", "NotResource", "Condition", "Principal"}
SEVERAL = ("sagemaker:Vpc",)  # what the keys begin with that have several values


class UnknownError(Exception):
    """A policy says something that this evaluator does not know."""


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def like(pattern: str, text: str, ignore_case: bool = False) -> bool:
    """Whether IAM's wildcards match: `*` is any characters, also / and :, and `?` is one."""
    if "${" in pattern:
        raise UnknownError(f"policy variable in {pattern}")
    parts = ".*".join(".".join(map(re.escape, part.split("?"))) for part in pattern.split("*"))
    return re.fullmatch(parts, text, re.DOTALL | (re.IGNORECASE if ignore_case else 0)) is not None


def _compare(operator: str, wanted: list[Any], value: str) -> bool:
    """One value of the request with those of the policy."""
    wanted = [str(item).lower() if isinstance(item, bool) else item for item in wanted]
    if operator == "StringEquals":
        return value in wanted
    if operator == "StringNotEquals":
        return value not in wanted
    if operator in ("StringLike", "ArnLike", "ArnEquals"):
        return any(like(item, value) for item in wanted)
    if operator == "Bool":
        return value.lower() in [item.lower() for item in wanted]
    raise UnknownError(f"operator {operator}")


def holds(condition: Mapping[str, Mapping[str, Any]], context: Context) -> bool:
    """Whether every operator and every key of a condition agrees with the request."""
    folded = {key.lower(): value for key, value in context.items()}
    for named, tests in condition.items():
        quantity, _, operator = named.rpartition(":")
        if quantity not in ("", "ForAllValues", "ForAnyValue"):
            raise UnknownError(f"operator {named}")
        optional = operator.endswith("IfExists")
        operator = operator.removesuffix("IfExists")
        for key, wanted in tests.items():
            values = listed(folded[key.lower()]) if key.lower() in folded else []
            if operator == "Null":
                ok = str(listed(wanted)[0]).lower() == str(not values).lower()
            elif len(values) > 1 and not quantity:
                raise UnknownError(f"{key} has several values, and {named} is for one")
            else:
                answers = [_compare(operator, listed(wanted), value) for value in values]
                negated = "Not" in operator
                ok = (all(answers) if quantity == "ForAllValues" else
                      any(answers) if quantity or values else optional or negated)  # fmt: skip
                _compare(operator, listed(wanted), "")  # refuses an unknown one also where the key is absent
            if not ok:
                return False
    return True


def applies(statement: Mapping[str, Any], action: str, resource: str, context: Context) -> bool:
    """Whether a statement is about a request."""
    if strange := set(statement) - STATEMENT:
        raise UnknownError(f"{', '.join(sorted(strange))} in a statement")
    if "Action" in statement:
        named = any(like(item, action, ignore_case=True) for item in listed(statement["Action"]))
    else:
        named = not any(like(item, action, ignore_case=True) for item in listed(statement["NotAction"]))
    if "Resource" in statement:
        there = any(like(item, resource) for item in listed(statement["Resource"]))
    elif "NotResource" in statement:
        there = not any(like(item, resource) for item in listed(statement["NotResource"]))
    else:
        there = True  # of a trust policy
    # The condition is evaluated in any case, so that an unknown operator never hides behind another action.
    return holds(statement.get("Condition", {}), context) and named and there


def allowed(policies: Iterable[Mapping[str, Any]], action: str, resource: str, context: Context) -> bool:
    """Whether policies together allow an action on a resource: a deny wins, and what nothing allows is denied."""
    statements = [statement for policy in policies for statement in listed(policy["Statement"])]
    found = [statement["Effect"] for statement in statements if applies(statement, action, resource, context)]
    if set(found) - {"Allow", "Deny"}:
        raise UnknownError(f"effects {found}")
    return "Allow" in found and "Deny" not in found


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

    def trusts(self, role: str, action: str, context: Context) -> bool:
        """Whether a role's trust policy lets somebody in."""
        document = self.resolve(self.document["Resources"][role]["Properties"]["AssumeRolePolicyDocument"])
        return allowed([document], action, "", context)
