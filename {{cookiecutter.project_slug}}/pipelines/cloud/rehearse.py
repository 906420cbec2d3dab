"""Rehearse all of this project's way to SageMaker and back on this machine: `make rehearse DATA=<folder of images>`.

    python -m pipelines rehearse --keep       # and leave the account for verbs of your own, until Ctrl-C

It needs Docker and no AWS account: the verbs run as they are, and a stand-in for AWS carries out in containers what
they ask for. The stand-in is none of the project's: it comes from the template, as that was for this project.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines import ROOT, terminal
from pipelines.environment import certificates, find_uv
from pipelines.local import data, engine
from pipelines.terminal import UserError
from pipelines.update_template import STATE, address

FOREIGN = ("AWS_ACCESS", "AWS_SECRET", "AWS_SESSION", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT", "AWS_ROLE")


def requirement(facts: Mapping[str, str]) -> str:
    """The stand-in as uv asks for it: a folder of the template's repository at the project's commit."""
    template = address(facts["template"])
    if re.fullmatch(r"[\w.-]+@[^:/]+:[^/].*", template):  # git@host:path
        template = f"ssh://{template.replace(':', '/', 1)}"
    place = template if "://" in template else Path(template).as_uri()
    return f"rehearsal @ git+{place}@{facts['commit']}#subdirectory=rehearsal"


def rehearse(source: str | None, options: Sequence[str]) -> int:
    """Run the journey; its exit code.

    Raises:
        UserError: where it cannot begin.
    """
    if not STATE.exists():
        raise UserError(f"{STATE.name} is missing, so the template that brings the rehearsal is not known; "
                        "`uvx cruft link <template>` writes it")  # fmt: skip
    try:
        engine.check()
    except engine.EngineError as error:
        raise UserError(f"a rehearsal runs containers: {error}") from error
    journey = ["sagemaker_template", *(["--data", str(data.raw(source).resolve())] if source else [])]
    uv = [find_uv(ROOT / ".venv"), "run", "--isolated", "--no-project", "--with",
          requirement(json.loads(STATE.read_text(encoding="utf-8")))]  # fmt: skip
    bundle = certificates()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return subprocess.run(
        [*uv, "python", "-m", "rehearsal", *options, "--run", *journey], cwd=ROOT,
        env=kept | ({"SSL_CERT_FILE": bundle} if bundle else {}),
    ).returncode  # fmt: skip


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Rehearse the way to SageMaker on this machine, in containers.")
    parser.add_argument("--data", variable="DATA", help="folder of images, a sub-folder per class (default: sample)")
    parser.add_argument("--keep", action="store_true", help="leave the account running afterwards, until Ctrl-C")
    parser.add_argument("--fault", action="append", default=[], help="an accident to play, such as spot-after=20s")
    given = parser.parse_args()
    words = [*(["--keep"] if given.keep else []), *(word for fault in given.fault for word in ("--fault", fault))]
    return rehearse(given.data, words)
