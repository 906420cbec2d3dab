"""The generated project's verbs: the table, the Makefile's one rule, values that are data, commands to paste."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import HOSTILE, NO_ENGINE, TREE, Bake, Project, fresh_shell

# Another make, such as 3.81, which macOS has.
MAKE = os.environ.get("OTHER_MAKE", "make")
WORDS = [
    "a b", "it's", 'say "x"', "$", "$$", "a$b", "$(touch canary)", "$(shell touch canary)", "${shell touch canary}",
    "$(error no)", "`touch canary`", "; touch canary", "| touch canary &", "-rf", "--set=x", "--", "x\ny", "#x", "a\\",
    "\\", "%", "%d", "=", "a=b", ":=", "!", "~", "*", "$(DATA)", "$@", "(", "ünïcödé 🐈", "trailing ", "a,b", "'", '"',
]  # fmt: skip
NEWER = [  # than make 3.81: in NEWS of 3.82 to 4.4
    ".ONESHELL", ".RECIPEPREFIX", ".SHELLFLAGS", ".POSIX", "::=", ":::=", "!=", "$(file", "$(guile", "$(let",
    "$(intcmp", "undefine", "private", "override export", "export override", "-include", "load ",
    ".NOTINTERMEDIATE", ".WAIT", ".EXTRA_PREREQS", "MAKE_TERMOUT", "--shuffle",
]  # fmt: skip


def table() -> dict[str, dict[str, tuple[Any, str]]]:
    """Of the template's tree: every verb that there is."""
    code = (TREE / "pipelines" / "__main__.py").read_text(encoding="utf-8")
    found = next(node for node in ast.parse(code).body if isinstance(node, ast.AnnAssign) and node.value
                 and ast.unparse(node.target) == "VERBS")  # fmt: skip
    assert found.value
    made: dict[str, dict[str, tuple[Any, str]]] = ast.literal_eval(found.value)
    return made


ROWS = {verb: row for rows in table().values() for verb, row in rows.items()}
MODULES = sorted(verb for verb, (target, _) in ROWS.items() if isinstance(target, str))
WHOLE = {"scope": "full", "mlflow": True}  # a project with every verb
FLAGS = {"TRUST", "YES", "WAIT", "ALL", "PLAN"}
RECORDER = """#!{python}
import json, os, runpy, sys
sys.path.insert(0, "")
from pipelines import terminal

def record(self, args=None, namespace=None):
    values = {{name: terminal.given.get(name) for name in self.variables}}
    with open("recorded.json", "a") as file:
        print(json.dumps([self.prog, [*self._from_make(), *sys.argv[1:]], values]), file=file)
    sys.exit(0)

terminal.Parser.parse_known_args = record
assert sys.argv[1:3] == ["-m", "pipelines"]
sys.argv[:] = ["", *sys.argv[3:]]
runpy.run_module("pipelines", run_name="__main__", alter_sys=True)
"""


