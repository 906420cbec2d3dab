"""What policies say of a request, by the rules of IAM.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html. What a policy says that this
evaluator does not know is an error, because a guess would prove nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Context = dict[str, Any]  # what conditions know of a request
STATEMENT = {"Sid", "Effect", "Action", "NotAction", "Resource", "NotResource", "Condition", "Principal"}
STUDIO = re.compile(r"\$\{sagemaker:(DomainId|UserProfileName)\}")  # which requests have in Studio, and nowhere else


class UnknownError(Exception):
    """A policy says something that this evaluator does not know."""


def listed(value: Any) -> list[Any]:
    """One or several, as policies have it."""
    return value if isinstance(value, list) else [value]


def like(pattern: str, text: str, ignore_case: bool = False) -> bool:
    """Whether IAM's wildcards match: `*` is any characters, also / and :, and `?` is one."""
    if STUDIO.search(pattern):
        return False
    if "${" in pattern:
        raise UnknownError(f"policy variable in {pattern}")
    parts = ".*".join(".".join(map(re.escape, part.split("?"))) for part in pattern.split("*"))
    return re.fullmatch(parts, text, re.DOTALL | (re.IGNORECASE if ignore_case else 0)) is not None


COMPARED: dict[str, Callable[[str, str], bool]] = {
    "StringEquals": lambda wanted, value: value == wanted,
    "StringEqualsIgnoreCase": lambda wanted, value: value.lower() == wanted.lower(),
    "StringLike": like,
    "ArnEquals": like,
    "ArnLike": like,
    "Bool": lambda wanted, value: value.lower() == wanted.lower(),
}  # fmt: skip


def _compare(operator: str, wanted: list[Any], value: str) -> bool:
    """One value of the request with those of the policy."""
    compared = COMPARED.get(operator.replace("Not", ""))
    if not compared:
        raise UnknownError(f"operator {operator}")
    texts = [str(item).lower() if isinstance(item, bool) else item for item in wanted]
    return any(compared(item, value) for item in texts) == ("Not" not in operator)


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
                ok = (all(answers) if quantity == "ForAllValues" else
                      any(answers) if quantity or values else optional or "Not" in operator)  # fmt: skip
                _compare(operator, listed(wanted), "")  # refuses an unknown one also where the key is absent
            if not ok:
                return False
    return True


def applies(statement: Mapping[str, Any], action: str, resource: str, context: Context, who: str = "") -> bool:
    """Whether a statement is about a request."""
    if strange := set(statement) - STATEMENT:
        raise UnknownError(f"{', '.join(sorted(strange))} in a statement")
    named = any(like(item, action, True) for item in listed(statement.get("Action", statement.get("NotAction"))))
    there = any(like(item, resource) for item in listed(statement.get("Resource", statement.get("NotResource", "*"))))
    people = statement.get("Principal", "*")
    meant = people == "*" or any(like(item, who) for part in people.values() for item in listed(part))
    # The condition is evaluated in any case, so that an unknown operator never hides behind another action.
    right = holds(statement.get("Condition", {}), context)
    return right and meant and named == ("Action" in statement) and there == ("NotResource" not in statement)


def allowed(policies: Iterable[Mapping[str, Any]], action: str, resource: str, context: Context, who: str = "") -> bool:
    """Whether policies together allow an action on a resource: a deny wins, and what nothing allows is denied."""
    statements = [statement for policy in policies for statement in listed(policy["Statement"])]
    found = [statement["Effect"] for statement in statements if applies(statement, action, resource, context, who)]
    if set(found) - {"Allow", "Deny"}:
        raise UnknownError(f"effects {found}")
    return "Allow" in found and "Deny" not in found
