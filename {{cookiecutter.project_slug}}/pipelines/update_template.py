"""Bring the template's improvements into this project, and keep the project's own changes: `make update-template`.

    python -m pipelines update-template
    make update-template SCOPE=full     # and what a larger scope has: local, cloud, full

cruft bakes the template twice, as it was for this project and as it is now, and git merges the difference. Nothing is
committed. docs/setup.md says what to do should cruft be gone.
"""

from __future__ import annotations

import json
import os
import subprocess

from pipelines import ROOT, terminal
from pipelines.environment import certificates, find_uv
from pipelines.terminal import UserError

STATE = ROOT / ".cruft.json"  # written when the project was made: template, commit, answers
CRUFT = "cruft>=2.16,<3"
SCOPES = ("local", "cloud", "full")


def git(*words: str) -> str:
    """What a git command says about the project."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout


def larger(scope: str, current: str) -> bool:
    """Whether a scope is larger than the project's own.

    Raises:
        UserError: when there is no such scope, or it is smaller.
    """
    if scope not in SCOPES:
        raise UserError(f"SCOPE is {scope!r}; it must be one of {', '.join(SCOPES)}")
    if SCOPES.index(scope) < SCOPES.index(current):
        raise UserError(f"SCOPE is {scope}, smaller than this project's, which is {current}; a project only grows: "
                        "delete what you do not need, or make a new project")  # fmt: skip
    return scope != current


def update(scope: str | None) -> str:
    """Merge what is new in the template, and what a larger scope has.

    Args:
        scope: to grow to; None: the project's own.

    Returns:
        What was done, for people.

    Raises:
        UserError: when nothing was changed, or files are left that both sides changed.
    """
    if not STATE.exists():
        raise UserError(f"{STATE.name} is missing, so the template of this project is not known; "
                        "`uvx cruft link <template>` writes it")  # fmt: skip
    before = json.loads(STATE.read_text(encoding="utf-8"))
    current, more = before["context"]["cookiecutter"]["scope"], list[str]()
    if scope and not larger(scope, current):
        return f"this project's scope is {current} already; `make update-template` takes what is new in the template"
    if not git("rev-parse", "--quiet", "--verify", "HEAD"):
        raise UserError("the project has no commit yet; `git add . && git commit` first, so that nothing can be lost")
    if git("status", "--porcelain"):
        raise UserError("there are changes that are not committed; commit or stash them, so that nothing can be lost")
    if scope:
        more = ["--variables-to-update", json.dumps({"scope": scope})]
        print(f"growing from {current} to {scope}; what is new in the template comes with it", flush=True)
    bundle = certificates()
    done = subprocess.run(
        [find_uv(ROOT / ".venv"), "tool", "run", "--from", CRUFT, "cruft", "update", "--skip-apply-ask", *more],
        cwd=ROOT, env=os.environ | ({"SSL_CERT_FILE": bundle} if bundle else {}), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["it gave no reason"]
        reason = next((line for line in said if "fatal:" in line), said[-1]).strip(" \u2502'")
        raise UserError(f"cruft could not update from {before['template']}: {reason}; nothing was changed")
    now = json.loads(STATE.read_text(encoding="utf-8"))["commit"][:12]
    rejected = git("ls-files", "--others", "--exclude-standard", "*.rej").split()
    both = sorted({*git("diff", "--name-only", "--diff-filter=U").split(), *rejected})
    if both:
        raise UserError(f"merged with the template's {now}, but you and the template changed the same lines of "
                        f"{', '.join(both)}; settle them as after `git merge`, then commit")  # fmt: skip
    if now == before["commit"][:12] and not more:
        return f"nothing is new since {now}"
    changed = len(git("status", "--porcelain").splitlines())
    return f"merged with the template's {now}, {changed} files: look at `git diff HEAD`, run `make test`, then commit"


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Bring the template's improvements into this project.")
    parser.add_argument("--scope", variable="SCOPE", help=f"grow to it: {', '.join(SCOPES)}")
    print(update(parser.parse_args().scope))
    return 0
