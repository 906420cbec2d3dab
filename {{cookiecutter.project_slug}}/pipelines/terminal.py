"""What the verbs share at the terminal: errors as one sentence, logging, and a live view of a training log."""

from __future__ import annotations

import argparse
import errno
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something that the user can mend: one sentence with what is wrong, the value seen and the fix.

    Attributes:
        code: the exit code of the verb.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def run_verb(main: Callable[[], int]) -> NoReturn:
    """Run a verb and exit with its code; a `UserError` is printed as one sentence."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parser(description: str, settings: bool = False) -> argparse.ArgumentParser:
    """A parser for a verb, with the option `--set` when the verb reads the settings."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    if settings:
        made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    return made


def width() -> int:
    """How wide the terminal is; 0 where there is none, and nothing has to fit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def log_to(path: Path) -> None:
    """Send the SDK's messages, which it hides by default, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("botocore").setLevel(logging.WARNING)
