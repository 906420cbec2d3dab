"""An image that is made here from this Python, without a registry, and accounts for tests."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from rehearsal import account as accounts
from rehearsal import docker
from rehearsal.operations import OWNER, SECRET, Account

STUB = "rehearsal-stub:2"
LEFT_OUT = re.compile(
    r"/(test|tests|site-packages|ensurepip|idlelib|tkinter|lib2to3|config-[^/]*|__pycache__|pydoc_data)$"
)
# `train` runs the hyperparameter `code`; `serve` is the model's handler.py, or answers with what it was asked.
# SageMaker's SDK starts a script by bash and these, and asks whether there is a pip.
SHELL = ("bash", "cat", "chmod")
PROGRAMS = {
    "pip3": "#!/usr/bin/python3\nraise SystemExit('there is no pip')\n",
    "train": """#!/usr/bin/python3
import json
exec(json.load(open("/opt/ml/input/config/hyperparameters.json"))["code"])
""",
    "serve": """#!/usr/bin/python3
import http.server, json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
def ping(): return 200
def answer(body, headers): return 200, headers.get("Content-Type", "text/plain"), body
if os.path.exists("/opt/ml/model/handler.py"): exec(open("/opt/ml/model/handler.py").read())
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def say(self, code, kind, body):
        self.send_response(code); self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_GET(self): self.say(ping() if self.path == "/ping" else 404, "text/plain", b"")
    def do_POST(self): self.say(*answer(self.rfile.read(int(self.headers["Content-Length"])), self.headers))
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
""",
}


def make_stub() -> None:
    """This Python with its libraries, imported into Docker as an image."""
    interpreter = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}").resolve()
    library, packed = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})), io.BytesIO()
    shell = {name: Path(shutil.which(name) or "").resolve() for name in SHELL}
    programs = [interpreter, *(library / "lib-dynload").glob("*.so"), *shell.values()]
    linked = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True).stdout
    with tarfile.open(fileobj=packed, mode="w", dereference=True) as tar:
        for path in sorted({*re.findall(r"(/\S+) \(0x", linked)}):
            tar.add(path, path.lstrip("/"))
        tar.add(interpreter, str(interpreter).lstrip("/"))
        tar.add(library, str(library).lstrip("/"), filter=lambda f: None if LEFT_OUT.search(f"/{f.name}") else f)
        for name, path in shell.items():
            tar.add(path, f"bin/{name}")
        for name in ("tmp", "opt/ml", "etc"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(folder)
        link = tarfile.TarInfo("usr/bin/python3")
        link.type, link.linkname = tarfile.SYMTYPE, str(interpreter)
        tar.addfile(link)
        for name, text in PROGRAMS.items():
            file = tarfile.TarInfo(f"usr/bin/{name}")
            file.mode, file.size = 0o755, len(text)
            tar.addfile(file, io.BytesIO(text.encode()))
    environment = ["--change", "ENV PATH=/usr/bin:/bin", "--change", "ENV PYTHONUNBUFFERED=1"]
    subprocess.run(["docker", "import", *environment, "-", STUB], input=packed.getvalue(), check=True,
                   capture_output=True)  # fmt: skip


@pytest.fixture(scope="session")
def image() -> str:
    """The stub's name."""
    if reason := docker.absent():
        pytest.skip(f"no Docker: {reason}")
    if sys.platform != "linux":
        pytest.skip("the stub is made of this machine's Python, which must be Linux's")
    if docker.run("image", "inspect", STUB).returncode:
        make_stub()
    return STUB


@pytest.fixture
def account(image: str) -> Iterator[Account]:
    """An account with a bucket `the-bucket` and a role `arn:aws:iam::123456789012:role/job`, which may do all."""
    with accounts.opened() as made:
        made.client("s3").create_bucket(Bucket="the-bucket")
        everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
        iam, trusted = made.client("iam"), json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        assert iam.create_role(RoleName="job", AssumeRolePolicyDocument=trusted)["Role"]["Arn"] == ROLE
        iam.put_role_policy(RoleName="job", PolicyName="all", PolicyDocument=json.dumps(everything))
        yield made


ROLE = "arn:aws:iam::123456789012:role/job"


@pytest.fixture
def client(account: Account) -> Callable[[str], Any]:
    """Clients of the account's owner, as programs have them."""

    def made(service: str) -> Any:
        return boto3.session.Session().client(
            service, region_name=account.region, endpoint_url=account.front, aws_access_key_id=OWNER,
            aws_secret_access_key=SECRET,
        )  # fmt: skip

    return made


def until(look: Callable[[], Any], seconds: float = 60) -> Any:
    """What a look gives as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} seconds")
