"""AWS profiles that give no credentials: every cloud verb says why, in one sentence, whatever the kind of trouble."""

# ruff: noqa: E501  (a table of files)

from __future__ import annotations

import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ProxyConnectionError,
    ReadTimeoutError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)
from botocore.parsers import ResponseParserError

from pipelines import ROOT, config, terminal
from pipelines.__main__ import VERBS as TABLE
from pipelines.cloud import errors
from pipelines.cloud.account import Account
from pipelines.terminal import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # getpass has no terminal

SSO = "sso_session = s\nsso_account_id = 123456789012\nsso_role_name = r\nregion = us-east-1\n"
SESSION = "[sso-session s]\nsso_start_url = https://a.invalid\nsso_region = us-east-1\n"
KINDS = {  # what ~/.aws/config says of the profile `p`, and what is said
    "misspelt": ("[profile q]\n", r"is in no file of AWS's; `aws configure list-profiles`"),
    "sso": (f"[profile p]\n{SSO}{SESSION}", r"has no session (any more|yet); sign in again with `aws sso login --profile p`"),
    "old sso": ("[profile p]\nsso_start_url = https://a.invalid\nsso_region = us-east-1\nsso_account_id = 123456789012\n"
                "sso_role_name = r\n", r"has no session (any more|yet); .*aws sso login --profile p"),
    "gone": ("[profile p]\ncredential_process = /nowhere/at/all --x\n", r"needs a file or program that is not there: .*nowhere"),
    "no json": ("[profile p]\ncredential_process = echo hello\n", r"does not answer with JSON; run it by hand"),
    "fails": ("[profile p]\ncredential_process = false\n", r"gives no credentials: .*; run its credential_process by hand"),
    "no version": ("[profile p]\ncredential_process = echo {}\n", r"gives no credentials: .*Version"),
    "mfa": ("[profile p]\nrole_arn = arn:aws:iam::123456789012:role/r\nsource_profile = k\nmfa_serial = arn:aws:iam::1:mfa/m\n"
            "[profile k]\naws_access_key_id = a\naws_secret_access_key = b\n", "needs an MFA code, and nobody is there"),
    "web": ("[profile p]\nrole_arn = arn:aws:iam::123456789012:role/r\nweb_identity_token_file = /nowhere/token\n",
            "needs a file or program that is not there: .*/nowhere/token"),
    "login": ("[profile p]\nlogin_session = arn:aws:iam::123456789012:user/u\n", "(aws login|has no session)"),
    "circle": ("[profile p]\nrole_arn = arn:aws:iam::123456789012:role/r\nsource_profile = o\n"
               "[profile o]\nrole_arn = arn:aws:iam::123456789012:role/r\nsource_profile = p\n", "gives no credentials: .*loop"),
    "no source": ("[profile p]\nrole_arn = arn:aws:iam::123456789012:role/r\nsource_profile = o\n", "gives no credentials: .*o"),
    "broken": ("[profile p\nx", "gives no credentials: .*pars"),
}  # fmt: skip


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that says what the profile `p` is."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_PROFILE": "p", "AWS_CONFIG_FILE": str(tmp_path / "config"), "HOME": str(tmp_path),
                        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
                        "AWS_EC2_METADATA_DISABLED": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    monkeypatch.setattr(sys, "stdin", io.StringIO())  # nobody is there
    return tmp_path / "config"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_trouble_is_one_sentence(profile: Path, kind: str) -> None:
    text, words = KINDS[kind]
    profile.write_text(text)
    with pytest.raises(errors.ProfileError, match=f"^the AWS profile p .*{words}") as said:
        Account(config.load(["aws.region=us-east-1"], {})).client("s3")
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 450


ARGUMENTS = {
    "train": ["--data", "s3://b/d", "--yes"], "process": ["--data", "s3://b/d", "--yes"], "approve": ["--package", "1"],
    "tune": ["--data", "s3://b/d", "--yes"], "pull": ["--job", "j"], "logs": ["--job", "j"],
    "invoke": ["--image", "a.png"], "shift-traffic": ["--variant", "a", "--weight", "1"], "monitor": ["--yes"],
    "batch": ["--data", "s3://b/d", "--job", "j", "--yes"], "pipeline": ["--data", "s3://b/d", "--yes"],
    "deploy": ["--job", "j", "--yes"], "register": ["--job", "j"], "destroy": ["--yes"], "bootstrap": ["--yes"],
}  # fmt: skip
VERBS = {verb: row[0] for rows in TABLE.values() for verb, row in rows.items()}
PRICED = ("train", "process", "tune", "batch", "deploy", "monitor")


def cloud_verbs() -> list[str]:
    """Those that this project's scope has."""
    known = (*ARGUMENTS, "status", "image-push", "doctor")
    return [
        verb
        for verb in VERBS
        if verb in known and Path(ROOT, "pipelines", *VERBS[verb].split(".")).with_suffix(".py").is_file()
    ]


def called(verb: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int | str | None:
    """The exit code of a verb, run as its command line is, in this process."""
    monkeypatch.setattr(sys, "argv", [verb, *ARGUMENTS.get(verb, []), *more])
    main = importlib.import_module(f"pipelines.{VERBS[verb]}").main
    with pytest.raises(SystemExit) as ended:
        terminal.run_verb(main)
    return ended.value.code


def answers(code: str, message: str) -> Exception:
    # As AWS has them, and as botocore reads them from a service that speaks XML or JSON.
    return ClientError({"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPHeaders": {}}}, "Any")


