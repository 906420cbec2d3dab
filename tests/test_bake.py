"""What is baked for every pair of answers: the right files, no leftovers, clean text, sound syntax, clean code."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import tokenize
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import TEMPLATE, TREE, Bake, Project
from tests.test_hooks import PRINTABLE, hook, problem

PROMPTS: dict[str, Any] = json.loads((TEMPLATE / "cookiecutter.json").read_text(encoding="utf-8"))
CHOICES: dict[str, list[Any]] = {
    name: value if isinstance(value, list) else [value, not value]
    for name, value in PROMPTS.items()
    if not name.startswith("_") and isinstance(value, list | bool)
}
OPTIONS = CHOICES | {"aws_region": hook()["REGIONS"]}
SCOPES = hook()["SCOPES"]  # the smallest first
# A line a file with the smallest scope that has it, and `mlflow` where it belongs to that answer too.
MANIFEST = [line.split() for line in (TEMPLATE / "tests" / "manifest.txt").read_text(encoding="utf-8").splitlines()]
# Files and lines of code, with tests, by scope, of which at most 5 % more are allowed.
SIZES = {"local": (93, 7500), "cloud": (135, 11390), "full": (152, 12580)}
TOP = {"__init__", "__main__", "config", "environment", "project", "runs", "schema", "sections", "terminal",
       "training_pipeline", "update_template"}  # modules that lie in pipelines/ itself  # fmt: skip
WRITTEN = {".cruft.json"}  # by a hook: the template's version and all answers
WITH_TEXT = {".cruft.json", "LICENSE", "README.md", "pyproject.toml"}  # the files that hold text answers
LICENCES = {
    "Apache-2.0": "Apache License",
    "MIT": "MIT License",
    "BSD-3-Clause": "BSD 3-Clause",
    "Proprietary": "Copyri",
}
Answers = dict[str, Any]
Baked = list[tuple[Answers, Project]]


def pairs(answers: Answers) -> set[tuple[tuple[str, Any], ...]]:
    """All pairs of (option, value)."""
    return set(itertools.combinations(sorted(answers.items()), 2))


def combinations() -> list[Answers]:
    """Every combination of the choices, and rows that hold every pair of a region with a choice."""
    rows = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    wanted = {
        pair
        for first, second in itertools.combinations(sorted(OPTIONS), 2)
        for pair in itertools.product(
            [(first, value) for value in OPTIONS[first]], [(second, v) for v in OPTIONS[second]]
        )
    }
    rows = [{"aws_region": PROMPTS["aws_region"]} | row for row in rows]
    missing = wanted - set().union(*map(pairs, rows))
    while missing:
        row = dict(min(missing, key=str))
        for name in sorted(OPTIONS.keys() - row.keys()):
            gains = [len(pairs(row | {name: value}) & missing) for value in OPTIONS[name]]
            row[name] = OPTIONS[name][gains.index(max(gains))]
        rows.append(row)
        missing -= pairs(row)
    return rows


def few() -> list[Answers]:
    """Every scope with MLflow and without, and every licence."""
    rows = itertools.product(CHOICES["scope"], CHOICES["mlflow"])
    licences, regions = itertools.cycle(CHOICES["licence"]), itertools.cycle(("us-east-1", "cn-north-1"))
    return [{"scope": scope, "mlflow": mlflow, "licence": next(licences), "aws_region": next(regions)}
            for scope, mlflow in rows]  # fmt: skip


@pytest.fixture(scope="session", params=[few, pytest.param(combinations, marks=pytest.mark.slow)])
def baked(bake: Bake, request: pytest.FixtureRequest) -> Baked:
    """Bakes of a few answers; with `make test-slow` those that hold every pair of option values."""
    return [(answers, bake(**answers)) for answers in request.param()]


def tracked(answers: Answers) -> bool:
    """Whether runs are logged to MLflow: a part of the largest scope."""
    return bool(answers["mlflow"] and answers["scope"] == "full")


def belongs(scope: str, more: list[str], answers: Answers) -> bool:
    """Whether a file of a scope is in a bake of these answers."""
    return SCOPES.index(scope) <= SCOPES.index(answers["scope"]) and (not more or tracked(answers))


def contents(project: Project) -> dict[str, bytes]:
    return {name: (project.path / name).read_bytes() for name in project.files()}


def test_every_pair_of_option_values_is_in_the_slow_bakes() -> None:
    seen = set().union(*(pairs(answers) for answers in combinations()))
    for first, second in itertools.combinations(sorted(OPTIONS), 2):
        for value, other in itertools.product(OPTIONS[first], OPTIONS[second]):
            assert ((first, value), (second, other)) in seen
    for name in (name for name in PROMPTS if not name.startswith("_")):
        assert name in PROMPTS["__prompts__"], f"{name} has no label"


def test_exactly_these_files(baked: Baked) -> None:
    for answers, project in baked:
        wanted = {name for name, scope, *more in MANIFEST if belongs(scope, more, answers)}
        assert set(project.files()) == wanted, answers
        folders = [path for path in project.path.rglob("*") if path.is_dir() and ".git" not in path.parts]
        assert all(any(folder.iterdir()) for folder in folders), answers


def test_no_file_of_the_template_belongs_to_no_option(baked: Baked) -> None:
    names = {name for _, project in baked for name in project.files()}
    assert names == {name for name, *_ in MANIFEST}
    assert len([path for path in TREE.rglob("*") if path.is_file()]) == len(names - WRITTEN)


def test_text_is_clean_and_no_template_syntax_is_left(baked: Baked) -> None:
    for path, data in {(project.path / name, data) for _, project in baked for name, data in contents(project).items()}:
        if path.suffix == ".png":
            continue
        assert data.endswith(b"\n"), f"{path} has no final newline"
        assert not data.endswith(b"\n\n"), f"{path} ends with blank lines"
        assert b"\r" not in data, f"{path} has a carriage return"
        assert not re.search(rb"[ \t]\n", data), f"{path} has trailing blanks"
        assert not data.startswith(b"\n"), f"{path} starts with a blank line"
        assert path.stat().st_mode & 0o777 == 0o644, f"{path} has unusual permissions"
        if path.suffix == ".html":  # a template of the project's own
            continue
        text = re.sub(r'"\{% .* %\}"', "", data.decode("utf-8")).replace("${{", "")  # Step Functions' and GitHub's own
        assert not re.search(r"\{\{|\{%|\{#|#%|cookiecutter\.", text), f"{path} has template syntax"


def parse(path: Path) -> Any:
    if path.suffix == ".png":
        return path.read_bytes().startswith(b"\x89PNG")
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yml", ".yaml"):
        return yaml.safe_load(text)
    if path.suffix == ".toml":
        return tomllib.loads(text)
    return compile(text, str(path), "exec") if path.suffix == ".py" else text


def test_every_file_parses_and_every_choice_appears(baked: Baked) -> None:
    parsed = {}
    for answers, project in baked:
        for name, data in contents(project).items():
            if (name, data) not in parsed:
                parsed[name, data] = parse(project.path / name)
                assert parsed[name, data]
        settings = parse(project.path / "configs" / "infrastructure.yaml")
        assert settings.get("aws", {}).get("region") == (answers["aws_region"] if answers["scope"] != "local" else None)
        assert ("tracking" in settings) == tracked(answers)
        licence = (project.path / "LICENSE").read_text(encoding="utf-8")
        assert licence.strip().startswith(LICENCES[answers["licence"]])
        assert "Your Name" in licence


def test_an_option_changes_nothing_else(baked: Baked) -> None:
    """The region is in one file, the licence in its own."""
    kinds: dict[tuple[str, bool], set[tuple[tuple[str, bytes], ...]]] = {}
    for answers, project in baked:
        rest = {
            name: data
            for name, data in contents(project).items()
            if name not in {"LICENSE", "configs/infrastructure.yaml"} | WRITTEN
        }
        kinds.setdefault((answers["scope"], tracked(answers)), set()).add(tuple(sorted(rest.items())))
    assert len(kinds) == 4
    assert all(len(kind) == 1 for kind in kinds.values())


@given(
    name=PRINTABLE.filter(lambda text: problem(project_name=text) is None),
    description=st.text(st.sampled_from("{}%#$()`'\"\\/:&*!|>@[],-= aäλ🐈\u00df"), min_size=1, max_size=200)
    | PRINTABLE,
    author=PRINTABLE.filter(lambda text: problem(author=text) is None),
)
@settings(max_examples=40)
def test_text_answers_are_data(bake: Bake, name: str, description: str, author: str) -> None:
    """They arrive as they are, in four files, and all other files stay as they were."""
    if problem(description=description):
        description = "Cats"
    plain = contents(bake(project_slug="cats"))
    project = bake(project_name=name, project_slug="cats", description=description, author=author)
    changed = {file for file, data in contents(project).items() if data != plain[file]}
    assert changed <= WITH_TEXT
    facts = parse(project.path / "pyproject.toml")["project"]
    assert facts == parse_plain(plain) | {"description": description.strip(), "authors": [{"name": author.strip()}]}
    readme = (project.path / "README.md").read_text(encoding="utf-8").split("\n")
    assert readme[:4] == [f"# {name.strip()}", "", description.strip(), ""]
    assert readme[4:] == plain["README.md"].decode().split("\n")[4:]
    licence = (project.path / "LICENSE").read_text(encoding="utf-8")
    assert licence == plain["LICENSE"].decode().replace("Your Name", author.strip())


def parse_plain(plain: dict[str, bytes]) -> dict[str, Any]:
    facts: dict[str, Any] = tomllib.loads(plain["pyproject.toml"].decode())["project"]
    return facts


def lines_of_code(text: str) -> int:
    """As cloc and alike count: without blank lines, comments and docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds) and ast.get_docstring(node)]
    quoted = {line for node in nodes for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    idle = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in idle]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - quoted)


