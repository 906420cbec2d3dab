"""What training costs on this machine: start-up, time to accuracy, memory, and throughput against its limit.

    make bench-train                                    # ARGS="--rounds 9", ARGS="--cifar10 FOLDER"
    python3 benchmarks/train.py --project FOLDER        # a baked project, with the packages of its container only

Needs no network once the project's environment is there; leaves out, with a line, what needs a package that is missing.
Two things are measured: the process, `src/training/train.py` with the default recipe on the sample digits, from its
start to its end (process.py); and the loop against its limit (step.py).
"""

from __future__ import annotations

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from page import Book, Measured, again, bake, enter, parser, path

TITLE = "What training costs: `make bench-train`"


def measure(rounds: int, quick: bool, cifar10: Path | None) -> tuple[dict[str, str | float], Measured]:
    """What the numbers depend on, and a value a round of each; with the packages and the code of the project."""
    import process
    import step
    from material import machine

    facts: dict[str, str | float] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "rounds": rounds}
    facts |= machine()
    measured: Measured = {}
    for phase in (process.process, step.throughput, step.overhead):  # the first: while this process is idle
        with tempfile.TemporaryDirectory() as folder:
            measured |= phase(Path(folder), rounds, quick)
    if cifar10:
        with tempfile.TemporaryDirectory() as folder:
            measured |= process.cifar10(cifar10, Path(folder), rounds, quick)
    return facts, measured


def main() -> int:
    """Command line; see the module's docstring."""
    made = parser("What training costs on this machine.")
    made.add_argument("--cifar10", type=path, metavar="FOLDER", help="also time to 94 %%: folders train, val (the "
                      "10,000 test images) and test, each with a folder of images a class")  # fmt: skip
    options = made.parse_args()
    if options.project is None:
        project, python = bake()
        return again(python, project)
    enter(options.project)
    rounds = 1 if options.quick else max(options.rounds, 1)
    Book.of(options).publish(TITLE, *measure(rounds, options.quick, options.cifar10))
    return 0


if __name__ == "__main__":
    sys.exit(main())
