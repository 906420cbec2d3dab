"""An account keeps its clients and the stack: each verb makes every client once and asks for the stack once."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import pytest

from pipelines import ROOT, config
from pipelines.cloud import doctor, errors, prices, status, train
from pipelines.cloud.account import Account, until
from pipelines.endpoint import deploy
from pipelines.terminal import UserError
from tests.cloud import STACK, Recorder, aws, described
from tests.test_cloud_training import account
from tests.test_costs import list_prices
from tests.test_deploy import Hosting, hosting
from tests.test_doctor import caller, healthy
from tests.test_inference import archive, artifact, classifier, photo

__all__ = ["account", "archive", "artifact", "aws", "classifier", "healthy", "hosting", "photo"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore")  # the SDK's own
LOOK_UP = Account.stack  # which the fixtures replace
Made = Counter[tuple[Any, ...]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """How often the project's code made which client; the SDK makes some of its own."""
    found, real = Made(), boto3.Session.client

    def client(self: Any, *words: Any, **more: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("pipelines."):
            found[words] += 1
        return real(self, *words, **more)

    monkeypatch.setattr(boto3.Session, "client", client)
    return found


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], *words: str) -> None:
    monkeypatch.setattr(Account, "stack", LOOK_UP)
    monkeypatch.setattr(sys, "argv", ["verb", "--set", "aws.region=us-east-1", *words])
    seen, sent, within = set(), botocore.client.BaseClient._make_api_call, list[str]()

    def call(self: Any, operation: str, parameters: dict[str, Any]) -> Any:
        told = self.meta.config
        if not within:  # or it is AWS's stand-in that asks
            seen.add((operation, told.retries["mode"], told.retries["total_max_attempts"], told.connect_timeout,
                      told.read_timeout))  # fmt: skip
        within.append(operation)
        try:
            return sent(self, operation, parameters)
        finally:
            within.pop()

    with monkeypatch.context() as patched:
        patched.setattr(botocore.client.BaseClient, "_make_api_call", call)
        main()
    assert seen
    others = {facts for facts in seen if facts[1:] != ("standard", errors.ATTEMPTS, 10, 60)}
    assert others == set(), "clients of the SDK's are told the same"


def test_status(aws: Recorder, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prices, "CACHE", tmp_path / "prices.json")
    aws.answers |= {"DescribeStacks": described(STACK), "GetProducts": list_prices}
    run(monkeypatch, status.main)
    once(aws, made, "sagemaker", "scheduler", "cloudwatch", "application-autoscaling", "cloudformation", "ecr")


def test_doctor(healthy: Recorder, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy.clear()
    healthy.answers["GetCallerIdentity"] = caller()
    run(monkeypatch, doctor.main)
    once(healthy, made, "sts", "service-quotas", "cloudformation", "iam", "ecr")


def test_train(account: Recorder, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    account.answers["DescribeStacks"] = described(STACK)
    run(monkeypatch, train.main, "--yes")
    once(account, made, "cloudformation", "s3", "ecr")


def test_deploy(hosting: Hosting, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    hosting.calls.answers["DescribeStacks"] = described(STACK)
    run(monkeypatch, deploy.main, "--yes")
    once(hosting.calls, made, "cloudformation", "s3", "ecr", "sagemaker", "scheduler", "application-autoscaling")


def test_batch(hosting: Hosting, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    batch = pytest.importorskip("pipelines.batch.transform")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "up.png").write_bytes(photo("up"))
    hosting.calls.answers["DescribeStacks"] = described(STACK)
    run(monkeypatch, batch.main, "--data", str(tmp_path / "photos"), "--yes")
    once(hosting.calls, made, "cloudformation", "s3", "ecr", "scheduler")


def test_tune(account: Recorder, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = pytest.importorskip("pipelines.tuning.cloud")
    account.answers["DescribeStacks"] = described(STACK)
    run(monkeypatch, tuning.main, "--yes")
    once(account, made, "cloudformation", "s3", "ecr")


def once(calls: Recorder, made: Made, *services: str) -> None:
    assert len(calls.named("DescribeStacks")) == 1
    assert made == dict.fromkeys(((service, "us-east-1") for service in services), 1)


def test_only_the_account_makes_clients() -> None:
    """`training_pipeline` has a session that makes none."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "pipelines").rglob("*.py")}
    users = {path.stem for path, text in texts.items() if re.search(r"boto3\.(client|resource|Session)\b", text)}
    assert users == {"account", "training_pipeline"}


def test_a_client_is_made_once_for_a_service_and_a_region(aws: Recorder, made: Made) -> None:
    known = Account(config.load(["aws.region=us-east-1"], {}))
    with ThreadPoolExecutor(8) as pool:
        clients = set(pool.map(known.client, ["s3"] * 32))
    assert clients == {known.client("s3")}
    assert known.client("s3", "eu-west-1") not in clients
    assert made == {("s3", "us-east-1"): 1, ("s3", "eu-west-1"): 1}
    assert known.client("s3").meta.config.retries["total_max_attempts"] == errors.ATTEMPTS
    assert aws == []


def test_a_key_is_looked_up_once(aws: Recorder) -> None:
    kms = boto3.client("kms")
    key = kms.create_key()["KeyMetadata"]
    kms.create_alias(AliasName="alias/ours", TargetKeyId=key["KeyId"])
    known = Account(config.load(["aws.region=us-east-1", "aws.kms_key=alias/ours"], {}))
    assert {known.kms_arn() for _ in range(3)} == {key["Arn"]}
    assert known.encryption() == {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key["Arn"]}
    assert len(aws.named("DescribeKey")) == 1
    none = Account(config.load(["aws.region=us-east-1"], {}))
    assert (none.kms_arn(), none.encryption()) == (None, {})


def test_waiting_shows_a_line_when_it_changes_and_gives_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    steps = iter([(None, "one"), (None, "one"), (None, ""), (None, "two"), ("done", "two"), ("never", "")])

    def look(say: Callable[[str], None]) -> tuple[str | None, str]:
        say("looking")
        return next(steps)

    assert until("it", 0, look) == "done"
    assert "".join(capsys.readouterr().out.split("looking\n")) == "one\ntwo\n"


def test_waiting_ends_with_patience() -> None:
    with pytest.raises(UserError, match="it takes too long"):
        until("it", 0.01, lambda _: (None, ""), patience=0.05, late=lambda: "it takes too long")


@pytest.mark.parametrize(("stopped", "error"), [("it goes on", UserError), ("", KeyboardInterrupt)])
def test_ctrl_c_ends_the_waiting(aws: Recorder, stopped: str, error: type[BaseException]) -> None:
    def look(_: object) -> tuple[None, str]:
        os.kill(os.getpid(), signal.SIGINT)
        return None, ""

    with pytest.raises(error, match=stopped) as raised:
        until("it", 1, look, stopped=stopped)
    assert getattr(raised.value, "code", 130) == 130
    assert aws == []
