"""A project takes over what is new in the template, grows to a larger scope, and keeps what its people changed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from cookiecutter.main import cookiecutter

from tests.conftest import TEMPLATE, Project, fresh_shell, run_tests

SOURCE = "{{cookiecutter.project_slug}}"
NEW = "A sentence that the template's newer version has.\n"


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    done = subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "x")
    return git(folder, "rev-parse", "HEAD")


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A repository that holds the template as its first commit."""
    folder = tmp_path / "template"
    for name in ("cookiecutter.json", "hooks", SOURCE):
        source = TEMPLATE / name
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        shutil.copytree(source, place) if source.is_dir() else shutil.copy(source, place)
    git(tmp_path, "init", "--quiet", str(folder))
    commit(folder)
    return folder


def made(template: Path, folder: Path, ready: Project, **answers: object) -> Project:
    """A project of the template as it is, committed."""
    project = Project(Path(cookiecutter(str(template), no_input=True, extra_context=answers, output_dir=str(folder))))
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    os.utime(project.path / "pyproject.toml", (0, 0))  # older than the environment: make does not install it again
    commit(project.path)
    return project


@pytest.fixture
def project(template: Path, tmp_path: Path, ready: Project) -> Project:
    """A project of that commit, committed."""
    return made(template, tmp_path, ready)


def improve(template: Path) -> str:
    """The template's second commit: a changed file, a new one, one that is gone."""
    tree = template / SOURCE
    text = (tree / "docs" / "scaling.md").read_text(encoding="utf-8")
    (tree / "docs" / "scaling.md").write_text(text + "\n" + NEW, encoding="utf-8")
    (tree / "docs" / "new.md").write_text(NEW, encoding="utf-8")
    (tree / "docs" / "own-loop.md").unlink()
    replace(tree / "configs" / "training.yaml", "batch_size: 64", "batch_size: 48")
    return commit(template)


def test_improvements_come_and_changes_stay(template: Path, project: Project) -> None:
    replace(project.path / "configs" / "training.yaml", "seed: 0", "seed: 7")
    (project.path / "src" / "ours.py").write_text('"""Ours."""\n')
    before = commit(project.path)
    newest = improve(template)
    done = project.make("update-template", "YES=1")
    assert f"merged with the template's {newest[:12]}" in done.stdout
    assert git(project.path, "rev-parse", "HEAD") == before  # nothing was committed
    settings = (project.path / "configs" / "training.yaml").read_text()
    assert "seed: 7" in settings
    assert "batch_size: 48" in settings
    assert NEW in (project.path / "docs" / "scaling.md").read_text()
    assert (project.path / "docs" / "new.md").read_text() == NEW
    assert not (project.path / "docs" / "own-loop.md").exists()
    assert (project.path / "src" / "ours.py").exists()
    facts = json.loads((project.path / ".cruft.json").read_text())
    assert (facts["commit"], facts["checkout"]) == (newest, None)  # the next update is free to go further
    run_tests(project, "tests/test_house.py", "tests/test_inference.py")
    commit(project.path)
    assert f"nothing is new since {newest[:12]}" in project.make("update-template").stdout


def test_lines_that_both_changed_are_named_and_nothing_is_lost(template: Path, project: Project) -> None:
    replace(project.path / "configs" / "training.yaml", "batch_size: 64", "batch_size: 16")
    commit(project.path)
    improve(template)
    done = project.run("make", "update-template", "YES=1")
    assert done.returncode
    assert "you and the template changed the same lines of configs/training.yaml" in done.stderr
    both = (project.path / "configs" / "training.yaml").read_text()
    assert "batch_size: 16" in both
    assert "batch_size: 48" in both


def test_what_was_changed_before_the_first_commit_stays(template: Path, project: Project) -> None:
    """Git has never seen the template's lines, so it cannot merge, and leaves what it could not apply in a file."""
    replace(project.path / "configs" / "training.yaml", "batch_size: 64", "batch_size: 16")
    shutil.rmtree(project.path / ".git")
    git(project.path, "init", "--quiet")
    commit(project.path)
    improve(template)
    done = project.run("make", "update-template", "YES=1")
    assert done.returncode
    assert "you and the template changed the same lines of configs/training.yaml.rej; settle them" in done.stderr
    assert "batch_size: 16" in (project.path / "configs" / "training.yaml").read_text()
    assert "+batch_size: 48" in (project.path / "configs" / "training.yaml.rej").read_text()
    assert NEW in (project.path / "docs" / "scaling.md").read_text()


