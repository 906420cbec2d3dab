"""The generated project's workflows: sound for zizmor, pinned, with the least rights, and nothing in them but verbs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TEMPLATE, Bake, Project

PINS = {  # tags, looked up in the actions' repositories
    "actions/checkout": "11bd71901bbe5b1630ceea73d27597364c9af683  # v4.2.2",
    "aws-actions/configure-aws-credentials": "e6de054238d6b7531b4efff3b6587d9aade6a06c  # v6.2.3",
}
READS = {"contents": "read"}
AS_ROLE = {"contents": "read", "id-token": "write"}
CHECK = "the package is a version, its ARN, or the champion"
SWITCH = "vars.AWS_ROLE_ARN != ''"
BRANCH = "github.ref == 'refs/heads/main'"


def texts(project: Project) -> dict[str, str]:
    folder = project.path / ".github" / "workflows"
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*"))}


def workflow(project: Project, name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load(texts(project)[name], yaml.BaseLoader)  # `on` is a word, all is text
    return found


def audit(workflows: Path) -> subprocess.CompletedProcess[str]:
    """Zizmor's findings on a folder of workflows, nothing fetched."""
    program = TEMPLATE / ".venv" / "bin" / "zizmor"
    options = ["--offline", "--no-progress", "--persona", "pedantic", "--strict-collection"]
    return subprocess.run([str(program), *options, str(workflows)], capture_output=True, text=True, timeout=120)


def test_the_scope_decides_about_workflows(bake: Bake, default: Project, full: Project) -> None:
    assert set(texts(full)) == {"ci.yml", "deliver.yml", "weekly.yml"}
    for project in (default, bake(scope="local")):
        assert set(texts(project)) == {"ci.yml"}
        assert audit(project.path / ".github" / "workflows").returncode == 0
    assert texts(bake(scope="full", mlflow=True, aws_region="eu-west-1")) == texts(full)


def test_zizmor_finds_nothing(full: Project) -> None:
    done = audit(full.path / ".github" / "workflows")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ci.yml", "persist-credentials: false", ""),
        ("deliver.yml", "permissions: {}", "permissions: write-all"),
        ("deliver.yml", "@e6de054238d6b7531b4efff3b6587d9aade6a06c", "@v6"),
        ("weekly.yml", "permissions: {}", ""),
        ("weekly.yml", "make setup", "make setup ${{ github.event.head_commit.message }}"),
        ("deliver.yml", "make deploy YES=1", "make deploy PACKAGE=${{ inputs.package }}"),
    ],
)
def test_zizmor_would_find_something(bake: Bake, name: str, old: str, new: str) -> None:
    folder = bake(scope="full").path / ".github" / "workflows"
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    assert audit(folder).returncode != 0


def test_actions_are_pinned_to_commits_that_were_looked_up(full: Project) -> None:
    used = [use for text in texts(full).values() for use in re.findall(r"- uses: (.*)", text)]
    assert {use.partition("@")[0] for use in used} == {*PINS}
    for use in used:
        assert use == f"{use.partition('@')[0]}@{PINS[use.partition('@')[0]]}"


def test_every_step_is_a_verb_that_exists(full: Project) -> None:
    for name in texts(full):
        for job in workflow(full, name)["jobs"].values():
            for step in (step for step in job.get("steps", []) if "run" in step):
                assert "${{" not in step["run"], "an expression would be pasted into a shell"
                if step.get("name") == CHECK:
                    continue
                words = step["run"].split()
                assert words[0] == "make"
                expanded = full.run("make", "-n", *words[1:], **step.get("env", {}))
                assert expanded.returncode == 0, expanded.stderr


def test_no_checkout_leaves_its_token_behind(full: Project) -> None:
    """Zizmor finds a checkout that does not say it, and not one that says `true`."""
    own = {path.name: path.read_text(encoding="utf-8") for path in (TEMPLATE / ".github" / "workflows").glob("*.yml")}
    for name, text in [*texts(full).items(), *own.items()]:
        jobs = yaml.load(text, yaml.BaseLoader)["jobs"].values()
        steps = [step for job in jobs for step in job.get("steps", []) if "actions/checkout" in step.get("uses", "")]
        assert steps, name
        assert all(step["with"]["persist-credentials"] == "false" for step in steps), name


