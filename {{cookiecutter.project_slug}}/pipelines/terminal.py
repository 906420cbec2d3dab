"""What the verbs share at the terminal: errors as one sentence, options that are make variables, commands to paste."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import shlex
import shutil
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from progress import plain

PRINTED = string.ascii_letters + string.digits + "./_"  # what printf gives back as it is
ON, OFF = ("1", "yes", "true", "on"), ("", "0", "no", "false", "off")
# What values of other kinds than expected lead to, as in the files of a stranger's run.
DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
given: dict[str, str] = {}  # the environment of this call of make, which holds its variables; empty without make


class UserError(Exception):
    """Something that the user can mend: one sentence with what is wrong, the value seen and the fix.

    Attributes:
        code: the exit code of the verb.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Finished(Exception):
    """A verb has said what it was asked for, and ends before it does anything."""


def run_verb(main: Callable[[], int]) -> NoReturn:
    """Run a verb and exit with its code; a `UserError` is printed as one sentence."""
    for stream in (sys.stdout, sys.stderr):
        _guard(stream)
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except Finished:
        sys.exit(0)
    except BrokenPipeError:  # whoever read what is printed has seen enough, as in `make help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _guard(stream: Any) -> None:
    """Let nothing through that a terminal obeys, but for the returns and line ends of bars: a last line of defence."""
    write = stream.write

    stream.write = lambda text: write(plain(text, more="\n\r\t"))


class Parser(argparse.ArgumentParser):
    """Options that name their make variable: `add_argument("--data", variable="DATA")` takes `make data DATA=...`."""

    def __init__(self, **options: Any) -> None:
        self.variables: dict[str, argparse.Action] = {}
        super().__init__(**options, allow_abbrev=False)

    def add_argument(self, *names: str, variable: str = "", **options: Any) -> argparse.Action:
        """As argparse's, with the make variable, which the help shows; under make its value is the option's."""
        action = super().add_argument(*names, **options)
        if variable:
            self.variables[variable] = action
            action.help = f"{action.help} [{variable}={'1' if action.nargs == 0 else ''}]"
        return action

    def add_mode(self, shown: str = "default: compute.local_mode") -> None:
        """The option of verbs that run in a container or as a process, with what the help shows of it."""
        self.add_argument("--mode", variable="LOCAL_MODE", choices=["auto", "container", "process"], help=shown)

    def add_data(self, shown: str = "folder with one sub-folder of images per class") -> None:
        """The option that names images, of verbs for which `data.source` does when it is not given."""
        self.add_argument("--data", variable="DATA", help=f"{shown} (default: data.source)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with the values of make's variables before the words of the command line."""
        return super().parse_known_args([*self._from_make(), *sys.argv[1:]] if args is None else args, namespace)

    def _from_make(self) -> Iterator[str]:
        """An option and its value are one word, so that a value may begin with a dash."""
        for variable, action in self.variables.items():
            option, value = action.option_strings[0], given.get(variable, "")
            if action.nargs == 0 and value.lower() not in (*ON, *OFF):
                raise UserError(
                    f"{variable} is {value!r}, which is neither yes nor no; say {variable}=1, or nothing", 2
                )
            if value and (action.nargs != 0 or value.lower() in ON):
                yield option if action.nargs == 0 else f"{option}={value}"

    def error(self, message: str) -> NoReturn:
        """One sentence, which names the variable too."""
        for variable, action in self.variables.items():
            message = re.sub(
                rf"{action.option_strings[0]}(?![\w-])", f"{action.option_strings[0]} ({variable}=)", message
            )
        if "--set" in self._option_string_actions and (hint := setting(message.partition("arguments: ")[2])):
            raise UserError(f"{message}; {hint}", 2)
        shows = f"make {self.prog.rpartition(' ')[2]} ARGS=--help" if given else f"{self.prog} --help"
        raise UserError(f"{message}; `{shows}` shows the options", 2)


def setting(text: str) -> str:
    """How to give a setting that came as a variable or an option, as `epochs=3`; nothing for what is none."""
    from pipelines.config import meant

    words = f"--set {meant(text)}"
    return "a setting is given with " + (f'ARGS="{words}"' if given else words) if meant(text) else ""


def parser(description: str, settings: bool = False) -> Parser:
    """A parser for a verb, with the option `--set` when the verb reads the settings."""
    made = Parser(prog=sys.argv[0], description=description)
    if settings:
        made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    return made


def quoted(value: str) -> str:
    """A value as any shell takes it back, in characters that can be seen: `printf` makes those that cannot."""
    if plain(value) == value:
        return shlex.quote(value)
    body = value.rstrip("\n")  # which a shell would drop
    octal = "".join(chr(byte) if chr(byte) in PRINTED else f"\\{byte:03o}" for byte in os.fsencode(body))
    return f"\"$(printf '{octal}')\"" + shlex.quote(value[len(body) :]) * (body != value)


def command(verb: str, **variables: object) -> str:
    """A command to paste, in which every value is quoted: make takes it as it is, but for blanks at its beginning."""
    before: list[str] = []
    after: list[str] = []
    for name, value in variables.items():
        text = str(value)
        (before if text[:1].isspace() else after).append(f"{name}={quoted(text)}")
    return " ".join([*before, "make", verb, *after])


def width() -> int:
    """How wide the terminal is; 0 where there is none, and nothing has to fit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def log_to(path: Path) -> None:
    """Send the SDK's messages, which it hides by default, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("botocore").setLevel(logging.WARNING)
