"""Draw the project's pipeline from its definition: `make pipeline-graph`, into `docs/pipeline.svg` and `.mmd`.

python -m pipelines.pipeline_graph
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from pipelines import ROOT, console
from pipelines.config import load
from pipelines.training_pipeline import LOCAL, Inputs, definition

WIDE, HIGH, ACROSS, DOWN, EDGE = 120, 48, 184, 84, 16  # pixels: a box, from one to the next, the margin
KINDS = {
    "Processing": "#dbeafe", "Training": "#dcfce7", "Condition": "#fef9c3", "RegisterModel": "#ede9fe",
    "Fail": "#fee2e2",
}  # fmt: skip
GREY = "#475569"
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


def svg(document: dict[str, Any]) -> str:
    """The graph as a picture: a step to the right of all that it uses."""
    kinds, links = nodes(document), list(edges(document))
    column = dict.fromkeys(kinds, 0)
    for name in kinds:  # every step comes after those that it uses
        column[name] = max((column[start] + 1 for start, end, _ in links if end == name), default=0)
    rows: dict[int, list[str]] = {}
    for name, place in column.items():
        rows.setdefault(place, []).append(name)
    at = {name: (EDGE + place * ACROSS, EDGE + DOWN // 2 + DOWN * (2 * row - len(names) + 1) // 2)
          for place, names in rows.items() for row, name in enumerate(names)}  # fmt: skip
    wide, high = ACROSS * max(column.values()) + WIDE + 2 * EDGE, DOWN + HIGH + 2 * EDGE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>',
        f'<rect width="{wide}" height="{high}" fill="#ffffff"/>',
    ]
    for start, end, what in links:
        (x, y), (z, w) = at[start], at[end]
        x, y, w = x + WIDE, y + HIGH // 2, w + HIGH // 2
        path, place, height = f"M{x} {y}L{z} {w}", (x + z) // 2, (y + w) // 2 + (4 if y != w else -6)
        if column[end] - column[start] > 1:  # above what lies between
            x, z, y, w = x - WIDE // 2, z + WIDE // 2, y - HIGH // 2, w - HIGH // 2
            path, place, height = f"M{x} {y}C{x} {y - 40} {z} {w - 40} {z} {w}", (x + z) // 2, y - 36
        parts.append(f'<path d="{path}" fill="none" stroke="{GREY}" marker-end="url(#tip)"/>')
        parts.append(_words(place, height, 11, what, GREY))
    for name, (x, y) in at.items():
        box = f'width="{WIDE}" height="{HIGH}" rx="6" fill="{KINDS[kinds[name]]}" stroke="{GREY}"'
        parts.append(f'<rect x="{x}" y="{y}" {box}/>')
        parts.append(_words(x + WIDE // 2, y + 21, 13, name, "#0f172a", KINDS[kinds[name]]))
        parts.append(_words(x + WIDE // 2, y + 37, 10, kinds[name], GREY, KINDS[kinds[name]]))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _words(x: int, y: int, size: int, words: str, colour: str, around: str = "#ffffff") -> str:
    """Text with a halo, so that lines below it do not cross it."""
    halo = f'fill="{colour}" stroke="{around}" stroke-width="4" paint-order="stroke"'
    return f'<text x="{x}" y="{y}" text-anchor="middle" font-size="{size}" {halo}>{escape(words)}</text>'


def main() -> int:
    """Command line; see the module's docstring."""
    settings = load(console.parser("Draw the project's pipeline.", settings=True).parse_args().set)
    with tempfile.TemporaryDirectory() as staged:
        document = definition(settings, LOCAL, Inputs("s3://local/raw/"), Path(staged))
    for suffix, drawn in (("svg", svg(document)), ("mmd", mermaid(document))):
        (ROOT / "docs" / f"pipeline.{suffix}").write_text(drawn, encoding="utf-8")
        print(f"-> docs/pipeline.{suffix}")
    return 0


if __name__ == "__main__":
    console.run_verb(main)
