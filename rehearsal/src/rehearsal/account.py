"""An account from its start to its end, and a program that runs in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rehearsal import docker
from rehearsal.operations import OWNER, PERSON, SECRET, Account

# What would lead a program to another account, or an engine to other images than the rehearsal's.
FOREIGN = ("AWS_", "SAGEMAKER_", "BOTO_", "SSO_")
KEPT = ("AWS_CA_BUNDLE",)
# What an administrator would tell SageMaker's SDK: it asks AWS itself who it is to name a bucket, and for telemetry.
SDK = """SchemaVersion: '1.0'
SageMaker:
  PythonSDK:
    Modules:
      Session: {{DefaultS3Bucket: sagemaker-{region}-{number}}}
      TelemetryOptOut: true
"""


@contextlib.contextmanager
def opened(region: str = "us-east-1", faults: Sequence[str] = ()) -> Iterator[Account]:
    """An account with nothing in it; at the end nothing is left of it."""
    os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)
    os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"  # those of AWS, such as AmazonSageMakerFullAccess
    for name in [name for name in os.environ if name.startswith(FOREIGN) and name not in (*KEPT, "AWS_CONFIG_FILE",
                 "AWS_SHARED_CREDENTIALS_FILE")]:  # fmt: skip
        del os.environ[name]
    # Not before: moto and its clients look at the environment when they are imported. The modules take over operations.
    from rehearsal import modules, server  # noqa: F401

    account = Account(Path(tempfile.mkdtemp(prefix="rehearsal-")), region=region, faults=[*faults])
    account.at_end(shutil.rmtree, account.folder, True)
    try:
        account.at_end(docker.clean, account)
        server.start(account)
        docker.put_first(account)
        text = SDK.format(region=account.region, number=account.number)
        (account.folder / "sdk.yaml").write_text(text, encoding="utf-8")
        account.client("iam").create_user(UserName=account.keys[PERSON].rpartition("/")[2])
        yield account
    finally:
        account.close()


def variables(account: Account, key: str = PERSON) -> dict[str, str]:
    """What a program's environment needs to find the account."""
    addresses = dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SAGEMAKER", "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"),
                              account.front)  # fmt: skip
    return addresses | {
        "AWS_DEFAULT_REGION": account.region,
        "AWS_REGION": account.region,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "SAGEMAKER_ADMIN_CONFIG_OVERRIDE": str(account.folder / "sdk.yaml"),
        "SAGEMAKER_VALIDATE_ROLE": "false",  # the SDK asks IAM to simulate policies, which moto does not
        "REHEARSAL": account.front,
        "REHEARSAL_OWNER": OWNER,
        "PATH": f"{account.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }


def environment(account: Account, outer: Mapping[str, str]) -> dict[str, str]:
    """An environment without what the shell knows of AWS, with what leads here."""
    kept = {name: value for name, value in outer.items() if name in KEPT or not name.startswith(FOREIGN)}
    return kept | variables(account)


def run(account: Account, words: Sequence[str]) -> int:
    """Run a program in the account; Ctrl-C goes to it, and its end is awaited. Returns its exit code."""
    with subprocess.Popen(words, env=environment(account, os.environ)) as program:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the program as well
        ended = signal.signal(signal.SIGTERM, lambda *_: program.terminate())
        try:
            code = program.wait()
        finally:
            signal.signal(signal.SIGINT, before)
            signal.signal(signal.SIGTERM, ended)
    return 128 - code if code < 0 else code
