"""Classify an image file with a finished run: `make predict IMAGE=photo.jpg`, `make predict IMAGE=... RUN=<name>`.

    python -m pipelines predict --image photo.jpg

More options (--json) are handed to src/inference/predict.py.
"""

from __future__ import annotations

from pathlib import Path

from pipelines import runs, terminal
from pipelines.local import sandbox
from pipelines.terminal import UserError


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Classify image files with a finished run; --json prints what a server would send.")
    parser.add_argument("--run", variable="RUN", help="name of a run (default: the newest)")
    parser.add_argument("--image", variable="IMAGE", action="append", default=[], help="an image file; may be repeated")
    sandbox.add_options(parser)
    options, more = parser.parse_known_args()
    folder = runs.find(options.run)
    if not options.image:
        example = terminal.command("predict", IMAGE=runs.example_image(folder))
        raise UserError(f"IMAGE is missing; name a file, such as {example}")
    archive, files = folder / "model.tar.gz", [Path(name) for name in options.image]
    image = sandbox.image(archive, options.trust, mode=options.mode)
    words = ["--artifact", str(archive), *more, "--", *options.image]
    return sandbox.run(image, "inference/predict.py", words, [archive, *files])
