"""Classify image files with an artifact, through its four handlers.

    python src/inference/predict.py --artifact artifacts/latest/model.tar.gz photo.jpg

Exit codes: 0, 1: an image could not be read, 2: the artifact could not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

from inference.artifact import ArtifactError, open_artifact
from progress import plain

SHOWN = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Classify image files with an artifact.")
    parser.add_argument("--artifact", type=Path, required=True, help="model.tar.gz of a run")
    parser.add_argument("--json", action="store_true", help="print the answer as a server would send it")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    options = parser.parse_args(arguments)
    os.environ.setdefault("INFERENCE_MAX_BYTES", str(2**30))  # a file here may be larger than what an endpoint takes
    failed = 0
    try:
        with open_artifact(options.artifact) as artifact:
            for path in options.images:
                try:
                    body = artifact.handlers.input_fn(path.read_bytes(), "application/x-image")
                    prediction = artifact.handlers.predict_fn(body, artifact.model)
                    text, _ = artifact.handlers.output_fn(prediction, "application/json")
                except (OSError, artifact.handlers.RequestError) as error:
                    reason = error.strerror if isinstance(error, OSError) else error
                    print(f"error: {plain(path)}: {plain(reason)}", file=sys.stderr)
                    failed += 1
                    continue
                if options.json:
                    print(text)
                else:
                    _show(path, json.loads(text), [plain(name) for name in artifact.facts["classes"]])
    except ArtifactError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _show(path: Path, answer: dict[str, list[list[float]]], classes: list[str]) -> None:
    print(f"{plain(path)}: {plain(answer['labels'][0])}")
    ranked = sorted(zip(answer["probabilities"][0], classes, strict=True), reverse=True)
    width = max(len(name) for _, name in ranked[:SHOWN])
    for probability, name in ranked[:SHOWN]:
        print(f"  {name:{width}}  {probability:6.1%}  {'#' * round(40 * probability)}")


if __name__ == "__main__":
    sys.exit(main())
