"""Bake the template, and give tests the default project with its environment."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cookiecutter.main import cookiecutter
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from xdist.scheduler import LoadScopeScheduling

from tests.photos import store_all

collect_ignore = ["in_project"]
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two workers: threads that wait for a core that another process has take minutes
settings.register_profile("here", database=None, deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")
TEMPLATE = Path(__file__).resolve().parent.parent
set_hypothesis_home_dir(TEMPLATE / ".cache" / "hypothesis")
TREE = TEMPLATE / "{{cookiecutter.project_slug}}"
TEXTS = ("project_name", "description", "author")
HOSTILE = {  # every other answer
    "project_name": 'Löwen & "Tiger" {{ 7 * 7 }}',
    "project_slug": "big_cats_2",
    "description": "$(touch canary) `touch canary` $(shell touch canary) \\ {% raw %} # 'a' \"b\" %s ünïcödé 🐈",
    "author": "O'Neill <o@example.com>\\n {braces}",
    "licence": "Proprietary",
    "aws_region": "cn-north-1",
    "scope": "local",
    "mlflow": True,
}
NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere", "REQUIRE_CONTAINERS": ""}
# `make test` gives each of its workers whole files, and several tests look whether a container is left: so one file has
# all that use the engine, and the others cannot; but the rehearsal's, which have a run of their own. The tests of ALONE
# are long and share nothing: any worker takes one.
ENGINE_FILE, ALONE, REHEARSAL_FILE = "test_generated.py", "test_without_engine.py", "test_rehearsal.py"
FIRST = [ENGINE_FILE, ALONE]  # the two longest; each worker begins with one, and the others fill up
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
# Tests in `tests/in_project` that have a run of their own; the last one needs the answer mlflow.
FAULTS, FUZZING, TRACKING = "tests/test_faults.py", "tests/test_fuzz.py", "tests/test_tracking.py"
OTHER_HOSTS = {"RAY_PYTHON": "ray", "TORCHSERVE_PYTHON": "torchserve"}  # variable of the tests, name of the host
FAMILIES = "tests/test_families.py"
ELSEWHERE = {FAMILIES, FAULTS, FUZZING, TRACKING, *(f"tests/test_{name}.py" for name in OTHER_HOSTS.values())}


class Shares(LoadScopeScheduling):  # type: ignore[misc]
    """What one worker has to take whole: `xdist_group` means nothing to xdist 3.8 under pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if Path(file).name == ALONE else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Shares:
    """In place of xdist's own, whatever `--dist` says."""
    return Shares(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def fresh_shell() -> dict[str, str]:
    """The environment without an AWS account, and without what `make test` of the template put into it."""
    strange = ("AWS_", "SAGEMAKER_", "SM_", "MAKE", "MFLAGS", "ARGS", "VIRTUAL_ENV", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(strange)}


@dataclass(frozen=True)
class Project:
    """A baked project."""

    path: Path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the project as a fresh shell would."""
        return subprocess.run(
            command, cwd=self.path, env=fresh_shell() | environment, capture_output=True, text=True, timeout=3000
        )

    def make(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a verb and expect it to succeed."""
        done = self.run("make", *words, **environment)
        assert done.returncode == 0, f"make {' '.join(words)} failed:\n{done.stdout}\n{done.stderr}"
        return done

    def program(self, name: str) -> str:
        """A program of the project's environment."""
        return str(self.path / ".venv" / "bin" / name)

    def files(self) -> list[str]:
        """All files, except those of git."""
        found = (path for path in self.path.rglob("*") if path.is_file() or path.is_symlink())
        names = (path.relative_to(self.path).as_posix() for path in found)
        return sorted(name for name in names if not name.startswith(".git/"))


Bake = Callable[..., Project]


def run_tests(project: Project, *words: str, **environment: str) -> str:
    """`make test` in a project; where REQUIRE_CONTAINERS is set, a test that was skipped is a failure.

    Returns:
        What it wrote to standard output.
    """
    done = project.run("make", "test", f"ARGS={shlex.join(words)}", **environment)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout + done.stderr
    if environment.get("REQUIRE_CONTAINERS", os.environ.get("REQUIRE_CONTAINERS")):
        assert "skipped" not in done.stdout.splitlines()[-1]
    return done.stdout


def add_tests(project: Project) -> list[str]:
    """Put the tests of `tests/in_project`, and what they use of the template, among the project's own tests.

    Returns:
        The names of the tests.
    """
    names, source = [], TEMPLATE / "tests" / "in_project"
    shutil.copytree(source / "golden", project.path / "tests" / "golden")
    shutil.copytree(TEMPLATE / "docs" / "recipes", project.path / "tests" / "recipes")
    for page in ("docs/migrating-from-v2.md", "rehearsal/src/rehearsal/policies.py"):
        shutil.copy(TEMPLATE / page, project.path / "tests")
    for path in sorted(source.glob("*.py")):
        shutil.copy(path, project.path / "tests" / path.name)
        names += [f"tests/{path.name}"] if path.name.startswith("test_") else []
    return names


def as_jinja(text: str) -> str:
    """A template that renders to `text`: cookiecutter renders the answers that are not typed at a prompt."""
    return '{{ "' + "".join(f"\\U{ord(character):08x}" for character in text) + '" }}'


@pytest.fixture(scope="session")
def bake(tmp_path_factory: pytest.TempPathFactory) -> Bake:
    """Bake with some answers; text is data, template syntax in it too."""

    def run(**answers: object) -> Project:
        folder = tmp_path_factory.mktemp("bake")
        context = {name: as_jinja(str(value)) if name in TEXTS else value for name, value in answers.items()}
        made = cookiecutter(str(TEMPLATE), no_input=True, extra_context=context, output_dir=str(folder))
        return Project(Path(made))

    return run


@pytest.fixture(scope="session")
def default(bake: Bake) -> Project:
    """The default bake, as raw as it came."""
    return bake()


@pytest.fixture(scope="session")
def full(bake: Bake) -> Project:
    """One of the largest scope, which has everything but MLflow, as raw as it came."""
    return bake(scope="full")


@pytest.fixture(scope="session")
def ready(bake: Bake) -> Project:
    """Another one of the largest scope, committed, with its environment, which does for the smaller ones too."""
    project = bake(scope="full")
    project.make("setup")
    commit = ("-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "--quiet", "--message", "bake")
    for words in (("add", "--all"), commit):
        done = project.run("git", *words)
        assert done.returncode == 0, done.stderr
    return project


@pytest.fixture(autouse=True)
def one_worker_has_the_engine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The other files find none."""
    if request.path.name not in (ENGINE_FILE, REHEARSAL_FILE):
        monkeypatch.setenv("DOCKER_HOST", NO_ENGINE["DOCKER_HOST"])
    elif WORKER:
        owner = tmp_path_factory.getbasetemp().parent / "engine"
        with contextlib.suppress(FileExistsError):
            owner.symlink_to(WORKER)
        assert str(owner.readlink()) == WORKER, f"{owner.readlink()} has the engine, see `Shares`"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in a folder whose name has a blank."""
    folder = tmp_path_factory.mktemp("photos") / "holiday photos"
    store_all(folder)
    return folder


@pytest.fixture(scope="session")
def engine() -> str:
    """The version of the Docker engine. The test is skipped without one, or fails where REQUIRE_CONTAINERS is set."""
    try:
        answer = subprocess.run(["docker", "version"], capture_output=True, text=True, timeout=30)
        reason = "" if answer.returncode == 0 else answer.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason and os.environ.get("REQUIRE_CONTAINERS"):
        pytest.fail(f"REQUIRE_CONTAINERS is set, but no engine answers: {reason}")
    if reason:
        pytest.skip(f"no Docker engine answers: {reason}")
    return "running"


@contextlib.contextmanager
def engine_alone() -> Iterator[None]:
    """Nobody else who asks for it uses the engine: CI's `make test-hosts` and `make test-faults` run side by side."""
    file = TEMPLATE / ".cache" / "engine.lock"
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def host_environment(name: str) -> Path:
    """The interpreter of an environment with `PACKAGES` of `tests/in_project/host_<name>.py`, made when it is missing.

    `.cache/hosts/<name>` keeps it: another server's packages do not belong into the project's environment.
    """
    tree = ast.parse((TEMPLATE / "tests" / "in_project" / f"host_{name}.py").read_text(encoding="utf-8"))
    packages = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES"
    )
    folder = TEMPLATE / ".cache" / "hosts" / name
    stamp = folder / "packages.txt"
    if not stamp.is_file() or stamp.read_text() != "\n".join(packages):
        uv = str(TEMPLATE / ".venv" / "bin" / "uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", str(folder)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
        subprocess.run([*install, *packages], check=True)
        stamp.write_text("\n".join(packages))
    return folder / "bin" / "python"
