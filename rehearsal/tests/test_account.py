"""The command: an account for one program, what it is told, and that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rehearsal import docker
from rehearsal.operations import Account

SOURCE = Path(__file__).parents[1] / "src"
SHOWS = """
import boto3, os, pathlib, sys
print(boto3.client("sts").get_caller_identity()["Arn"], sys.argv[1:])
print(sorted({value for name, value in os.environ.items() if value == "real"}))
pathlib.Path("folder").write_text(os.environ["PATH"].split(os.pathsep)[0])
sys.exit(7)
"""


def started(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """The command, in a shell that knows another account."""
    foreign = {"AWS_ACCESS_KEY_ID": "real", "AWS_SECRET_ACCESS_KEY": "real", "AWS_PROFILE": "real"}
    return subprocess.Popen(
        [sys.executable, "-m", "rehearsal", *words], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | foreign | {"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip


def test_a_program_runs_in_an_account_of_its_own(image: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SHOWS)
    program = started(tmp_path, "--run", "script.py", "a", "--keep")
    said, wrong = program.communicate(timeout=120)
    assert program.returncode == 7, wrong
    assert said.splitlines() == ["arn:aws:iam::123456789012:user/person ['a', '--keep']", "[]"]
    assert not Path((tmp_path / "folder").read_text()).exists()


def test_an_account_stays_until_ctrl_c(image: str, tmp_path: Path) -> None:
    program = started(tmp_path)
    assert program.stdout
    lines = [line for line in iter(program.stdout.readline, "") if line.startswith("export ") or program.poll() or
             program.send_signal(signal.SIGINT)]  # fmt: skip
    assert program.wait(60) == 130
    exported = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
    assert {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", "AWS_DEFAULT_REGION", "PATH"} <= {*exported}
    assert not Path(exported["PATH"].split(os.pathsep)[0]).exists()


def test_prices_are_recorded_ones_and_say_so(client: Callable[[str], Any]) -> None:
    def asked(usage: str) -> list[dict[str, Any]]:
        filters = [{"Type": "TERM_MATCH", "Field": "regionCode", "Value": "us-east-1"},
                   {"Type": "CONTAINS", "Field": "usagetype", "Value": usage}]  # fmt: skip
        return [*map(json.loads, client("pricing").get_products(ServiceCode="AmazonSageMaker", Filters=filters)[
            "PriceList"])]  # fmt: skip

    (product,) = asked("Host:ml.m5.xlarge")
    (step,) = product["terms"]["OnDemand"]["recorded"]["priceDimensions"].values()
    assert (float(step["pricePerUnit"]["USD"]), step["unit"]) == (0.23, "Hrs")
    assert step["description"].startswith("recorded")
    (product,) = asked("ServerlessInf:Mem-4GB")
    (step,) = product["terms"]["OnDemand"]["recorded"]["priceDimensions"].values()
    assert (float(step["pricePerUnit"]["USD"]), step["unit"]) == (0.00008, "Seconds")
    assert not asked("Host:ml.x9.large")


def test_what_is_pushed_is_in_ecr_and_gone_at_the_end(
    account: Account, client: Callable[[str], Any], image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = str(account.folder / "bin" / "docker")
    uri = client("ecr").create_repository(repositoryName="images")["repository"]["repositoryUri"]
    docker.run("tag", image, f"{uri}:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", next(iter(account.keys)))

    def said(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([shim, *words], input="secret", capture_output=True, text=True)

    assert said("login", "--username", "AWS", "--password-stdin", uri.partition("/")[0]).stdout == "Login Succeeded\n"
    assert said("push", f"{uri}:1").returncode == 0
    assert said("push", f"{uri}:2").stderr.strip().endswith("does not exist locally")
    assert client("ecr").describe_images(repositoryName="images")["imageDetails"][0]["imageTags"] == ["1"]
    local = docker.image(account, f"{uri}:1", next(iter(account.keys.values())))
    assert docker.run("image", "inspect", local).returncode == 0
    with pytest.raises(LookupError, match="Cannot find image"):
        docker.image(account, f"{uri}:3", "arn:aws:iam::123456789012:role/job")
    account.close()
    time.sleep(0.1)
    assert docker.run("image", "inspect", local).returncode
    assert docker.run("image", "inspect", image).returncode == 0
