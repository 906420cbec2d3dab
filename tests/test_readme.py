"""What the template's own pages show: the recording, commands, links."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.conftest import TEMPLATE, TREE
from tests.room import ROOMS

PAGES = [
    TEMPLATE / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/comparison.md")
]
SVG = "{http://www.w3.org/2000/svg}"
ELEMENTS = {SVG + name for name in ("svg", "title", "style", "rect", "g", "text", "tspan")}
ATTRIBUTES = {"viewBox", "role", "x", "y", "rx", "width", "height", "fill", "stroke", "class", "style", "textLength"}
ELSEWHERE = re.compile(r"https?://(?!127\.0\.0\.1|0\.0\.0\.0)|url\(|@import|/(?:root|home|Users)/")


def blocks(page: Path) -> list[str]:
    """The commands in the blocks of a page, without comments."""
    text = "".join(re.findall(r"(?ms)^```\n(.*?)^```", page.read_text(encoding="utf-8")))
    return [re.sub(r"\s+#.*", "", line) for line in text.splitlines()]


def verbs() -> set[str]:
    """Those of the template."""
    return set(re.findall(r"(?m)^([a-z-]+):.* ## ", (TEMPLATE / "Makefile").read_text(encoding="utf-8")))


def verbs_of_a_project() -> set[str]:
    """Those of the largest one."""
    command = [sys.executable, "-m", "pipelines", "help"]
    said = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"(?m)^  make ([a-z-]+) ", said))


def end(picture: ET.Element) -> list[str]:
    """The lines at the end of the recording: those that no later one replaced."""
    lines = [line for line in picture.iter(f"{SVG}text") if line.get("class") != "p"]
    return [" ".join(str(piece.text) for piece in line.iter(f"{SVG}tspan")) for line in lines]


def problems(picture: ET.Element) -> list[str]:
    """What a picture in a README must not have: scripts, other files, names of other machines, private folders."""
    found = [node.tag for node in picture.iter() if node.tag not in ELEMENTS]
    found += [name for node in picture.iter() for name in set(node.keys()) - ATTRIBUTES]
    texts = [text for node in picture.iter() for text in (node.text, node.tail, *node.attrib.values())]
    return found + ELSEWHERE.findall(" ".join(text or "" for text in texts))


def test_the_recording_is_small_alone_and_shows_what_the_readme_says() -> None:
    data = (TEMPLATE / "docs" / "recording.svg").read_bytes()
    assert len(data) < 200_000
    picture = ET.fromstring(data)
    assert problems(picture) == []
    typed = [line.removeprefix("$ ") for line in end(picture) if line.startswith("$ ")]
    assert "make train-local" in typed
    assert set(typed) <= set(blocks(TEMPLATE / "README.md"))
    assert {line.split()[1] for line in typed if line.startswith("make ")} <= verbs_of_a_project()
    assert not re.search(r"(?i)error|traceback|no such", "\n".join(end(picture)))


@pytest.mark.parametrize(
    "bad",
    ['<image href="x"/>', "<style>@import 'x'</style>", "<text>https://x</text>", "<g onclick='x'/>", "<g/>/home/me"],
)
def test_the_check_of_the_recording_can_fail(bad: str) -> None:
    assert problems(ET.fromstring(f'<svg xmlns="http://www.w3.org/2000/svg">{bad}</svg>'))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_a_verb_and_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`make\s+([a-z-]+)", text)
    named += [line.split()[1] for line in blocks(page) if line.startswith("make ")]
    assert set(named) <= verbs() | verbs_of_a_project()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / unquote(target)).exists(), target
    assert set(re.findall(r"\]\[(\w+)\]", text)) == set(re.findall(r"(?m)^\[(\w+)\]: https://", text))


def test_the_readme_is_short_and_begins_with_the_picture() -> None:
    lines = (TEMPLATE / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert lines[2].startswith("![")
    assert "docs/report.png" in lines[2]


def test_every_room_can_be_tried() -> None:
    """`make try` knows each folder of code, and its tests are there."""
    folders = {path.name for part in ("pipelines", "src") for path in (TREE / part).iterdir() if any(path.glob("*.py"))}
    assert folders | {"top"} == set(ROOMS)
    for name in " ".join(ROOMS.values()).split():
        assert (TEMPLATE / "tests" / "in_project" / f"test_{name}.py").is_file(), name
