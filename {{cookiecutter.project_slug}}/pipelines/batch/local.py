"""Classify every image of a folder with a finished run: `make batch-local DATA=photos`, `... DATA=photos RUN=<name>`.

    python -m pipelines batch-local --data photos

Writes `artifacts/<run>/batch/<folder>.jsonl` through src/inference/batch.py: the local twin of batch transform.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipelines import SOURCE, runs, terminal
from pipelines.local import sandbox
from pipelines.terminal import UserError
from training.config import shown


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Classify every image of a folder into a file of JSON lines.")
    parser.add_argument("--run", variable="RUN", help="name of a run (default: the newest)")
    parser.add_argument("--data", variable="DATA", help="folder of images, with folders in it or not")
    parser.add_argument("--output", help="file that is written (default: artifacts/<run>/batch/<folder>.jsonl)")
    sandbox.add_options(parser)
    options = parser.parse_args()
    if not options.data:
        raise UserError("DATA is missing; name a folder of images, such as make batch-local DATA=folder/of/images", 2)
    run = runs.find(options.run)
    try:
        folder = Path(options.data).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, no home folder
        raise UserError(f"DATA is {shown(options.data)}, which is no folder: {error}", 2) from error
    output = options.output or os.path.relpath(run / "batch" / f"{folder.name or 'images'}.jsonl")
    archive = run / "model.tar.gz"
    image = sandbox.image(archive, options.trust, mode=options.mode)
    words = ["--artifact", str(archive), "--", str(folder)]
    if image is None:  # it takes this process's place: signals reach it, its exit code counts
        script = [str(SOURCE / "inference" / "batch.py"), "--output", output]
        os.execve(sys.executable, [sys.executable, *script, *words], sandbox.environment())  # noqa: S606
    code = sandbox.run(image, "inference/batch.py", words, [archive, folder], Path(output))
    print(f"-> {output}" if Path(output).is_file() else f"{output} was not written", flush=True)
    return code
