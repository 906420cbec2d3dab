"""Answers are checked before a file exists; what comes after the bake never loses the project."""

from __future__ import annotations

import ast
import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import TEMPLATE, TREE, Project, as_jinja

PRINTABLE = st.text(st.characters(codec="utf-8").filter(str.isprintable), min_size=1)
TAKEN = ("class", "json", "torch", "requests", "pre_commit", "scikit_learn", "src", "mlflow")


def hook(**answers: str) -> dict[str, Any]:
    """The variables of pre_gen_project.py, rendered as cookiecutter does."""
    good = {"project_name": "Cats", "description": "Cats", "author": "Me", "project_slug": "cats"}
    good |= {"aws_region": "us-east-1", "scope": "cloud"} | answers
    environment = jinja2.Environment(autoescape=False)
    source = (TEMPLATE / "hooks" / "pre_gen_project.py").read_text(encoding="utf-8")
    variables: dict[str, Any] = {"__name__": "hook"}
    exec(environment.from_string(source).render(cookiecutter=good), variables)
    return variables


def problem(**answers: str) -> str | None:
    """What the hook says to these answers."""
    said: str | None = hook(**answers)["problem"]()
    return said


def bake(output: Path, *answers: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Bake from the command line, as a user does."""
    command = [sys.executable, "-m", "cookiecutter", str(TEMPLATE), "--no-input", "--output-dir", str(output), *answers]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("project_slug=Cats", "project_slug is 'Cats'"),
        ("project_slug=../cats", "project_slug is '../cats'"),
        ("project_slug=-cats", "project_slug is '-cats'"),
        ("project_slug=torch", "a name that Python or a dependency uses"),
        ("aws_region=mars", "aws_region is 'mars'; it must be one of"),
        ("description=", "description is ''; it must be one printable line"),
        ("description=two\nlines", "it must be one printable line"),
        (f"author={'a' * 101}", "it must be one printable line of 1 to 100 characters"),
    ],
)
def test_a_bad_answer_is_one_sentence_and_leaves_nothing(tmp_path: Path, answer: str, sentence: str) -> None:
    (tmp_path / "here").mkdir()
    done = bake(tmp_path / "here", answer)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_a_path_never_overwrites_what_is_there(tmp_path: Path) -> None:
    for name in ("here", "precious"):
        (tmp_path / name).mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    for slug in ("../precious", str(tmp_path / "precious"), "..", ".", ""):
        assert bake(tmp_path / "here", f"project_slug={slug}").returncode != 0
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"
    assert list((tmp_path / "here").iterdir()) == []


@given(slug=st.text() | PRINTABLE | st.from_regex(r"[-a-zA-Z_./0-9 ]{1,35}", fullmatch=True))
def test_an_accepted_slug_is_valid_everywhere(slug: str) -> None:
    """As a Python name, a package, a Docker repository, and in SageMaker's names (CreateTrainingJob: 63 characters)."""
    if problem(project_slug=slug) is None:
        assert slug.isidentifier()
        assert slug.isascii()
        assert slug == slug.lower()
        assert not keyword.iskeyword(slug)
        assert slug not in sys.stdlib_module_names
        assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", slug.replace("_", "-"))
        assert re.fullmatch(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*", slug.replace("_", "-"))
        assert re.fullmatch(r"[a-z0-9]|[a-z0-9][a-z0-9._-]*[a-z0-9]", slug)
        assert len(slug) <= 30
        assert Path("here", slug).parent == Path("here")
    else:
        assert "project_slug is " in str(problem(project_slug=slug))
        assert "\n" not in str(problem(project_slug=slug))


@given(slug=st.from_regex(r"[a-z][a-z0-9]{0,9}(_[a-z0-9]{1,9}){0,2}", fullmatch=True))
def test_a_good_slug_is_accepted_unless_python_or_a_dependency_has_it(slug: str) -> None:
    known = set(sys.stdlib_module_names) | set(keyword.kwlist) | set(hook()["TAKEN"])
    assert (problem(project_slug=slug) is None) == (slug not in known)


@given(slug=st.from_regex(r"[a-z][a-z0-9]{20,39}", fullmatch=True))
def test_a_slug_has_at_most_30_characters(slug: str) -> None:
    assert (problem(project_slug=slug) is None) == (len(slug) <= 30)


@pytest.mark.parametrize("slug", TAKEN)
def test_a_name_in_use_is_refused(slug: str) -> None:
    assert "a name that Python or a dependency uses" in str(problem(project_slug=slug))


def test_every_dependency_and_every_folder_is_in_use() -> None:
    text = (TREE / "pyproject.toml").read_text(encoding="utf-8").replace("{{ ", "").replace(" }}", "")
    groups = tomllib.loads(text)["dependency-groups"]
    requirements = [re.split(r"[^A-Za-z0-9._-]", entry)[0] for group in groups.values() for entry in group]
    folders = [
        path.stem for path in [*TREE.iterdir(), *(TREE / "src").iterdir()] if path.is_dir() or path.suffix == ".py"
    ]
    assert len(requirements) > 10
    assert {"model", "progress", "payload", "training"} <= {*folders}
    for name in [*requirements, *folders, "pil", "yaml", "sklearn", "data", "artifacts"]:
        slug = re.sub(r"[-.]", "_", name).lower()
        if not slug.startswith("_"):
            assert problem(project_slug=slug), f"{slug} is not refused"


def test_what_the_environment_installs_is_in_use(ready: Project) -> None:
    """A lock fails for a project that is named like any of it. New dependencies of dependencies may be missing."""
    uv = str(TEMPLATE / ".venv" / "bin" / "uv")
    listed = ready.run(uv, "pip", "list", "--format", "json", "--python", ready.program("python")).stdout
    slugs = {re.sub(r"[-.]", "_", package["name"]).lower() for package in json.loads(listed)}
    assert len(slugs) > 50
    free = {slug for slug in slugs if problem(project_slug=slug) is None}
    assert len(free) < 0.1 * len(slugs), f"add to TAKEN: {sorted(free)}"


@given(text=st.text(max_size=250) | PRINTABLE)
def test_texts_are_one_printable_line(text: str) -> None:
    for name, longest in hook()["TEXTS"].items():
        fine = bool(text.strip()) and len(text) <= longest and len(text.splitlines()) == 1 and text.isprintable()
        said = problem(**{name: text})
        assert (said is None) == fine
        assert said is None or (said.startswith(f"{name} is ") and "\n" not in said)


@given(region=PRINTABLE | st.from_regex(r"[a-z]{2}-[a-z]{4,9}-[1-9]", fullmatch=True))
def test_regions_come_from_the_list(region: str) -> None:
    assert (problem(aws_region=region) is None) == (region in hook()["REGIONS"])


@given(name=PRINTABLE)
def test_the_slug_that_is_proposed_is_never_too_long(name: str) -> None:
    """Pressing Enter at the second prompt gives a good slug wherever the name has letters and is not taken."""
    from cookiecutter.environment import StrictEnvironment

    prompts = json.loads((TEMPLATE / "cookiecutter.json").read_text(encoding="utf-8"))
    environment = StrictEnvironment(context={"cookiecutter": {}})
    slug = environment.from_string(prompts["project_slug"]).render(cookiecutter={"project_name": name})
    assert len(slug) <= 30
    if re.match(r"[a-z]", slug):
        assert problem(project_slug=slug) is None or "a name that Python or a dependency uses" in str(
            problem(project_slug=slug)
        )


def test_answers_at_the_prompts_are_data(tmp_path: Path) -> None:
    """Template syntax and shell syntax that somebody types end up in the files as they were typed."""
    description = "{{ 7 * 7 }} {% raw %} {# no #} $(touch canary) `touch canary` $(shell touch canary)"
    author = 'Robert\'); DROP TABLE "Students";-- \\ # {braces}'
    answers = ["Cats", "cats", description, author, "eu-west-1", "2", "3", "y"]
    command = [sys.executable, "-m", "cookiecutter", str(TEMPLATE), "--output-dir", str(tmp_path)]
    done = subprocess.run(command, input="\n".join(answers) + "\n", capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = tomllib.loads((tmp_path / "cats" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert facts["description"] == description
    assert facts["authors"] == [{"name": author}]
    assert description in (tmp_path / "cats" / "README.md").read_text(encoding="utf-8").splitlines()
    assert (tmp_path / "cats" / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    for words in (["help"], ["-n", "train-local"]):
        assert Project(tmp_path / "cats").run("make", *words).returncode == 0
    assert not list(tmp_path.rglob("canary"))


@given(scope=PRINTABLE | st.sampled_from(["local", "cloud", "full", "Full", "cloud "]))
def test_scopes_come_from_the_list(scope: str) -> None:
    assert (problem(scope=scope) is None) == (scope in ("local", "cloud", "full"))


def test_booleans_and_choices_from_the_command_line(tmp_path: Path) -> None:
    done = bake(tmp_path, "project_name=Big Cats", "scope=full", "mlflow=yes", "licence=MIT")
    assert done.returncode == 0, done.stderr
    project = tmp_path / "big_cats"
    assert (project / ".github" / "workflows" / "deliver.yml").exists()
    assert (project / "pipelines" / "tracking" / "track.py").exists()
    assert "cd big_cats" in done.stdout
    assert (project / ".git").is_dir()
    for answer in ("scope=everything", "mlflow=maybe", "licence=GPL"):  # cookiecutter looks before any hook can
        done = bake(tmp_path, "project_slug=other", answer)
        assert done.returncode != 0
        last = done.stderr.splitlines()[-1]
        assert answer.partition("=")[0] in last
        assert answer.partition("=")[2] in last
        assert not (tmp_path / "other").exists()


def test_mlflow_in_a_smaller_scope_waits_and_says_so(tmp_path: Path) -> None:
    for scope in ("local", "cloud", "full"):
        done = bake(tmp_path, f"project_slug=in_{scope}", f"scope={scope}", "mlflow=yes")
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stdout.splitlines() if "MLflow" in line]
        assert len(said) == (scope != "full")
        assert (tmp_path / f"in_{scope}" / "pipelines" / "tracking").exists() == (scope == "full")
        facts = json.loads((tmp_path / f"in_{scope}" / ".cruft.json").read_text(encoding="utf-8"))
        assert facts["context"]["cookiecutter"]["scope"] == scope
        assert facts["context"]["cookiecutter"]["mlflow"] is True


def test_the_hook_removes_what_is_there(tmp_path: Path) -> None:
    """Its table names nothing that the tree does not have, and one part's removal never ends another's."""
    source = (TEMPLATE / "hooks" / "post_gen_project.py").read_text(encoding="utf-8")
    variables: dict[str, Any] = {"__name__": "hook"}
    answers = {"project_slug": "cats", "scope": "local", "mlflow": True, "__tracking": ""}
    exec(jinja2.Environment(autoescape=False).from_string(source).render(cookiecutter=answers), variables)
    for path in variables["lacks"]():
        assert (TREE / path).exists(), f"the template has no {path}"
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_given_as_data_is_data() -> None:
    """The helper that the bakes of other tests use: a Jinja literal of any text."""
    for text in ("a", "{{ 7 }}", "'\"\\", "ünïcödé 🐈"):
        assert jinja2.Environment(autoescape=False).from_string(as_jinja(text)).render() == text


def test_without_git_and_inside_a_repository(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    done = bake(tmp_path / "plain", PATH=str(programs))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain" / "image_classifier" / "Makefile").exists()
    assert not (tmp_path / "plain" / "image_classifier" / ".git").exists()
    assert "image_classifier is ready. Next:" in done.stdout
    (programs / "git").write_text("no program")  # one that cannot be started
    (programs / "git").chmod(0o755)
    done = bake(tmp_path / "broken", PATH=str(programs))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "broken" / "image_classifier" / "Makefile").exists()
    git = shutil.which("git")
    assert git
    subprocess.run([git, "init", "--quiet", str(tmp_path / "repository")], check=True)
    done = bake(tmp_path / "repository")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "repository" / "image_classifier" / ".git").exists()


def address() -> Any:
    """The function of the tree that hook and update share."""
    code = "import sys; sys.dont_write_bytecode = True; from pipelines.update_template import address\n"
    code += "print([address(line) for line in sys.argv[1:]])"

    def run(*lines: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", code, *lines], cwd=TREE, capture_output=True, text=True, check=True
        )
        return ast.literal_eval(done.stdout)

    return run


ADDRESSES = {
    "https://user:s3cret@host/team/it.git": "https://host/team/it.git",
    "https://s3cret@host/it": "https://host/it",
    "https://oauth2:s3cret@host:8443/it": "https://host:8443/it",
    "HTTPS://x-access-token:s3cret@host/it": "HTTPS://host/it",
    "https://us%40er:s3%2Fcret@host/@scope/it": "https://host/@scope/it",
    "https://a@b:s3cret@host/it": "https://host/it",
    "https://host/it.git?private_token=s3cret": "https://host/it.git",
    "https://host/it.git#access_token=s3cret": "https://host/it.git",
    "https://u:s3cret@host?token=s3cret": "https://host",
    "http://u:s3cret@[::1]:80/it": "http://[::1]:80/it",
    "git://u:s3cret@host/it": "git://host/it",
    "ssh://git:s3cret@host:22/it": "ssh://git@host:22/it",
    "git+ssh://git:s3cret@host/it": "git+ssh://git@host/it",
    "SSH://git:s3cret@host/it": "SSH://git@host/it",
}
SAME = ("ssh://git@host/it", "git@host:team/it.git", "https://host/it.git", "https://host/@scope/it", "/srv/it@home?x",
        "file:///srv/it#1", "FILE:///srv/it#1", "../it")  # fmt: skip


def test_an_address_is_kept_without_what_lets_somebody_in() -> None:
    cleaned = address()(*ADDRESSES, *SAME)
    assert cleaned == [*ADDRESSES.values(), *SAME]
    assert "s3cret" not in str(cleaned)
    assert address()(*cleaned) == cleaned


def test_a_token_in_the_templates_address_is_not_written_down(tmp_path: Path) -> None:
    """As where a private template is cloned with a token: git keeps that in the clone, and the hook asks git."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(TEMPLATE), str(clone)], check=True)
    for name in ("cookiecutter.json", "hooks", TREE.name):
        source = TEMPLATE / name
        shutil.copytree(source, clone / name, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, clone)
    url = "https://user:ghp_s3cret@example.com/it.git?token=s3cret"
    subprocess.run(["git", "-C", str(clone), "remote", "set-url", "origin", url], check=True)
    code = "import sys; from unittest import mock; from cookiecutter.main import cookiecutter\n"
    code += "with mock.patch('cookiecutter.main.determine_repo_dir', return_value=(sys.argv[2], False)):\n"
    code += "    cookiecutter(sys.argv[1], no_input=True, output_dir=sys.argv[3])"
    command = [sys.executable, "-c", code, url, str(clone)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([*command, str(tmp_path)], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "image_classifier" / ".cruft.json").read_text()
    assert json.loads(text)["template"] == "https://example.com/it.git"
    assert "s3cret" not in text
    assert not list((tmp_path / "image_classifier").rglob("__pycache__"))
    subprocess.run(["git", "-C", str(clone), "remote", "rename", "origin", "upstream"], check=True)
    done = subprocess.run([*command, str(tmp_path / "unknown")], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "unknown" / "image_classifier" / "Makefile").exists()
    assert not (tmp_path / "unknown" / "image_classifier" / ".cruft.json").exists()


def test_a_template_in_the_folder_where_one_stands_is_remembered(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cookiecutter", ".", "--no-input", "--output-dir", str(tmp_path)],
        cwd=TEMPLATE, env=os.environ | {"PWD": str(TEMPLATE)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "image_classifier" / ".cruft.json").read_text())["template"] == str(TEMPLATE)


def test_a_template_in_no_repository_is_not_remembered(tmp_path: Path) -> None:
    """It has no commit, so there is nothing that an update could begin at."""
    for name in ("cookiecutter.json", "hooks", TREE.name):
        source, place = TEMPLATE / name, tmp_path / "template" / name
        place.parent.mkdir(exist_ok=True)
        shutil.copytree(source, place) if source.is_dir() else shutil.copy(source, place)
    command = [sys.executable, "-m", "cookiecutter", str(tmp_path / "template"), "--no-input"]
    done = subprocess.run([*command, "--output-dir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "image_classifier" / ".git").is_dir()
    assert not (tmp_path / "image_classifier" / ".cruft.json").exists()


def test_a_folder_is_the_one_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one where somebody stands when none was named, as in cruft's bakes; not the new project's neighbour."""
    source = (TEMPLATE / "hooks" / "post_gen_project.py").read_text(encoding="utf-8")
    variables: dict[str, Any] = {"__name__": "hook"}
    exec(jinja2.Environment(autoescape=False).from_string(source).render(cookiecutter={}), variables)
    started = variables["started"]
    monkeypatch.setenv("PWD", str(TEMPLATE))
    assert started(".") == started(str(TEMPLATE)) == TEMPLATE
    assert started("") is None
    monkeypatch.chdir(TEMPLATE)
    for words in ("", "out/image_classifier"):
        monkeypatch.setenv("PWD", words)
        assert started(".") is None
    monkeypatch.delenv("PWD")
    assert started(f"../{TEMPLATE.name}") is None
    assert started(str(TEMPLATE)) == TEMPLATE