TOKEN = "The security token included in the request is"
TROUBLES: dict[str, tuple[Exception, str]] = {  # what every request ends in, and what is said
    "sso ended": (UnauthorizedSSOTokenError(), "have expired; get new ones, for instance with `aws sso login`"),
    "sso ended meanwhile": (
        TokenRetrievalError(provider="sso", error_msg="Token has expired and refresh failed"), "have expired; get new"),
    "program fails meanwhile": (CredentialRetrievalError(provider="custom-process", error_msg="no"), "have expired"),
    "assumed role ended": (answers("ExpiredToken", f"{TOKEN} expired"), "have expired; get new ones"),
    "assumed role ended, json": (answers("ExpiredTokenException", f"{TOKEN} expired"), "have expired; get new ones"),
    "keys of another partition": (answers("InvalidClientTokenId", f"{TOKEN} invalid."), "does not accept these"),
    "region not enabled": (answers("UnrecognizedClientException", f"{TOKEN} invalid."), "does not accept these"),
    "clock": (answers("SignatureDoesNotMatch", "Signature expired"), "this machine's clock"),
    "no credentials": (NoCredentialsError(), "there are no AWS credentials"),
    "no network": (EndpointConnectionError(endpoint_url="https://a.invalid"), "AWS cannot be reached"),
    "no answer": (ReadTimeoutError(endpoint_url="https://a.invalid"), "AWS gave no answer"),
    "a login's page": (ResponseParserError("invalid XML received:\nb'<html>'"), "what answered is not AWS"),
    "proxy": (ProxyConnectionError(proxy_url="http://proxy.invalid"), "AWS cannot be reached"),
    "not allowed": (answers("AccessDenied", "User: a is not authorized to perform: b"), "may not do that"),
    "too many": (answers("ThrottlingException", "Rate exceeded"), "too many requests, 5 attempts"),
}  # fmt: skip
REGIONS = {"us-east-1": "aws", "cn-north-1": "aws-cn", "us-gov-west-1": "aws-us-gov"}


@pytest.fixture(scope="module")
def models() -> Any:
    """A loader for all: what it has read of AWS's services stays read, which makes hundreds of calls cheap."""
    return botocore.session.get_session().get_component("data_loader")


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, profile: Path, models: Any) -> None:
    """Keys in the environment, and no region there."""

    def session() -> botocore.session.Session:
        made = botocore.session.Session()
        made.register_component("data_loader", models)
        return made

    monkeypatch.setattr("botocore.session.get_session", session)
    profile.write_text("")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("verb", cloud_verbs())
def test_every_trouble_of_every_cloud_verb_is_one_sentence(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every partition, with a price only and without: no traceback, an exit code, and what to do."""
    for number, (kind, (error, words)) in enumerate(TROUBLES.items()):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("botocore.client.BaseClient._make_api_call", fails)
        region = [*REGIONS][number % len(REGIONS)]
        for more in ([], ["--plan"]) if verb in PRICED else ([],):
            code = called(verb, monkeypatch, *more, "--set", f"aws.region={region}")
            said = capsys.readouterr()
            assert code not in (0, None), (kind, more, said)
            assert "Traceback" not in said.out + said.err, (kind, more)
            if verb == "doctor":
                lines = said.out.replace("\n      fix: ", "; ")
                assert re.search(f"(?m)^(fail|warn) .*{re.escape(words)}", lines), (kind, lines)
                continue
            last = said.err.strip().splitlines()
            assert len(last) == 1, (kind, more, said.err)
            assert last[0].startswith("error: "), (kind, more, said.err)
            # All fails, so that even a price cannot be asked for.
            everything = any(words in errors.STEPS[reason] for reason in errors.HOPELESS)
            noted = said.out if more and not everything else ""
            assert words in last[0] + noted, (kind, more, said)
            assert len(last[0]) < 600


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("verb", cloud_verbs())
def test_a_region_that_does_not_exist_is_named_before_it_is_asked(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", asked)
    for more in ([], ["--plan"]) if verb in PRICED else ([],):
        assert called(verb, monkeypatch, *more, "--set", "aws.region=us-esat-1")
        said = capsys.readouterr()
        line = (said.out if verb == "doctor" else said.err).strip().splitlines()[-1]
        assert "aws.region is us-esat-1, which has no SageMaker that boto3 knows of; did you mean " in line
        assert "us-east-1" in line
    assert called(verb, monkeypatch, "--set", "aws.region=Frankfurt") == 1
    assert "aws.region is 'Frankfurt'" in capsys.readouterr().err


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("region", REGIONS)
def test_the_partition_of_a_region_is_asked_at_its_own_address(region: str) -> None:
    account = Account(config.load([f"aws.region={region}"], {}))
    assert account.session.get_partition_for_region(region) == REGIONS[region]
    ends = {"aws": "amazonaws.com", "aws-cn": "amazonaws.com.cn", "aws-us-gov": "amazonaws.com"}[REGIONS[region]]
    for service in ("sts", "ecr", "s3", "cloudformation", "scheduler"):
        assert account.client(service).meta.endpoint_url.endswith(ends)


@pytest.mark.parametrize("verb", cloud_verbs())
def test_every_cloud_verb_says_so(
    profile: Path, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile.write_text("[profile p]\ncredential_process = false\n")
    for more in ([], ["--plan"]) if verb in PRICED else ([],):
        monkeypatch.setattr(sys, "argv", [verb, *ARGUMENTS.get(verb, []), *more, "--set", "aws.region=us-east-1"])
        main = importlib.import_module(f"pipelines.{VERBS[verb]}").main
        if verb == "doctor":
            assert main() == 1
            assert "fail  the AWS profile p gives no credentials" in capsys.readouterr().out
        else:
            with pytest.raises(UserError, match=r"^the AWS profile p gives no credentials"):
                main()
