"""Bring the template's improvements into this project, and keep the project's own changes: `make update-template`.

    python -m pipelines update-template
    make update-template SCOPE=full     # and what a larger scope has: local, cloud, full

cruft bakes the template twice, as it was for this project and as it is now, and git merges the difference. Nothing is
committed. Both bakes run the template's hooks: what has changed in it is shown first, and YES=1, or somebody who is
asked, lets them. docs/setup.md says what to do should cruft be gone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

from pipelines import ROOT, terminal
from pipelines.environment import certificates, find_uv
from pipelines.terminal import UserError
from progress import plain, several

STATE = ROOT / ".cruft.json"  # written when the project was made: template, commit, answers
CRUFT = "cruft>=2.16,<3"
SCOPES = ("local", "cloud", "full")


def git(*words: str) -> str:
    """What a git command says about the project."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout


def address(template: str) -> str:
    """A template's address without what lets somebody in: `.cruft.json` is committed. The user of `ssh://git@` stays.

    hooks/post_gen_project.py of the template calls it, too.
    """
    scheme, there, rest = template.partition("://")
    if not there or scheme.lower() == "file":
        return template  # a folder, or git@host:path
    host, slash, path = re.split("[?#]", rest)[0].partition("/")
    login, at, host = host.rpartition("@")
    user = f"{login.partition(':')[0]}@" if at and "ssh" in scheme.lower() else ""
    return f"{scheme}://{user}{host}{slash}{path}"


def cleaned(facts: dict[str, Any]) -> dict[str, Any]:
    """An object of `.cruft.json` with such addresses only; cruft itself notes the template's among the answers, too."""
    return {name: address(value) if name in ("template", "_template") else value for name, value in facts.items()}


def news(template: str, since: str) -> tuple[str, list[str]]:
    """The template's newest commit, and the lines of its log and diff since another one.

    Raises:
        UserError: when it cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="template-") as folder:

        def asked(*words: str) -> tuple[int, str, str]:
            """Git's code, answer and errors; a return in them stays one, and makes no new line."""
            done = subprocess.run(["git", "-C", folder, *words], capture_output=True)
            return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

        failed, _, errors = asked("clone", "--quiet", "--bare", "--", template, folder)
        if failed or not re.fullmatch("[0-9a-f]{40,64}", since) or asked("cat-file", "-e", f"{since}^0")[0]:
            reason = (errors.strip().splitlines() if failed else []) or [f"it has no commit {since}"]
            raise UserError(f"cruft could not update from {plain(template)}: {plain(reason[-1])}; nothing was changed")
        newest = asked("rev-parse", "HEAD")[1].strip()
        # Whatever a file's attributes or bytes are: a hook with a NUL in it runs, and git would call it binary.
        options = ("--text", "--no-ext-diff", "--no-textconv", "--no-color")
        log = asked("log", "--oneline", "--no-color", f"{since}..{newest}")[1]
        shown = log + asked("diff", *options, since, newest)[1]
        return newest, [plain(line.expandtabs()) for line in shown.split("\n")]


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


def agree(changes: list[str]) -> None:
    """Show what has changed in the template, and ask whether it may come.

    Raises:
        UserError: when it may not, or nobody is there to say so.
    """
    print("\n".join(changes), flush=True)
    if not sys.stdin.isatty():
        raise UserError("the template has changed, as shown above, and its hooks would run here; say YES=1 to go on")
    if input("take this, and run the template's hooks? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("nothing was changed")


def update(scope: str | None, yes: bool = False) -> str:
    """Merge what is new in the template, and what a larger scope has.

    Args:
        scope: to grow to; None: the project's own.
        yes: take whatever has changed in the template.

    Returns:
        What was done, for people.

    Raises:
        UserError: when nothing was changed, or files are left that both sides changed.
    """
    if not STATE.exists():
        raise UserError(f"{STATE.name} is missing, so the template of this project is not known; "
                        "`uvx cruft link <template>` writes it")  # fmt: skip
    try:
        facts = json.loads(STATE.read_text(encoding="utf-8"))
        before = json.loads(json.dumps(facts), object_hook=cleaned)
        template, since = before["template"], str(before["commit"])
        current, more = SCOPES[SCOPES.index(before["context"]["cookiecutter"]["scope"])], list[str]()
    except terminal.DAMAGED:
        raise UserError(f"{STATE.name} does not say of which template, commit and scope this project is; take the file "
                        "from an earlier commit, or settle it as after `git merge`") from None  # fmt: skip
    if before != facts:
        STATE.write_text(json.dumps(before, indent=2) + "\n", encoding="utf-8")
        raise UserError(f"the template's address in {STATE.name} held a password or token, which is taken out now: "
                        "make it invalid where it is from, commit the file, and do this again")  # fmt: skip
    if scope and not larger(scope, current):
        return f"this project's scope is {current} already; `make update-template` takes what is new in the template"
    if not git("rev-parse", "--quiet", "--verify", "HEAD"):
        raise UserError("the project has no commit yet; `git add . && git commit` first, so that nothing can be lost")
    if git("status", "--porcelain"):
        raise UserError("there are changes that are not committed; commit or stash them, so that nothing can be lost")
    newest, changes = news(template, since)
    if newest != since and not yes:
        agree(changes)
    if scope:
        more = ["--variables-to-update", json.dumps({"scope": scope})]
        print(f"growing from {current} to {scope}; what is new in the template comes with it", flush=True)
    bundle = certificates()
    words = ["--skip-apply-ask", "--checkout", newest, *more]
    done = subprocess.run(
        [find_uv(ROOT / ".venv"), "tool", "run", "--from", CRUFT, "cruft", "update", *words],
        cwd=ROOT, env=os.environ | ({"SSL_CERT_FILE": bundle} if bundle else {}), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["it gave no reason"]
        reason = next((line for line in said if "fatal:" in line), said[-1]).strip(" \u2502'")
        raise UserError(f"cruft could not update from {plain(template)}: {plain(reason)}; nothing was changed")
    facts = json.loads(STATE.read_text(encoding="utf-8"))
    if facts.get("checkout") != before.get("checkout"):  # only this time: the commit that was shown
        STATE.write_text(json.dumps(facts | {"checkout": before.get("checkout")}, indent=2) + "\n", encoding="utf-8")
    now = facts["commit"][:12]
    rejected = git("ls-files", "--others", "--exclude-standard", "*.rej").split()
    both = sorted({*git("diff", "--name-only", "--diff-filter=U").split(), *rejected})
    if both:
        raise UserError(f"merged with the template's {now}, but you and the template changed the same lines of "
                        f"{', '.join(both)}; settle them as after `git merge`, then commit")  # fmt: skip
    if now == since[:12] and not more:
        return f"nothing is new since {now}"
    files = several(len(git("status", "--porcelain").splitlines()), "file")
    return f"merged with the template's {now}, {files}: look at `git diff HEAD`, run `make test`, then commit"


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Bring the template's improvements into this project.")
    parser.add_argument("--scope", variable="SCOPE", help=f"grow to it: {', '.join(SCOPES)}")
    parser.add_argument("--yes", variable="YES", action="store_true", help="take what is new without being asked")
    options = parser.parse_args()
    print(update(options.scope, options.yes))
    return 0
