"""Build the project's images, to train in and to serve from: `make image`.

python -m pipelines.image --pull --no-cache        # other options are handed to `docker build`
"""

from __future__ import annotations

from pipelines import console, engine
from pipelines.config import load
from pipelines.console import UserError


def main() -> int:
    """Command line; see the module's docstring."""
    parser = console.parser("Build the project's images; other options are handed to `docker build`.", settings=True)
    options, more = parser.parse_known_args()
    try:
        engine.check()
        settings = load(options.set)
        print(engine.build(settings, "training", more))
        more = [word for word in more if word != "--no-cache"]  # it rests on the one that was just built
        print(engine.build(settings, "serving", more))
        digest = engine.base_digest(settings)
        if digest and "@" not in settings.images.base:
            print(f"the base image was {digest}: as images.base in configs/infrastructure.yaml it stays that one")
    except engine.EngineError as error:
        raise UserError(str(error)) from error
    return 0


if __name__ == "__main__":
    console.run_verb(main)