@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_is_small(scope: str, bake: Bake) -> None:
    """Whoever moves a limit says why in the commit."""
    project, (files, lines) = bake(scope=scope, mlflow=True), SIZES[scope]
    python = [project.path / name for name in project.files() if name.endswith(".py")]
    assert len(project.files()) <= 1.05 * files
    assert sum(lines_of_code(path.read_text(encoding="utf-8")) for path in python) <= 1.05 * lines


def test_modules_lie_in_rooms() -> None:
    assert {path.stem for path in (TREE / "pipelines").glob("*.py")} == TOP


REQUIRES = {"local": {"boto3", "cfn-lint", "moto", "optuna"}, "cloud": {"optuna"}, "full": set[str]()}
IMPORTS = {"local": {"boto3", "botocore", "moto", "optuna", "mlflow"}, "cloud": {"optuna", "mlflow"},
           "full": {"mlflow"}}  # fmt: skip


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_asks_for_no_package_that_it_does_not_use(scope: str, bake: Bake) -> None:
    project = bake(scope=scope)
    groups = tomllib.loads((project.path / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    asked = {re.split(r"[^a-z0-9-]", entry)[0] for entries in groups.values() for entry in entries}
    everything = {"boto3", "cfn-lint", "moto", "optuna"}
    assert everything - asked == REQUIRES[scope]
    found = set()
    for name in (name for name in project.files() if name.endswith(".py")):
        tree = ast.parse((project.path / name).read_text(encoding="utf-8"))
        found |= {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                  for alias in node.names}  # fmt: skip
        found |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not found & IMPORTS[scope]


@pytest.mark.parametrize("scope", SCOPES)
def test_code_and_settings_name_only_verbs_of_their_scope(scope: str, bake: Bake, ready: Project) -> None:
    """Also where a module of a smaller scope prints what to do next."""
    project = bake(scope=scope)
    listed = project.run(ready.program("python"), "-m", "pipelines", "help").stdout
    verbs = set(re.findall(r"(?m)^  make ([a-z-]+) ", listed))
    assert len(verbs) > 15
    for name in project.files():
        if name.endswith((".py", ".yaml", ".yml", ".toml", "Dockerfile")) and name != "pipelines/__main__.py":
            text = (project.path / name).read_text(encoding="utf-8")
            named = set(re.findall(r"`make ([a-z]+(?:-[a-z]+)*)|-m pipelines ([a-z]+(?:-[a-z]+)*)", text))
            named = {verb for pair in named for verb in pair if verb}
            assert named <= verbs, f"{name} speaks of {named - verbs}"


def test_what_a_smaller_scope_lacks_has_the_larger_one_s_value(bake: Bake, ready: Project) -> None:
    """The defaults of the schema are written twice; they are the same."""
    settings = parse(bake(scope="full").path / "configs" / "infrastructure.yaml")
    code = (
        "import json; from pipelines.sections import Settings;"
        "print(json.dumps({section: {key: option.default for key, option in field.annotation.model_fields.items()"
        " if not option.is_required()} for section, field in Settings.model_fields.items() if section != 'training'}))"
    )
    done = ready.run(ready.program("python"), "-c", code)
    assert done.returncode == 0, done.stderr
    for section, keys in json.loads(done.stdout).items():
        for key, value in keys.items():
            assert settings[section][key] == value, f"{section}.{key}"


def test_lines_of_code_are_neither_blank_nor_words() -> None:
    assert (
        lines_of_code(
            '"""What.\n\nMore.\n"""\n\n# a note\nx = """\ntext\n"""  # kept\n\n\ndef f():\n    "doc"\n    return x\n'
        )
        == 5
    )


def test_python_files_of_the_template_are_baked_as_they_are(default: Project) -> None:
    for name in default.files():
        if name.endswith(".py"):
            assert (default.path / name).read_bytes() == (TREE / name).read_bytes()


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ruff and mypy, so that no bake gets any."""
    return tmp_path_factory.mktemp("caches")


def lint(project: Project, ready: Project, caches: Path) -> list[str]:
    """What ruff and mypy find, with the project's own configuration."""
    variables = {"RUFF_CACHE_DIR": str(caches / "ruff"), "MYPY_CACHE_DIR": str(caches / "mypy")}
    found = []
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "src", "pipelines", "tests"]):
        done = project.run(ready.program(words[0]), *words[1:], **variables)
        found += [done.stdout + done.stderr] if done.returncode else []
    return found


