"""Keeps docs/report.png of the generated project: the top of a report, which both READMEs show first.

    make picture        # renders the newest report of build/image_classifier, so after `make demo`; it needs Chromium

Look at it before you commit it.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

TEMPLATE = Path(__file__).resolve().parent.parent
PICTURE = TEMPLATE / "{{cookiecutter.project_slug}}" / "docs" / "report.png"
WIDTH, HEIGHT, LIMIT = 1000, 765, 150_000  # pixels, down to the end of the learning curves; bytes


def screenshot(page: Path) -> Image.Image:
    """What a browser shows of a page."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.png"
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{3 * HEIGHT}"]
        quiet = subprocess.DEVNULL  # a pipe would stay open as long as any helper of the browser
        subprocess.run([*command, f"--screenshot={file}", page.as_uri()], check=True, stdout=quiet, stderr=quiet)
        return Image.open(io.BytesIO(file.read_bytes())).convert("RGB")


def main() -> None:
    """Render, crop, keep."""
    page = TEMPLATE / "build" / "image_classifier" / "artifacts" / "latest" / "report.html"
    if not page.is_file():
        raise SystemExit(f"error: {page.relative_to(TEMPLATE)} is missing; `make demo` writes it")
    picture = ImageOps.expand(screenshot(page.resolve()).crop((0, 0, WIDTH, HEIGHT)), border=1, fill="#d0d7de")
    picture.quantize(64).save(PICTURE, optimize=True)
    if (size := PICTURE.stat().st_size) > LIMIT:
        raise SystemExit(f"error: {PICTURE.name} has {size} bytes, which is more than {LIMIT}")


if __name__ == "__main__":
    main()
