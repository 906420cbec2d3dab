"""What people see: bars and waits, on a terminal in place, elsewhere as plain lines; and text that strangers wrote.

Laptop and containers share it, so it needs the standard library only; bars are tqdm's, where that is installed. There
are no colours, so there is nothing that NO_COLOR would have to take away.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

SECONDS = 10.0  # between two lines of a loop where there is no terminal
LONG = 30.0  # between two lines of a wait there
SOON = 2.0  # a wait that is over by then is not worth a word on a terminal
WIDEST = 120  # columns of a bar; on more it is hard to read
OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # kinds of characters that a terminal obeys, or nobody sees
FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters that look like nothing
# What may stand in a name all the same: the flag of a part of a country, and joiners between letters or pictures.
NEIGHBOUR = r"[^\x00-\x7f\u2000-\u206f]"
FLAG = "\U0001f3f4[\U000e0030-\U000e007a]{3,6}\U000e007f"
MEANT = re.compile(rf"{FLAG}|(?<={NEIGHBOUR})[\u200c\u200d](?={NEIGHBOUR})")
SHAPE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


def plain(text: object, more: str = "") -> str:
    """Text that a stranger wrote, on one line, as text and nothing else: what a terminal would obey becomes `\\x1b`.

    Names of files and classes, what files of a run say, reasons that AWS gives, and lines of logs go through it.

    Args:
        text: anything.
        more: control characters that may stay.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    meant = {place for found in MEANT.finditer(text) for place in range(*found.span())}
    return "".join(
        character.encode("unicode_escape").decode()
        if (unicodedata.category(character) in OBEYED or character in FILLERS)
        and place not in meant and character not in more else character
        for place, character in enumerate(text)
    )  # fmt: skip


def bar(total: int, verb: str, unit: str, output: TextIO, done: int = 0) -> Any:
    """A bar of tqdm, with rate and remaining time; `unit` is a word, or B for bytes."""
    from tqdm import tqdm

    columns = min(shutil.get_terminal_size().columns, WIDEST)
    sizes = {"unit": "B", "unit_scale": True} if unit == "B" else {"unit": f" {unit}"}
    return tqdm(total=total, initial=done, desc=verb, file=output, ncols=columns, bar_format=SHAPE, **sizes)


@contextlib.contextmanager
def progress(total: int, verb: str, unit: str = "images") -> Iterator[Callable[[int], object]]:
    """Give a function to call with how many are done since the last call, from any thread."""
    lock, began, done = threading.Lock(), time.monotonic(), 0
    reported = began
    if total and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        with bar(total, verb, unit, sys.stderr) as shown, regularly(shown.refresh):

            def move(number: int) -> None:
                with lock:
                    shown.update(number)

            yield move
        return

    def tick(number: int) -> None:
        nonlocal done, reported
        with lock:
            done, now = done + number, time.monotonic()
            if now - reported <= SECONDS:
                return
            reported, rate = now, done / (now - began)
            left = duration((total - done) / rate) if rate > 0 else "?"
            amounts = f"{done / 1e6:.1f}/{total / 1e6:.1f} MB" if unit == "B" else f"{done}/{total} {unit}"
            speed = f"{rate / 1e6:.1f} MB/s" if unit == "B" else f"{rate:.1f}/s"
            print(f"{verb} {amounts}, {speed}, {left} left", flush=True)

    yield tick


@contextlib.contextmanager
def waiting(what: str, output: TextIO | None = None, alone: bool = True) -> Iterator[Callable[[str], None]]:
    """Say what is waited for and for how long already, as long as nothing else is said.

    Args:
        what: is waited for.
        output: where to say it; None: sys.stdout.
        alone: whether nobody else writes there meanwhile, so that a line can be written over.

    Yields:
        The function that says something else meanwhile: a line of text.
    """
    place, what = output or sys.stdout, plain(what)
    terminal, lock, began = place.isatty(), threading.Lock(), time.monotonic()
    said, shown, pause = began, 0, SOON if terminal else LONG

    def erase() -> None:
        nonlocal shown
        if shown:
            place.write(f"\r{' ' * shown}\r")
            place.flush()
        shown = 0

    def say(text: str) -> None:
        nonlocal said
        with lock:
            erase()
            print(text, file=place, flush=True)
            said = time.monotonic()

    def look() -> None:
        nonlocal said, shown, pause
        now = time.monotonic()
        text = f"waiting for {what}, {duration(now - began)}"
        with lock:
            if now - said <= pause:
                return
            if terminal and alone:
                text = text[: shutil.get_terminal_size().columns - 1]
                place.write(f"\r{text.ljust(shown)}")
                place.flush()
                shown = len(text)
            else:
                print(text, file=place, flush=True)
                said, pause = now, LONG

    try:
        with regularly(look):
            yield say
    finally:
        erase()


@contextlib.contextmanager
def regularly(call: Callable[[], object]) -> Iterator[None]:
    """Call once a second, in a thread, until the end."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(1.0):
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def several(count: int, what: str) -> str:
    """Such as `1 class` or `2 classes`."""
    return f"{count} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}"


def duration(seconds: float) -> str:
    """As a person says it: 8 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, more = divmod(minutes, 60)
    return f"{hours} h {more} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
