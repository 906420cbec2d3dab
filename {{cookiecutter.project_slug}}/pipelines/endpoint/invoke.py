"""Classify an image file with an endpoint on SageMaker: `make invoke IMAGE=photo.jpg`, `... ENDPOINT=<name>`.

python -m pipelines.invoke --image photo.jpg --json        # the answer as the endpoint gave it
"""

from __future__ import annotations

import json
from pathlib import Path

from pipelines import console, endpoints
from pipelines.config import load
from pipelines.console import UserError


def main() -> int:
    """Command line; see the module's docstring."""
    parser = console.parser("Classify an image file with an endpoint on SageMaker.", settings=True)
    parser.add_argument("--image", type=Path, action="append", default=[], help="an image file; may be repeated")
    parser.add_argument("--endpoint", help="default: endpoint.name")
    parser.add_argument("--variant", help="of an endpoint with several (default: by their weights)")
    parser.add_argument("--json", action="store_true", help="print the answer as it came")
    options = parser.parse_args()
    if not options.image:
        raise UserError("IMAGE is missing; name a file, such as make invoke IMAGE=photo.jpg")
    settings = load(options.set)
    facts = endpoints.running(settings, endpoints.name(settings, options.endpoint))
    for file in options.image:
        try:
            body = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        answer = endpoints.ask(settings, facts, body, "application/x-image", options.variant)
        if options.json:
            print(json.dumps(answer))
        else:
            endpoints.show(file, answer)
    return 0


if __name__ == "__main__":
    console.run_verb(main)