def test_rights_are_the_least(full: Project) -> None:
    ci, deliver = workflow(full, "ci.yml"), workflow(full, "deliver.yml")
    weekly = workflow(full, "weekly.yml")
    assert ci["permissions"] == deliver["permissions"] == weekly["permissions"] == {}
    assert {name: job["permissions"] for name, job in weekly["jobs"].items()} == {"test": READS, "audit": READS}
    assert {name: job["permissions"] for name, job in deliver["jobs"].items()} == {
        "test": READS, "pipeline": AS_ROLE, "deploy": AS_ROLE,
    }  # fmt: skip
    assert {name: job["permissions"] for name, job in ci["jobs"].items()} == {"test": READS}
    assert "secrets." not in "".join(texts(full).values()), "there are no keys"
    for name, variable in (("pipeline", "AWS_ROLE_ARN"), ("deploy", "AWS_DEPLOY_ROLE_ARN")):
        job = deliver["jobs"][name]
        uses = [step.get("uses", step.get("run", "")).partition("@")[0] for step in job["steps"]]
        assert uses.index("make setup") < uses.index("aws-actions/configure-aws-credentials"), "packages get no role"
        role = job["steps"][uses.index("aws-actions/configure-aws-credentials")]["with"]
        assert role["role-to-assume"] == f"${{{{ vars.{variable} }}}}", (
            "only the approved job gets the role that deploys"
        )
        assert (
            0 < int(job["timeout-minutes"]) * 60 <= int(role["role-duration-seconds"]) <= 21600
        )  # of the stack's role


def test_nothing_is_delivered_unasked(full: Project) -> None:
    """Off without a role; only from main; tests come first, then a person, and a run does not overtake another."""
    deliver = workflow(full, "deliver.yml")
    jobs = deliver["jobs"]
    assert set(deliver["on"]) == {"push", "workflow_dispatch"}
    assert deliver["on"]["push"]["branches"] == ["main"]
    for name in ("test", "deploy"):
        assert (SWITCH if name == "test" else SWITCH.replace("AWS_ROLE", "AWS_DEPLOY_ROLE")) in jobs[name]["if"]
        assert BRANCH in jobs[name]["if"]
    assert "inputs.package == ''" in jobs["test"]["if"], "a version that is there would be trained once more"
    assert jobs["deploy"]["if"].startswith("!cancelled() && "), "it would be skipped with the jobs before it"
    assert jobs["pipeline"]["needs"] == "test"
    assert "if" not in jobs["pipeline"], "it would run although the tests were skipped or failed"
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in workflow(full, "ci.yml")["on"]
    assert jobs["deploy"]["needs"] == "pipeline"
    assert "needs.pipeline.result == 'success' || inputs.package != ''" in jobs["deploy"]["if"]
    assert jobs["deploy"]["environment"] == "production"
    assert deliver["concurrency"]["cancel-in-progress"] == "false"
    groups = [workflow(full, name)["concurrency"]["group"] for name in ("ci.yml", "deliver.yml")]
    assert groups[0].startswith("ci-${{ github.workflow }}-"), "a called workflow in its caller's group waits for ever"
    assert groups[1] == "${{ github.workflow }}-${{ inputs.package || 'champion' }}", "a way back must not wait"
    assert jobs["deploy"]["steps"][0]["name"] == CHECK
    runs = [step["run"] for step in jobs["deploy"]["steps"][1:] if "run" in step]
    assert runs == ["make setup", "make approve YES=1", "make deploy YES=1 ARGS=--rollback"]
    *_, approve, deploy = jobs["deploy"]["steps"]
    assert approve["if"] == "inputs.package == ''", "a version that somebody names is approved already"
    assert deploy["env"]["PACKAGE"] == "${{ inputs.package || 'champion' }}"
    assert deploy["env"]["ENDPOINT__ROLLOUT"] == "canary"