def test_what_is_not_committed_is_not_touched(template: Path, project: Project) -> None:
    improve(template)
    (project.path / "README.md").write_text("mine")
    done = project.run("make", "update-template")
    assert done.returncode
    assert "there are changes that are not committed" in done.stderr
    assert (project.path / "README.md").read_text() == "mine"


def test_a_template_that_is_gone_is_said(template: Path, project: Project) -> None:
    shutil.rmtree(template)
    done = project.run("make", "update-template")
    assert done.returncode
    assert f"cruft could not update from {template}" in done.stderr
    assert not git(project.path, "status", "--porcelain")
    (project.path / ".cruft.json").unlink()
    assert "the template of this project is not known" in project.run("make", "update-template").stderr


def test_a_project_without_a_commit_is_not_touched(template: Path, project: Project) -> None:
    """Neither one that is in no repository, where cruft would write over changes, nor one in a new repository."""
    improve(template)
    shutil.rmtree(project.path / ".git")
    before = (project.path / ".cruft.json").read_text()
    for _ in range(2):
        done = project.run("make", "update-template", "YES=1")
        assert done.returncode
        assert "error: the project has no commit yet; `git add . && git commit` first" in done.stderr
        assert (project.path / ".cruft.json").read_text() == before
        git(project.path, "init", "--quiet")


def test_a_template_that_cannot_be_baked_is_said(template: Path, project: Project) -> None:
    hook = template / "hooks" / "pre_gen_project.py"
    hook.write_text("import sys\nsys.exit('not today')\n")
    improve(template)
    done = project.run("make", "update-template", "YES=1")
    assert done.returncode
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: cruft could not update from {template}: ")
    assert line.endswith("; nothing was changed")
    assert "merged" not in done.stdout
    assert not git(project.path, "status", "--porcelain")


BORDERS = {  # lines of infrastructure.yaml beside which a larger scope has more: git would not merge two that touch
    "local": {"local_instances: 1": "local_instances: 2", "pretrained: none": "pretrained: ours.pth"},
    "cloud": {
        "local_instances: 1": "local_instances: 2", "pretrained: none": "pretrained: ours.pth",
        "budget_usd: 20": "budget_usd: 30", "monthly_usd: 100": "monthly_usd: 50", "alarms: []": "alarms: [ours]",
        "name: auto": "name: ours", "training: project": "training: ours", "cache_days: 30": "cache_days: 3",
    },
}  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [("local", "cloud"), ("local", "full"), ("cloud", "full")])
def test_a_project_grows_and_keeps_its_changes(
    template: Path, tmp_path: Path, ready: Project, before: str, after: str
) -> None:
    """It ends as a fresh bake of the larger scope with the same changes; what is new in the template comes with it."""
    small = made(template, tmp_path / "small", ready, scope=before, mlflow=True)
    newest = improve(template)
    large = made(template, tmp_path / "large", ready, scope=after, mlflow=True)
    for one in (small, large):
        for old, new in BORDERS[before].items():
            replace(one.path / "configs" / "infrastructure.yaml", old, new)
        replace(one.path / "configs" / "training.yaml", "seed: 0", "seed: 7")
        replace(one.path / "src" / "model.py", "import torch\n", "import torch  # ours\n")
        (one.path / "src" / "ours.py").write_text('"""Ours."""\n')
        commit(one.path)
    done = small.make("update-template", f"SCOPE={after}", "YES=1")
    assert f"growing from {before} to {after}; what is new in the template comes with it" in done.stdout
    assert f"merged with the template's {newest[:12]}" in done.stdout
    facts = json.loads((small.path / ".cruft.json").read_text())
    assert (facts["commit"], facts["context"]["cookiecutter"]["scope"]) == (newest, after)
    files = [{name for name in one.files() if name not in (".cruft.json", ".venv")} for one in (small, large)]
    assert files[0] == files[1]
    assert not [name for name in files[1] if (small.path / name).read_bytes() != (large.path / name).read_bytes()]
    assert (small.path / "pipelines" / "tracking").is_dir() == (after == "full")
    commit(small.path)
    assert f"this project's scope is {after} already" in small.make("update-template", f"SCOPE={after}").stdout
    assert not git(small.path, "status", "--porcelain")