def terminal() -> Any:
    """The tree's module, which needs the standard library only."""
    spec = importlib.util.spec_from_file_location("terminal_of_the_tree", TREE / "pipelines" / "terminal.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    if str(TREE / "src") not in sys.path:
        sys.path.append(str(TREE / "src"))
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(bake: Bake, ready: Project) -> Project:
    """A project with every verb, and the environment of a smaller one."""
    project = bake(**WHOLE)
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    (project.path / ".venv" / ".ready").touch()  # or make would bring it up to date
    return project


@pytest.fixture(scope="module")
def recorded(bake: Bake, ready: Project) -> Project:
    """A project with every verb, whose Python writes what a verb's parser gets to recorded.json and ends."""
    project = bake(**WHOLE)
    programs = project.path / ".venv" / "bin"
    programs.mkdir(parents=True)
    python = programs / "python"
    python.write_text(RECORDER.format(python=ready.program("python")), encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (project.path / ".venv" / ".ready").touch()
    return project


def calls(project: Project, *words: str, **environment: str) -> list[Any]:
    """What the verbs of a call of make got; nothing may have been executed on the way."""
    file = project.path / "recorded.json"
    file.unlink(missing_ok=True)
    done = project.run(MAKE, *words, **environment)
    assert not list(project.path.rglob("canary"))
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def refused(project: Project, *words: str, **environment: str) -> str:
    """The one sentence of a call of make that fails."""
    done = project.run(MAKE, *words, **environment)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert line.startswith("error: ")
    return line


def taken(verb: str) -> list[str]:
    return sorted({name for name in re.findall(r"\b([A-Z_]+)=", ROWS[verb][1]) if name != "ARGS"})


def test_help_lists_every_verb_and_make_alone_eight(bake: Bake) -> None:
    """On the system's Python, before there is an environment."""
    for project in (bake(**WHOLE), bake(), bake(scope="local"), bake(**HOSTILE)):
        printed = project.make("help", COLUMNS="80").stdout
        alone = project.make(COLUMNS="80").stdout
        listed = re.findall(r"^  make ([a-z-]+) ", printed, re.MULTILINE)
        files = {
            f"pipelines/{target.replace('.', '/')}.py": verb for verb, (target, _) in ROWS.items() if verb in MODULES
        }
        assert listed == [
            verb for verb in ROWS if verb not in MODULES or verb in [files.get(f) for f in project.files()]
        ]
        assert len(re.findall(r"^  make ([a-z-]+) ", alone, re.MULTILINE)) == 8
        assert len(alone.splitlines()) <= 24
        for text in (printed, alone):
            assert max(map(len, text.splitlines())) <= 80
            assert text.count("request validated, not run on AWS") == ("train" in listed)
        said = " ".join(printed.split())
        assert all(" ".join(ROWS[verb][1].split()) in said for verb in listed)
        assert not (project.path / ".venv").exists()
        assert project.run(sys.executable, "-m", "pipelines", COLUMNS="80").stdout == printed


@pytest.mark.parametrize("name", ["__main__", "__init__", "terminal", "environment"])
def test_what_runs_before_the_environment_is_python_3_9(name: str) -> None:
    tree = ast.parse((TREE / "pipelines" / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 9))
    used = {part.name if isinstance(node, ast.Import) else node.module for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom) for part in node.names}  # fmt: skip
    assert {str(module).split(".")[0] for module in used} <= {*sys.stdlib_module_names, "pipelines", "progress"}
    ast.parse((TREE / "src" / "progress.py").read_text(encoding="utf-8"), feature_version=(3, 9))


def test_the_makefile_is_short_and_old_enough_for_macos() -> None:
    text = (TREE / "Makefile").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 45
    assert "{%" not in text
    assert [word for word in NEWER if word in text] == []
    assert re.search(r"(?m)^define", text) is None


def test_names_that_left_are_gone_and_the_others_stay() -> None:
    assert set(ROWS) == set(
        "help setup data train-local evaluate report compare predict serve-local batch-local tune-local pipeline-local "
        "track notebook image bootstrap doctor image-push rehearse process train tune pipeline logs pull register "
        "approve deploy invoke shift-traffic batch monitor status destroy test lint format audit update-template "
        "clean".split()
    )


def test_help_says_which_verbs_have_not_run_on_aws() -> None:
    for stage, rows in table().items():
        for verb, (target, _) in rows.items():
            code = (
                TREE.joinpath("pipelines", *target.split(".")).with_suffix(".py") if isinstance(target, str) else None
            )
            if code and re.search(r"(?m)^from pipelines\.cloud import .*\baccount\b", code.read_text(encoding="utf-8")):
                assert stage.startswith("On SageMaker"), f"make {verb} asks AWS"


def test_no_verb_is_a_program_of_its_own() -> None:
    mains = [path.name for path in (TREE / "pipelines").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert sorted(mains) == ["__main__.py", "environment.py"]


@pytest.mark.parametrize("verb", MODULES)
def test_every_variable_of_a_verb_arrives_as_it_was_typed(verb: str, recorded: Project) -> None:
    """The variables that its line of help names are those of its options, and every value is data."""
    first = 5 * MODULES.index(verb)
    given = {name: "1" if name in FLAGS else WORDS[(first + 7 * number) % len(WORDS)]
             for number, name in enumerate(taken(verb))}  # fmt: skip
    typed = calls(recorded, verb, *(f"{name}={value}" for name, value in given.items()), "ARGS=--set 'a b' $HOME")
    ((prog, words, values),) = typed
    assert prog == f"python -m pipelines {verb}"
    assert values == given
    assert words[-3:] == ["--set", "a b", "$HOME"]
    options = words[:-3]
    assert len(options) == len(given)
    assert {word.partition("=")[2] for word in options} == {"" if n in FLAGS else v for n, v in given.items()}
    assert calls(recorded, verb, **given)[0][1] == options  # from the shell's environment


@pytest.mark.parametrize("value", WORDS)
def test_every_value_is_data_and_dry_runs_run_nothing(value: str, recorded: Project) -> None:
    assert calls(recorded, "predict", f"IMAGE={value}", "RUN=x")[0][1] == ["--run=x", f"--image={value}"]
    done = recorded.run(MAKE, "-n", "predict", f"IMAGE={value}", f"ARGS={value}")
    assert done.returncode == 0
    assert not list(recorded.path.rglob("canary"))
    recorded.run(MAKE, "predict", f"ARGS={value}", f"PYTHON={value}")
    recorded.run(MAKE, value)
    assert not list(recorded.path.rglob("canary"))


@given(value=st.text(st.characters(codec="utf-8", exclude_characters="\0")), words=st.lists(st.text(max_size=9)))
@settings(max_examples=30)
def test_what_a_verb_prints_comes_back_as_it_was(recorded: Project, value: str, words: list[str]) -> None:
    """From the command that is printed, through a shell and make, to the verb."""
    words = [word.replace("\0", "").encode("utf-8", "ignore").decode() for word in words]
    line = terminal().command("predict", IMAGE=value, RUN="it's $$1", ARGS=shlex.join(words))
    file = recorded.path / "recorded.json"
    file.unlink(missing_ok=True)
    shell = line.replace("make predict", f"{shlex.quote(MAKE)} predict")
    done = subprocess.run(["sh", "-c", shell], cwd=recorded.path, env=fresh_shell(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image = [f"--image={value}"] if value else []
    assert json.loads(file.read_text())[1] == ["--run=it's $$1", *image, *words]


def test_commands_are_printed_plainly_where_nothing_needs_quotes() -> None:
    command = terminal().command
    assert command("evaluate", RUN="20261121-093000-a1b2") == "make evaluate RUN=20261121-093000-a1b2"
    assert command("train", ARGS="--set training.epochs=3") == "make train ARGS='--set training.epochs=3'"
    assert (
        command("predict", IMAGE=" x", RUN="r") == "IMAGE=' x' make predict RUN=r"
    )  # make drops blanks at a beginning


@pytest.mark.parametrize(("value", "on"), [("1", True), ("Yes", True), ("true", True), ("on", True), ("0", False),
                                           ("no", False), ("FALSE", False), ("off", False), ("", False)])  # fmt: skip
def test_a_switch_is_yes_or_no(value: str, on: bool, recorded: Project) -> None:
    assert calls(recorded, "train", f"PLAN={value}", f"YES={value}")[0][1] == (["--yes", "--plan"] if on else [])


def test_what_cannot_be_understood_is_one_sentence(recorded: Project) -> None:
    assert "YES is 'maybe', which is neither yes nor no" in refused(recorded, "train", "YES=maybe")
    assert "make train-local takes no DTAA; did you mean DATA?" in refused(recorded, "train-local", "DTAA=x")
    assert "it takes LOCAL_MODE, RUN, TRUST, ARGS" in refused(recorded, "evaluate", "IMAGE=x")
    assert "did you mean TRAINING__EPOCHS?" in refused(recorded, "train-local", "TRANING__EPOCHS=1")
    assert 'no closing quotation in "--x \'y"' in refused(recorded, "data", "ARGS=--x 'y")
    assert "no verb 'trian-local'; did you mean train-local?" in refused(recorded, "trian-local")
    assert "no verb 'xyzzy'; `make help` shows all" in refused(recorded, "xyzzy")
    assert "lint is 3 programs, which take no options" in refused(recorded, "lint", "ARGS=--fix", PYTHON="python3")


def test_what_is_not_of_the_verb_but_of_others_may_be_given(recorded: Project) -> None:
    both = calls(recorded, "data", "predict", "DATA=d", "IMAGE=i")
    assert [(prog.split()[-1], words) for prog, words, _ in both] == [
        ("data", ["--data=d"]),
        ("predict", ["--image=i"]),
    ]
    assert calls(
        recorded, "train-local", "TRAINING__EPOCHS=1", "AWS_PROFILE=me", "INFERENCE_THREADS=1", "SHELL=/bin/sh"
    )
    assert calls(recorded, "evaluate", DATA="of another verb", NONSENSE="1")[0][1] == []


def test_a_verbs_help_shows_its_variables_and_imports_nothing_slow(whole: Project) -> None:
    for verb in MODULES:
        code = (
            f"import sys; sys.argv[1:] = [{verb!r}, '--help']; from pipelines import __main__ as m\n"
            "try: m.main()\n"
            "except SystemExit: print([n for n in ('torch', 'sagemaker', 'boto3', 'numpy', 'PIL') if n in sys.modules])"
        )
        done = whole.run(whole.program("python"), "-c", code, COLUMNS="80")
        assert done.stdout.splitlines()[-1] == "[]", f"{verb}: {done.stdout + done.stderr}"
        assert done.stdout.startswith(f"usage: python -m pipelines {verb} ")
        assert {*taken(verb)} == {*re.findall(r"\[([A-Z_]+)=1?\]", done.stdout)}
        assert max(map(len, done.stdout.splitlines())) <= 80


def test_an_error_of_an_option_names_its_variable(whole: Project) -> None:
    assert "--instances (INSTANCE_COUNT=): invalid int value: 'two'" in refused(whole, "train", "INSTANCE_COUNT=two")
    assert "required: --variant (VARIANT=), --weight (WEIGHT=)" in refused(whole, "shift-traffic")


def test_a_python_without_the_packages_is_told_apart(ready: Project) -> None:
    done = ready.run(
        sys.executable,
        "-I",
        "-c",
        "import sys; sys.path.insert(0, '.'); sys.modules['pydantic'] = None\n"
        "sys.argv[1:] = ['data']; from pipelines import __main__ as m, terminal; terminal.run_verb(m.main)",
    )
    assert done.stderr.startswith("error: this Python has no pydantic; the project's is .venv/bin/python")


def test_tracking_follows_training_and_its_failure_is_none_of_it(bake: Bake, ready: Project) -> None:
    project = bake(**WHOLE)
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    track = project.path / "pipelines" / "tracking" / "track.py"
    track.write_text("import sys\n\n\ndef main():\n    print('tracking', sys.argv[1:], flush=True)\n    return 7\n")
    quick = {"TRAINING__EPOCHS": "1", "COMPUTE__LOCAL_MODE": "process", **NO_ENGINE}
    done = project.run(MAKE, "train-local", "ARGS=--verbose", **quick)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("tracking ['--optional']\n")
    failed = project.run(MAKE, "train-local", "RUN=none", **quick)
    assert failed.returncode == 2
    assert "tracking" not in failed.stdout
    pull = project.path / "pipelines" / "cloud" / "pull.py"
    pull.write_text("def main():\n    return 0\n")
    assert project.run(MAKE, "pull", "JOB=a b", "ARGS=--set x=1").stdout == (
        "tracking ['--optional', '--job=a b', '--set', 'x=1']\n"
    )


def test_readme_names_only_verbs_and_variables_that_exist(ready: Project) -> None:
    readme = (ready.path / "README.md").read_text(encoding="utf-8")
    for verb in set(re.findall(r"`?make ([a-z-]+)", readme)):
        assert verb in ROWS, f"the README names make {verb}"
    known = {name for verb in ROWS for name in taken(verb)} | {"ARGS", "IMAGES__BASE", "SCOPE"}
    assert set(re.findall(r"\b([A-Z_]{3,})=", readme)) <= known


def test_help_for_a_reader_who_has_seen_enough(bake: Bake) -> None:
    """As in `make help | head -1`: no traceback."""
    done = bake().run("bash", "-c", "python3 -m pipelines help | true; echo ${PIPESTATUS[0]}", PYTHONUNBUFFERED="1")
    assert done.stdout.strip() in ("0", "141")
    assert not done.stderr


def test_help_beside_a_verb_runs_nothing(bake: Bake, ready: Project) -> None:
    project = bake()
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    for words in (("help", "train-local"), ("train-local", "help")):
        done = project.make(*words)
        assert done.stdout.startswith("usage: python -m pipelines train-local")
        assert not (project.path / "data").exists()


def test_a_verb_of_a_larger_scope_says_so(bake: Bake, ready: Project) -> None:
    for scope, verb, larger in (("local", "deploy", "cloud"), ("local", "tune", "full"), ("cloud", "tune", "full")):
        done = bake(scope=scope).run(ready.program("python"), "-m", "pipelines", verb)
        assert done.returncode == 2
        assert (
            done.stderr == f"error: {verb} comes with a larger scope: `make update-template SCOPE={larger}` adds it\n"
        )
