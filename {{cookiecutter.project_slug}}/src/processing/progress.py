"""Progress of a long loop: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator

SECONDS = 10.0  # between two lines where there is no terminal


@contextlib.contextmanager
def progress(total: int, verb: str) -> Iterator[Callable[[], object]]:
    """Give a function to call once an image. The bar is tqdm's, where it is installed: the image does not need it."""
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=total, unit="image", desc=verb) as bar:
            yield bar.update
        return
    done, reported = 0, time.monotonic()

    def tick() -> None:
        nonlocal done, reported
        done += 1
        if time.monotonic() - reported > SECONDS:
            reported = time.monotonic()
            print(f"{verb} {done}/{total} images", flush=True)

    yield tick
