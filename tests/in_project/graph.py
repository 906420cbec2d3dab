"""The graph of a pipeline's definition as Mermaid: what a page of the project shows must be this."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

USES = re.compile(r'"Steps\.(\w+)\.(?:\w+\.Outputs\[\'(\w+)\'\]|PropertyFiles\.(\w+)|(\w+))')

Edge = tuple[str, str, str]  # from, to, what goes along


def edges(document: dict[str, Any]) -> Iterator[Edge]:
    """Which step gives what to which, and where the gate leads."""
    for step in document["Steps"]:
        branches = {key: step["Arguments"].get(key, []) for key in ("IfSteps", "ElseSteps")}
        own = {key: value for key, value in step["Arguments"].items() if key not in branches}
        used: dict[str, list[str]] = {}
        for name, output, file, other in USES.findall(json.dumps(own)):
            what = output or file.lower() or {"ModelArtifacts": "model"}[other]
            used.setdefault(name, []).extend([] if what in used.get(name, []) else [what])
        yield from ((name, step["Name"], ", ".join(what)) for name, what in used.items())
        for key, label in (("IfSteps", "passed"), ("ElseSteps", "not passed")):
            yield from ((step["Name"], inner["Name"], label) for inner in branches[key])


def nodes(document: dict[str, Any]) -> dict[str, str]:
    """The type of every step by its name, in order."""
    found = {}
    for step in document["Steps"]:
        found[step["Name"]] = step["Type"]
        inner = [*step["Arguments"].get("IfSteps", []), *step["Arguments"].get("ElseSteps", [])]
        found |= {part["Name"]: part["Type"] for part in inner}
    return found


def mermaid(document: dict[str, Any]) -> str:
    """The graph as Mermaid, which GitHub draws."""
    shapes = {"Condition": "{}", "Fail": ("([", "])"), "RegisterModel": ("([", "])")}
    lines = [f"  {name}{name.join(shapes.get(kind, '[]'))}" for name, kind in nodes(document).items()]
    return "\n".join(["flowchart LR", *lines, *(f"  {a} -->|{what}| {b}" for a, b, what in edges(document))]) + "\n"
