"""Records what a new user sees, in a real terminal, and keeps it as docs/recording.svg.

    make record         # runs this file in an environment of its own, which has pyte

It types README's commands into a shell and answers the questions with Enter. `gh:` leads to this clone, and the caches
are filled before, as a first run downloads for a minute. Pauses above a second are shown as one second. The picture has
no script and no font of its own; it plays once, and where nothing moves it is the end of the recording.
"""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import tempfile
import termios
import time
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pyte
from page import TEMPLATE, own_environment

COMMANDS = ["uvx cookiecutter gh:org/template", "cd image_classifier", "make train-local"]
COMMANDS += [f"make {verb} IMAGE=data/raw/digits/4/0780.png" for verb in ("predict", "serve-local")]
COLUMNS, ROWS, WIDTH, HEIGHT = 110, 30, 8.4, 18  # of the window; pixels of a character
LONGEST_PAUSE, FRAME, PLAIN = 1.0, 0.1, "#c9d1d9"  # seconds; seconds; colour
COLOURS = {"red": "#ff7b72", "green": "#56d364", "brown": "#e3b341", "magenta": "#d2a8ff", "cyan": "#76e3ea"}


def record(folder: str, environment: dict[str, str]) -> list[tuple[float, bytes]]:
    """Type the commands into a shell; what the terminal showed, and when."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "--noediting"], environment)  # noqa: S606
    termios.tcsetwinsize(terminal, (ROWS, COLUMNS))
    screen, seen, keys, commands = pyte.Screen(COLUMNS, 2000), [], "", [*COMMANDS]
    stream = pyte.ByteStream(screen)
    while True:
        while select.select([terminal], [], [], 0.04 if keys else 0.5)[0]:
            seen.append((time.monotonic(), os.read(terminal, 65536)))
            stream.feed(seen[-1][1])
        line = "".join(text for _, text, _ in pieces(screen, screen.cursor.y))
        if line == "$" and not keys + "".join(commands):
            os.close(terminal)
            return seen
        if not keys and (line == "$" or line.endswith("):")):  # the prompt, or a question with its default
            keys = (commands.pop(0) if line == "$" else "") + "\n"
        os.write(terminal, keys[:1].encode())
        keys = keys[1:]


def pieces(screen: pyte.Screen, row: int) -> list[tuple[int, str, str]]:
    """A line, cut where its colour changes, without the blanks around: column, text, colour."""
    found = []
    for colour, cells in groupby(range(COLUMNS), lambda column: COLOURS.get(screen.buffer[row][column].fg, PLAIN)):
        columns = list(cells)
        text = "".join(screen.buffer[row][column].data for column in columns)
        found.append((columns[0] + len(text) - len(text.lstrip()), text.strip(), colour))
    return [piece for piece in found if piece[1]]


def draw(seen: list[tuple[float, bytes]]) -> str:
    """The picture: all that ever stood on a line, each with the time in which it is visible."""
    screen, clock, shown, last = pyte.Screen(COLUMNS, 2000), 0.0, -1.0, 0  # it never scrolls: a window moves over it
    stream, window, lines = pyte.ByteStream(screen), [(0.0, 0)], dict[int, list[Any]]()
    for number, (at, data) in enumerate(seen):
        clock += min(at - seen[max(number - 1, 0)][0], LONGEST_PAUSE)
        stream.feed(data)
        if clock - shown < FRAME and number < len(seen) - 1:
            continue
        for row in sorted(screen.dirty):
            versions, now = lines.setdefault(row, [(0.0, [])]), pieces(screen, row)
            versions += [(clock, now)] if now != versions[-1][1] else []
            last = max(last, row) if now else last
        screen.dirty.clear()
        shown, top = clock, max(0, last - ROWS + 1)
        window += [(clock, top)] if top != window[-1][1] else []
    out = ""
    for row, versions in sorted(lines.items()):
        for (at, line), (end, _) in pairwise([*versions, (0.0, [])]):
            when = f'class="p" style="animation:s {end - at:.2f}s' if end else 'style="animation:h'
            out += f'<text y="{row * HEIGHT + 13}" {when} {at:.2f}s">' if line else ""
            for x, run, fill in line:
                out += f'<tspan x="{x * WIDTH:g}" fill="{fill}" textLength="{len(run) * WIDTH:g}">{escape(run)}</tspan>'
            out += "</text>\n" if line else ""
    steps = "".join(f"{100 * at / clock:.2f}%{{transform:translateY({-top * HEIGHT}px)}}" for at, top in window)
    width, height = round(COLUMNS * WIDTH), ROWS * HEIGHT
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 32} {height + 32}" role="img">
<title>A terminal: {escape("; ".join(COMMANDS))}</title>
<style>text{{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}}
@keyframes s{{from,to{{visibility:visible}}}}@keyframes h{{from,to{{visibility:hidden}}}}.p{{visibility:hidden}}
@keyframes w{{{steps}}}.w{{transform:translateY({-window[-1][1] * HEIGHT}px);animation:w {clock:.2f}s step-end}}
@media(prefers-reduced-motion:reduce){{*{{animation:none!important}}}}</style>
<rect x=".5" y=".5" width="{width + 31}" height="{height + 31}" rx="8" fill="#0d1117" stroke="#6e7681"/>
<svg x="16" y="16" width="{width}" height="{height}"><g class="w">\n{out}</g></svg></svg>\n"""


def main() -> None:
    """Fill the caches, record, refuse what names this machine, keep the picture."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rc").write_text(f"abbreviations: {{gh: '{TEMPLATE}'}}\nreplay_dir: {folder}/replay\n")
        own = {"PS1": "\033[32m$\033[0m ", "TERM": "xterm-256color", "COOKIECUTTER_CONFIG": f"{folder}/rc"}
        environment = own_environment() | own | {"PATH": f"{TEMPLATE}/.venv/bin:{os.environ['PATH']}"}
        unseen = f"{' && '.join([f'{COMMANDS[0]} --no-input', *COMMANDS[1:]])} && cd .. && rm -r image_classifier"
        subprocess.run(["bash", "-c", unseen], cwd=folder, env=environment, check=True)
        picture = draw(record(folder, environment))
    private = "|".join(map(re.escape, (str(TEMPLATE), str(Path.home()), os.uname().nodename)))
    if found := re.findall(rf"{private}|https?://(?!www\.w3|127|0\.0)[^\s<]+", picture):
        raise SystemExit(f"error: the recording names {found}; nothing was kept")
    (TEMPLATE / "docs" / "recording.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