def test_code_is_clean_before_anyone_touched_it(baked: Baked, ready: Project, caches: Path) -> None:
    """Every bake, as raw as it came, and the template's own tree: plain Python under the same configuration."""
    assert lint(Project(TREE), ready, caches) == []
    seen = set()
    for _, project in baked:
        code = frozenset((name, data) for name, data in contents(project).items() if name.endswith((".py", ".toml")))
        if code not in seen:
            assert lint(project, ready, caches) == []
        seen.add(code)
    assert len(seen) == 4  # the scopes, and the largest one with MLflow


DOCSTRINGS = ["--extend-select", "D", "--ignore", "D105,D107,D301,D417", "--config",
              "lint.pydocstyle.convention = 'google'"]  # fmt: skip


def test_the_template_s_own_code_says_what_it_does(bake: Bake, ready: Project, caches: Path) -> None:
    """Docstrings everywhere and short files; of the user no rule asks for a docstring."""
    project = bake(scope="full", mlflow=True)
    cache = {"RUFF_CACHE_DIR": str(caches / "ruff")}
    done = project.run(ready.program("ruff"), "check", *DOCSTRINGS, "src", "pipelines", **cache)
    assert done.returncode == 0, done.stdout
    modules = [path for room in ("src", "pipelines") for path in (project.path / room).rglob("*.py")]
    assert max(len(path.read_text(encoding="utf-8").splitlines()) for path in modules) <= 300
    (project.path / "src" / "mine.py").write_text("def what():\n    pass\n")
    done = project.run(ready.program("ruff"), "check", *DOCSTRINGS, "src", **cache)
    assert "D103" in done.stdout


OWN = """import torch
import torch.nn.functional as F
from torch import nn


class MyNet(nn.Module):
    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, num_classes)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        B, C, H, W = X.shape
        X = F.adaptive_avg_pool2d(F.relu(self.norm(X)), 1)
        return self.head(X.view(B, C))
"""


def test_own_code_passes_lint_and_the_house_as_people_write_it(bake: Bake, ready: Project, caches: Path) -> None:
    project = bake()
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    (project.path / "src" / "my_net.py").write_text(OWN)
    (project.path / "tests" / "test_my_net.py").write_text("def test_it() -> None:\n    assert 1 + 1 == 2\n")
    assert lint(project, ready, caches) == []
    done = project.run(project.program("python"), "-m", "pytest", "-q", "tests/test_house.py", "tests/test_my_net.py")
    assert done.returncode == 0, done.stdout


def test_the_clean_code_test_can_fail(bake: Bake, ready: Project, caches: Path) -> None:
    project = bake()
    (project.path / "src" / "imaging.py").write_text("import os\nx: int = 'text'\n")
    found = lint(project, ready, caches)
    assert "F401" in found[0]
    assert "Incompatible types in assignment" in found[-1]