def test_a_project_grows_where_nothing_else_is_new(template: Path, tmp_path: Path, ready: Project) -> None:
    project = made(template, tmp_path, ready, scope="local")
    assert "merged with the template's" in project.make("update-template", "SCOPE=cloud").stdout
    assert (project.path / "infrastructure" / "stack.yaml").is_file()
    assert not (project.path / "pipelines" / "tuning").exists()


@pytest.mark.parametrize(
    ("scope", "sentence"),
    [
        ("local", "error: SCOPE is local, smaller than this project's, which is cloud; a project only grows: "),
        ("large", "error: SCOPE is 'large'; it must be one of local, cloud, full"),
        ("$(touch canary)", "error: SCOPE is '$(touch canary)'; it must be one of local, cloud, full"),
    ],
)
def test_a_scope_that_is_smaller_or_unknown_is_refused(project: Project, scope: str, sentence: str) -> None:
    done = project.run("make", "update-template", f"SCOPE={scope}")
    assert done.returncode
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(sentence)
    assert "Traceback" not in done.stderr
    assert not git(project.path, "status", "--porcelain")


def test_what_is_new_is_shown_before_any_of_it_runs(template: Path, project: Project) -> None:
    """Without a terminal and without YES nothing of the new commit runs; what it would be is on the screen, as text."""
    ran = template.parent / "ran"
    hook = template / "hooks" / "post_gen_project.py"
    hook.write_text(f"{hook.read_text()}\nopen({str(ran)!r}, 'w')  # \x1b]52;c;cm0=\x07 \u202egpj.exe\n")
    (template / "hooks" / "a\nb").write_text("x\rforged\n")
    git(template, "add", "--all")
    git(template, "commit", "--quiet", "--message", "harmless \x1b[2K\u2066")
    done = project.run("make", "update-template")
    assert done.returncode
    assert "error: the template has changed, as shown above, and its hooks would run here; say YES=1 to go on" in (
        done.stderr.splitlines()
    )
    assert not ran.exists()
    assert not git(project.path, "status", "--porcelain")
    assert "harmless" in done.stdout
    assert f"+open({str(ran)!r}, 'w')  # " in done.stdout
    assert "+x\\rforged" in done.stdout.splitlines()
    assert all(character.isprintable() or character == "\n" for character in done.stdout)
    assert project.run("make", "update-template", "YES=no").returncode
    assert not ran.exists()
    project.make("update-template", "YES=1")
    assert ran.exists()


def test_nothing_of_what_is_new_is_shown_as_binary(template: Path, project: Project, tmp_path: Path) -> None:
    """A shell runs a hook with a NUL in it; and somebody's own settings for git are for other repositories."""
    (template / "hooks" / "pre_gen_project.sh").write_bytes(b"#!/bin/sh\n# \0 \xff\necho hook\n")
    (template / "notes.txt").write_text("a note\n")
    commit(template)
    (tmp_path / "attributes").write_text("*.txt diff=quiet\n")
    settings = ("[color]\nui = always\n[diff]\nexternal = true\n", '[diff "quiet"]\ntextconv = true\n')
    for text in settings:
        (tmp_path / "settings").write_text(f"{text}[core]\nattributesFile = {tmp_path / 'attributes'}\n")
        done = project.run("make", "update-template", GIT_CONFIG_GLOBAL=str(tmp_path / "settings"))
        assert "say YES=1 to go on" in done.stderr
        assert {"+# \\x00 \ufffd", "+echo hook", "+a note"} <= {*done.stdout.splitlines()}
        assert "Binary" not in done.stdout
        assert "\\x1b" not in done.stdout