ARN = "arn:aws:sagemaker:eu-central-1:123456789012:model-package/image-classifier/7"
HOSTILE = [
    "$(touch canary)", "`touch canary`", "1; touch canary", "1\ntouch canary", "champion\n", "$(shell touch canary)",
    "1 && touch canary", "'; touch canary; '", '"; touch canary; "', "a[$(touch canary)]", "1\r", "--help", "0", "-1",
    "1" * 400, f"{ARN}\n{ARN}", f"{ARN} ", f" {ARN}", ARN.replace("sagemaker", "iam"), ARN + "$(touch canary)", "*",
    "${PATH}", "${{ github.token }}", "\x1b]52;c;cm0=\x07", "\u0663", "\uff11", "%0A", "::set-output name=x::y",
    "Champion", "champion;", "../1", "", f"x{ARN}", ARN.replace("aws:", "gcp:", 1), ARN.replace("12:", ":"),
    ARN.replace("12:", "123:"), ARN.replace("eu-central-1", "e" * 31), ARN.replace("model-package", "endpoint"),
    ARN.replace("image-classifier", "a" * 64), ARN.replace("image-classifier", "a_b"), ARN.replace("/7", "/1234567890"),
]  # fmt: skip


@pytest.mark.parametrize("value", [*HOSTILE, "champion", "3", ARN, ARN.replace("aws:", "aws-us-gov:", 1)])
def test_an_input_is_checked_before_anything_uses_it(full: Project, tmp_path: Path, value: str) -> None:
    """The step itself, in a real bash as GitHub starts it."""
    step = workflow(full, "deliver.yml")["jobs"]["deploy"]["steps"][0]
    assert step["env"] == {"PACKAGE": "${{ inputs.package || 'champion' }}"}
    script = tmp_path / "step.sh"
    script.write_text(step["run"], encoding="utf-8")
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)], cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PACKAGE": value, "LC_ALL": "C.UTF-8"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) == (value not in HOSTILE)
    assert [path.name for path in tmp_path.iterdir()] == ["step.sh"]
    assert not done.stderr
    assert done.stdout in ("", "package is neither a version, such as 3, nor an ARN of one, nor champion\n")


def test_inputs_reach_shells_by_the_environment_only(full: Project) -> None:
    """Those of the template's own workflows, too."""
    own = {path.name: path.read_text(encoding="utf-8") for path in (TEMPLATE / ".github" / "workflows").glob("*.yml")}
    for name, text in [*texts(full).items(), *own.items()]:
        for job in yaml.load(text, yaml.BaseLoader)["jobs"].values():
            for step in job.get("steps", []):
                assert "${{" not in step.get("run", ""), name
                assert "github.event" not in str(step), name


def test_the_stack_lets_in_what_the_workflow_is(full: Project) -> None:
    """The environment's name is part of what GitHub calls a job; the stack has to know it."""
    stack = (full.path / "infrastructure" / "automation.yaml").read_text(encoding="utf-8")
    environment = workflow(full, "deliver.yml")["jobs"]["deploy"]["environment"]
    assert stack.count(f'"repo:${{Name}}:environment:{environment}"') == 2
    assert stack.count('"repo:${Name}:ref:refs/heads/${GitHubBranch}"') == 2
    assert "MaxSessionDuration: 21600" in stack


def test_every_week_both_ends_of_the_bounds_are_tested_and_audited(full: Project) -> None:
    weekly = workflow(full, "weekly.yml")
    assert set(weekly["on"]) == {"schedule", "workflow_dispatch"}
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", weekly["on"]["schedule"][0]["cron"])
    test, audited = weekly["jobs"]["test"], weekly["jobs"]["audit"]
    assert test["strategy"] == {"fail-fast": "false", "matrix": {"resolution": ["lowest-direct", "highest"]}}
    steps = [step for step in test["steps"] if "run" in step]
    assert [step["run"] for step in steps] == ["make setup", "make test"]
    assert steps[0]["env"] == {"ARGS": "--resolution ${{ matrix.resolution }} --upgrade"}
    assert "env" not in steps[1], "ARGS would reach pytest"
    assert [step["run"] for step in audited["steps"] if "run" in step] == ["make setup", "make audit"]
