"""The generated project's Makefile, its help and README: every verb is listed, marked and expands."""

from __future__ import annotations

import re

from tests.conftest import (
    HOSTILE,
    Bake,
    Project,
)


def test_make_prints_every_verb_and_every_verb_expands(bake: Bake) -> None:
    for project in (bake(), bake(mlflow=True, github_workflows=False), bake(**HOSTILE)):
        printed = project.make()
        assert printed.stdout == project.make("help").stdout
        verbs = re.findall(r"^  make ([a-z-]+) ", printed.stdout, re.MULTILINE)
        wanted = {
            *"help setup data train-local evaluate predict serve-local batch-local image test bench".split(),
            *"bench-serve lint format clean bootstrap bootstrap-destroy image-push process train logs pull".split(),
            *"deploy invoke shift-traffic batch register approve monitor tune tune-local plan status destroy".split(),
            *"doctor report compare audit".split(),
            *"pipeline pipeline-local pipeline-graph update-template".split(),
        }
        assert set(verbs) == wanted | ({"track"} if "track.py" in str(project.files()) else set())
        for verb in verbs:
            words = project.make("-n", verb, "DATA=my photos", "RUN=r", "IMAGE=i", "INSTANCE_COUNT=2", "ARGS=--x")
            assert "Traceback" not in words.stdout


def test_help_says_which_verbs_have_not_run_on_aws(bake: Bake) -> None:
    project = bake()
    makefile = (project.path / "Makefile").read_text(encoding="utf-8")
    heading = ""
    said: dict[str, bool] = {}
    recipes: dict[str, str] = {}
    for line in makefile.splitlines():
        if title := re.match("##@ (.*)", line):
            heading = title[1]
        elif verb := re.match("([a-z-]+):.* ## ", line):
            said[verb[1]] = "(request validated, not run on AWS)" in heading
        elif module := re.search(r"\(VERB\) pipelines\.(\w+)", line):
            recipes.setdefault(list(said)[-1], module[1])
    printed = project.make("help").stdout
    cloud = [title for title in re.findall("(?m)^##@ (.*)", makefile) if "not run on AWS" in title]
    assert cloud
    assert all(title in printed for title in cloud)
    for name, program in recipes.items():
        code = (project.path / "pipelines" / f"{program}.py").read_text(encoding="utf-8")
        if re.search(r"(?m)^from pipelines import .*\b(aws|endpoints)\b", code):
            assert said[name], f"make {name} asks AWS"
    assert {"train", "deploy", "pipeline", "destroy"} <= {verb for verb, marked in said.items() if marked}


def test_readme_names_only_verbs_and_variables_that_exist(ready: Project) -> None:
    readme = (ready.path / "README.md").read_text(encoding="utf-8")
    makefile = (ready.path / "Makefile").read_text(encoding="utf-8")
    for verb in set(re.findall(r"`?make ([a-z-]+)", readme)):
        assert re.search(rf"(?m)^{verb}:", makefile), f"the README names make {verb}"
    for variable in set(re.findall(r"\b([A-Z_]{3,})=", readme)) - {"ARGS", "IMAGES__BASE"}:
        assert f"$({variable})" in makefile, f"the README names {variable}="
