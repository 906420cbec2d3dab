"""Start an account on 127.0.0.1: `python -m rehearsal`, `python -m rehearsal --run <program> [words]`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
import urllib.request
from pathlib import Path

from rehearsal import account, docker
from rehearsal.operations import Account

# Scripts that are shipped beside the package: in it when it is installed, next to src/ in the repository.
JOURNEYS = (Path(__file__).with_name("journeys"), Path(__file__).parents[2] / "journeys")


def call(name: str, text: str) -> int:
    """Ask the account that the variables name to do something of the rehearsal's own; prints its answer."""
    address = os.environ.get("REHEARSAL")
    if not address:
        print("no account runs here: REHEARSAL is not set; start one with `python -m rehearsal`", file=sys.stderr)
        return 2
    request = urllib.request.Request(f"{address}/_rehearsal/{name}", data=text.encode(), method="POST")  # noqa: S310
    try:
        with urllib.request.urlopen(request) as answer:  # noqa: S310  of 127.0.0.1
            print(answer.read().decode())
    except urllib.error.HTTPError as error:
        print(json.loads(error.read())["error"], file=sys.stderr)
        return 1
    return 0


def _program(words: list[str]) -> list[str]:
    """A journey that is shipped, a script of Python, or another program, with its words."""
    shipped = [folder / f"{words[0]}.py" for folder in JOURNEYS]
    path = next((path for path in shipped if path.is_file()), Path(words[0]))
    return [sys.executable, str(path), *words[1:]] if path.suffix == ".py" else words


def _show(opened: Account) -> None:
    """What to tell a shell."""
    for name, value in account.variables(opened).items():
        text = f"{opened.folder / 'bin'}{os.pathsep}$PATH" if name == "PATH" else shlex.quote(value)
        print(f"export {name}={text}")
    print("# an account in which requests are carried out in containers; Ctrl-C ends it", flush=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal", description=__doc__)
    parser.add_argument("--region", default="us-east-1", help="that the account is in (us-east-1)")
    parser.add_argument("--fault", action="append", default=[], help="an accident to play, such as spot-after=20s")
    parser.add_argument("--call", nargs="+", metavar="NAME", help="a control of the account that runs, and its JSON")
    parser.add_argument("--run", nargs=argparse.REMAINDER, metavar="PROGRAM", help="in an account of its own, and end")
    parser.add_argument("--keep", action="store_true", help="with --run: leave the account running, until Ctrl-C")
    options = parser.parse_args()
    if options.call:
        return call(options.call[0], " ".join(options.call[1:]) or "{}")
    if options.run == []:
        parser.error("--run needs a program")
    if reason := docker.absent():
        print(f"a rehearsal needs Docker: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's background job would ignore it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    code = 0
    try:
        with account.opened(options.region, options.fault) as opened:
            if options.run:
                code = account.run(opened, _program(options.run))
                if not options.keep:
                    return code
            _show(opened)
            threading.Event().wait()
    except KeyboardInterrupt:
        return code or 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