def test_what_was_shown_is_what_comes(template: Path, project: Project, tmp_path: Path) -> None:
    """Whatever the template has got in the meantime: here, just before cruft starts."""
    shown = improve(template)
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    later = f"git -C {shlex.quote(str(template))} -c user.name=t -c user.email=t@example.com commit --quiet"
    uv.write_text(f'#!/bin/sh\n{later} --allow-empty --message later\nexec {TEMPLATE}/.venv/bin/uv "$@"\n')
    uv.chmod(0o755)
    done = project.make("update-template", "YES=1", PATH=f"{uv.parent}:{os.environ['PATH']}")
    assert git(template, "rev-parse", "HEAD") != shown
    assert f"merged with the template's {shown[:12]}" in done.stdout
    assert json.loads((project.path / ".cruft.json").read_text())["commit"] == shown


@pytest.mark.parametrize(("answer", "taken"), [("y", True), ("n", False), ("", False), ("yes please", False)])
def test_somebody_at_a_terminal_is_asked(template: Path, project: Project, answer: str, taken: bool) -> None:
    newest = improve(template)
    line = f"{shlex.quote(project.program('python'))} -m pipelines update-template"
    done = subprocess.run(
        ["script", "-qec", line, "/dev/null"], input=answer + "\n", cwd=project.path, env=fresh_shell(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert "take this, and run the template's hooks? [y/N]" in done.stdout
    assert NEW in done.stdout.replace("\r", "")
    assert (f"merged with the template's {newest[:12]}" in done.stdout) == taken
    assert ("error: nothing was changed" in done.stdout) == (not taken)


@pytest.mark.parametrize("commit", ["--output=/tmp/x", "0" * 40, "HEAD", "$(touch canary)", "x\nerror: y"])
def test_a_commit_that_is_none_is_refused(project: Project, commit: str) -> None:
    state = project.path / ".cruft.json"
    facts = json.loads(state.read_text())
    state.write_text(json.dumps(facts | {"commit": commit}))
    git(project.path, "commit", "--quiet", "--all", "--message", "x")
    done = project.run("make", "update-template", "YES=1")
    assert done.returncode
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    shown = commit.replace("\n", "\\n")
    assert f"it has no commit {shown}; nothing was changed" in line
    assert "Traceback" not in done.stderr
    assert not list(project.path.rglob("canary"))


@pytest.mark.parametrize("damage", ["<<<<<<< HEAD\n{}\n", "{}", "[1]", '"scope"', "\udcff", "null", "huge", 7])
def test_a_note_of_the_template_that_is_damaged_is_said(project: Project, damage: str | int) -> None:
    """As where two branches were updated and merged; the last two are a scope that is none."""
    state = project.path / ".cruft.json"
    facts = json.loads(state.read_text())
    if damage in ("huge", 7):
        facts["context"]["cookiecutter"]["scope"] = damage
    state.write_text(json.dumps(facts) if damage in ("huge", 7) else str(damage), errors="surrogateescape")
    before = state.read_bytes()
    done = project.run("make", "update-template", "YES=1")
    assert done.returncode
    assert "error: .cruft.json does not say of which template, commit and scope this project is" in done.stderr
    assert "Traceback" not in done.stderr
    assert state.read_bytes() == before


def test_an_address_stays_on_its_line(project: Project) -> None:
    state = project.path / ".cruft.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"template": "/gone\nerror: all is well"}))
    commit(project.path)
    done = project.run("make", "update-template")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: cruft could not update from /gone\\nerror: all is well: ")


@pytest.mark.parametrize("places", [("template",), ("_template",), ("template", "_template")])
def test_a_token_in_the_address_is_taken_out(project: Project, places: tuple[str, ...]) -> None:
    """From among the answers, too, where `cruft link` notes the address once more."""
    state = project.path / ".cruft.json"
    facts = json.loads(state.read_text())
    wheres = {"template": facts, "_template": facts["context"]["cookiecutter"]}
    for place in places:
        wheres[place][place] = "https://user:s3cret@example.com/team/template.git"
    state.write_text(json.dumps(facts))
    git(project.path, "commit", "--quiet", "--all", "--message", "x")
    done = project.run("make", "update-template", "YES=1")
    assert done.returncode
    assert "held a password or token, which is taken out now" in done.stderr
    assert "s3cret" not in state.read_text() + done.stdout + done.stderr
    for place in places:
        wheres[place][place] = "https://example.com/team/template.git"
    assert json.loads(state.read_text()) == facts
