"""What the HTML pages share: their style, and text that cannot break out of it.

Class names and paths are whatever somebody called a folder: all of it goes through `text`. A page takes nothing from
elsewhere, and its policy forbids the browser to run or fetch anything. It is made for a phone, a desk and paper.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # what HTML does not allow as text
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --page: #fff; --card: #f4f6f8;
  --one: #1f6feb; --two: #c2410c; --tint: #1f6feb55 }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a0a9b3; --line: #3a424c;
  --page: #14171b; --card: #1e2329; --one: #6cb0ff; --two: #fb923c; --tint: #4493f866 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 64rem; margin: auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h1, h2 { line-height: 1.25 } h1, h2, h2 + p { break-after: avoid } p { margin: .5rem 0 }
.soft, dt, figcaption, thead th { color: var(--soft) }
.note { border-left: 4px solid var(--two); padding: .25rem .75rem; background: var(--card); overflow-wrap: anywhere }
.cards, .charts, .pictures { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)) }
.cards { margin: 1rem 0; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)) }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.25rem }
.one { max-width: 30rem } .cards div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem }
dt, dd, figure { margin: 0 } dt, figcaption, small { font-size: .85rem } dd { font-size: 1.4rem; font-weight: 600 }
dd small { display: block; font-weight: 400; color: var(--soft) } figure, tr { break-inside: avoid }
svg { display: block; width: 100%; height: auto; fill: none } bdi { overflow-wrap: anywhere }
.pictures img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--card); border-radius: .25rem }
.tiny img { image-rendering: pixelated } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .5rem; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400 }
th:first-child, .facts td, .pairs td:nth-child(2) { text-align: left; overflow-wrap: anywhere; min-width: 5rem }
.facts { width: 100% }
.facts th { width: 32%; min-width: 10rem; white-space: nowrap; vertical-align: top; color: var(--soft) }
.matrix th, .matrix td { padding: .2rem .35rem; text-align: center; min-width: 1.9rem }
.matrix th:first-child { text-align: left; min-width: 0; max-width: 11rem }
.matrix td { background: color-mix(in srgb, var(--one) calc(var(--v, 0) * 55%), transparent) }
td.bar { background: linear-gradient(90deg, var(--one) calc(var(--v) * 100%), var(--line) 0) 0 100% / 92% 3px;
  background-repeat: no-repeat }
svg text { fill: var(--soft); font-size: 12px } .x { text-anchor: middle } .y { text-anchor: end }
.bar { fill: var(--tint) } .grid, .frame { stroke: var(--line) } .cells { fill: var(--one) }
.diagonal { stroke: var(--ink); stroke-dasharray: 2 4 } polyline { stroke-width: 2; stroke-linejoin: round }
polyline.l1 { stroke: var(--one) } polyline.l2 { stroke: var(--two); stroke-dasharray: 7 3 }
circle.l1, .k1::before { fill: var(--one); background: var(--one) }
circle.l2, .k2::before { fill: var(--two); background: var(--two) } .key { white-space: nowrap; margin-left: .75rem }
.key::before { content: ""; display: inline-block; width: .7rem; height: .7rem; border-radius: 1rem; margin: 0 .3rem }
@media screen and (max-width: 36rem) {
  .stack, .stack :is(thead, tbody) { display: block }
  .stack tr { display: grid; grid-template-columns: repeat(4, 1fr); border-bottom: 1px solid var(--line) }
  .stack :is(th, td) { border: 0; min-width: 0 } .stack th:first-child { grid-column: 1 / -1 }
}
@media print {
  :root { color-scheme: light } body { font-size: 10pt; background: none } main { padding: 0; max-width: none }
  .wide { overflow: visible } * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .matrix, .facts { break-inside: avoid } .pictures { grid-template-columns: repeat(6, 1fr) }
  .charts { grid-template-columns: 1fr 1fr } .cards { grid-template-columns: repeat(5, 1fr) }
}
"""


def save(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Write a page as a whole."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{text(title)}</title>\n<style>{STYLE}</style>"
    body = "\n".join([f"<h1>{text(title)}</h1>", *sections])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    page = f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body><main>\n{body}\n</main></body>\n</html>\n'
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(path)


def text(value: Any) -> str:
    """Anything as text of an HTML page or attribute."""
    return html.escape(CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", str(value)))


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values; without a value there is no row."""
    lines = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>'
                    for name, value in rows if value not in (None, ""))  # fmt: skip
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def table(head: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """A table with a head; rows are HTML."""
    top = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
