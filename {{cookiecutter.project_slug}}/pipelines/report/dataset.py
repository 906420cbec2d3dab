"""The HTML page of a packed data set: a few pictures a class, copies, and what was left out; see data.html."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

import imaging
from pipelines.report.charts import number_text
from pipelines.report.page import ROWS, TINY, render

PIXELS = 96  # of a picture's side, at most


def write(packed: Path, raw: Path, info: dict[str, Any], heads: list[str], rows: list[list[str]]) -> Path:
    """Render the page of a packed data set, `<data set>.html` beside it.

    Args:
        packed: the data set's folder.
        raw: the folder that its paths start from.
        info: the content of its dataset.json.
        heads, rows: of the table of classes.
    """

    def picture(path: str) -> tuple[str, str]:
        try:
            pixels = imaging.fit(imaging.decode((raw / path).read_bytes()), min(info["size"], PIXELS), info["deep"])
        except (OSError, ValueError):  # it is gone
            return path, ""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90, subsampling=0)
        return path, base64.b64encode(file.getvalue()).decode("ascii")

    report = packed.with_name(f"{packed.name}.report.txt")
    lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    left_out = [line for line in lines if not line.startswith("twice: ")]
    return render("data.html", {
        "title": f"Data set {packed.name}",
        "cards": [("images", number_text(sum(info["counts"].values())), ""), ("classes", len(info["classes"]), ""),
                  ("pixels a side", info["size"], ""), ("copies", len(lines) - len(left_out), ""),
                  ("left out", len(left_out), "")],
        "notes": [], "heads": heads, "rows": rows, "tiny": info["size"] <= TINY,
        "classes": [(name, map(picture, info["survey"]["few"][name])) for name, *_ in rows[:ROWS]],
        **{kind: [[picture(path) for path in group] for group in info["survey"][kind]]
           for kind in ("copies", "contradicting")},
        "left_out": left_out[:ROWS] + [f"and {len(left_out) - ROWS} more, in {report.name}"] * (len(left_out) > ROWS),
    }, packed.with_name(f"{packed.name}.html"))  # fmt: skip
