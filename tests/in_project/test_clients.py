"""AWS's own clients, unchanged, against what `make serve-local` starts: boto3, the CLI, SDK V3, JavaScript's SDK.

The CLI is tried where this machine has one, or CLI_OF_AWS names one, and JavaScript's SDK where JAVASCRIPT_SDK names a
folder that has it; `make test-slow` installs both.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from starlette.applications import Starlette
from starlette.requests import Request

from inference import local
from inference.local import INLINE_BYTES
from pipelines.local import serve as serve_local
from tests.hosting import ANY_IMAGE, JSON, Running, ask, encoded, probed, serving
from tests.test_inference import artifact, photo

__all__ = ["artifact"]  # a fixture
ACCOUNT = {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local", "AWS_REGION": "eu-west-1",
           "AWS_DEFAULT_REGION": "eu-west-1"}  # fmt: skip  # whatever they are


CLI = os.environ.get("CLI_OF_AWS") or shutil.which("aws")
FOLDER = os.environ.get("JAVASCRIPT_SDK")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("async")


@pytest.fixture(scope="module")
def server(artifact: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("clients")
    handlers = probed(artifact, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_local, "FILES", files)
        with serving(handlers, folder / "log", local=["--local"], PROBE=str(folder)) as running:
            yield running


@pytest.fixture
def environment(server: Running, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """All that a client needs to be told."""
    variables = ACCOUNT | {"AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": server.url}
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return dict(os.environ)


@pytest.fixture
def client(environment: dict[str, str]) -> Any:
    assert environment
    return boto3.client("sagemaker-runtime", config=Config(retries={"max_attempts": 0}))


def test_boto3(client: Any) -> None:
    for more in ({}, {"ContentType": "image/png"}, {"Accept": JSON}, {"InferenceId": "mine"}):
        answer = client.invoke_endpoint(EndpointName="any", Body=photo("left"), **more)
        assert json.loads(answer["Body"].read())["labels"] == ["left"]
        assert (answer["ContentType"], answer["InvokedProductionVariant"]) == (JSON, "local")
    assert answer["ResponseMetadata"]["HTTPHeaders"]["x-request-id"] == "mine"
    both = client.invoke_endpoint(EndpointName="x", ContentType=JSON, Body=encoded([("", photo("up"))] * 2))
    assert json.loads(both["Body"].read())["labels"] == ["up", "up"]


def test_custom_attributes_go_both_ways(client: Any) -> None:
    wish = 'set:["X-Amzn-SageMaker-Custom-Attributes", "trace=1"]'
    answer = client.invoke_endpoint(EndpointName="x", Body=photo(), CustomAttributes=wish)
    assert answer["CustomAttributes"] == "trace=1"


def test_what_only_the_cloud_has_is_ignored_and_said_so(client: Any) -> None:
    more = {"TargetVariant": "blue", "TargetModel": "a.tar.gz", "InferenceComponentName": "part"}
    answer = client.invoke_endpoint(EndpointName="x", Body=photo(), **more)
    assert answer["InvokedProductionVariant"] == "local"
    said = answer["ResponseMetadata"]["HTTPHeaders"]["x-ignored"].split(", ")
    assert sorted(said) == [f"x-amzn-sagemaker-{name}" for name in ("inference-component", "target-model",
                                                                     "target-variant")]  # fmt: skip


def test_a_refusal_is_the_error_of_the_cloud(client: Any) -> None:
    with pytest.raises(client.exceptions.ModelError, match=r"Received client error \(400\) .*GIF89a") as caught:
        client.invoke_endpoint(EndpointName="x", Body=b"GIF89a", ContentType="image/png")
    assert caught.value.response["OriginalStatusCode"] == 400
    assert "GIF89a" in json.loads(caught.value.response["OriginalMessage"])["error"]
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 424
    for wish, status in (("input:value", 500), ("input:memory", 503)):
        with pytest.raises(client.exceptions.ModelError, match=rf"Received server error \({status}\)"):
            client.invoke_endpoint(EndpointName="x", Body=photo(), CustomAttributes=wish)


def later(files: Path, location: str) -> dict[str, Any]:
    """An asynchronous answer."""
    file, end = files / location.removeprefix("s3://"), time.monotonic() + 30
    while not file.is_file():
        assert time.monotonic() < end
        time.sleep(0.02)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_asynchronous_requests_are_files(client: Any, files: Path) -> None:
    (files / "mine" / "in").mkdir(parents=True)
    (files / "mine" / "in" / "a photo.png").write_bytes(photo("down"))
    answer = client.invoke_endpoint_async(
        EndpointName="x", InputLocation="s3://mine/in/a photo.png", ContentType="image/png", InferenceId="its-7"
    )
    assert (answer["InferenceId"], answer["ResponseMetadata"]["HTTPStatusCode"]) == ("its-7", 202)
    assert later(files, answer["OutputLocation"])["labels"] == ["down"]
    (files / "mine" / "Stra\u00dfe \u4e2d.png").write_bytes(photo("up"))
    answer = client.invoke_endpoint_async(EndpointName="x", InputLocation="s3://mine/Stra\u00dfe \u4e2d.png")
    assert later(files, answer["OutputLocation"])["labels"] == ["up"]
    (files / "mine" / "bad").write_bytes(b"GIF89a")
    answer = client.invoke_endpoint_async(EndpointName="x", InputLocation="s3://mine/bad", ContentType="image/png")
    assert "GIF89a" in later(files, answer["FailureLocation"])["error"]
    assert not (files / answer["OutputLocation"].removeprefix("s3://")).exists()


def test_an_asynchronous_request_may_be_its_own_body(client: Any, files: Path, server: Running) -> None:
    answer = client.invoke_endpoint_async(EndpointName="x", Body=photo("up"))
    assert later(files, answer["OutputLocation"])["labels"] == ["up"]
    answer = ask(server.url, b"x" * (INLINE_BYTES + 1), path="/endpoints/x/async-invocations")
    assert (answer.status, "has more than 128000 bytes" in answer.json()["Message"]) == (400, True)


def test_no_other_file_is_read(client: Any, files: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(photo())
    (files / "mine").mkdir(exist_ok=True)
    (files / "mine" / "link").symlink_to(tmp_path / "secret")
    for location in (f"s3:/{tmp_path}/secret", f"s3://mine/../..{tmp_path}/secret", f"file://{tmp_path}/secret",
                     f"s3://..{tmp_path}/secret", "s3://mine/link", "s3://mine", "s3://mine/", "https://mine/a",
                     "s3://mine/nothing", f"s3:///{tmp_path}/secret"):  # fmt: skip
        with pytest.raises(ClientError, match="ValidationError"):
            client.invoke_endpoint_async(EndpointName="x", InputLocation=location)
    assert not {*files.glob("local/**/*.out")} - {*files.glob("local/output/*.out"), *files.glob("local/failure/*.out")}


def test_a_server_without_files_says_so() -> None:
    """The one for an artifact that is not trusted."""
    served = Starlette()
    local.extend(served, pytest.fail, None, "127.0.0.1", None)  # type: ignore[arg-type]
    route: Any = served.routes[-1]
    answer = asyncio.run(route.endpoint(Request({"type": "http", "headers": []})))
    assert (answer.status_code, b"not trusted" in answer.body) == (400, True)
    assert "--files" in serve_local.command(None, Path("model"), 1, local=["--local"])
    assert "--files" not in serve_local.command(None, Path("model"), 1, True, ["--local"])
    assert "--files" not in serve_local.command(None, Path("model"), 1)


def test_the_cli(environment: dict[str, str], tmp_path: Path) -> None:
    if not CLI:  # not a skip: where containers are required, a skipped test is a failure
        return
    (tmp_path / "photo.png").write_bytes(photo("left"))
    words = [CLI, "sagemaker-runtime", "invoke-endpoint", "--endpoint-name", "mine", "--body"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*words, f"fileb://{tmp_path}/photo.png", *more, "answer.json"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = run("--content-type", "image/png", "--target-variant", "blue")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "answer.json").read_text())["labels"] == ["left"]
    assert json.loads(done.stdout)["InvokedProductionVariant"] == "local"
    (tmp_path / "photo.png").write_bytes(b"GIF89a")
    done = run()
    assert done.returncode != 0
    assert "(ModelError)" in done.stderr
    assert "GIF89a" in done.stderr


@pytest.mark.usefixtures("environment")
def test_sdk_v3() -> None:
    from sagemaker.core.resources import Endpoint
    from sagemaker.core.utils.utils import SageMakerClient

    SageMakerClient.reset()  # the SDK keeps the clients that it made first, and other tests made some
    answer = Endpoint(endpoint_name="mine").invoke(body=photo("up"), content_type=ANY_IMAGE)
    body = answer.body if isinstance(answer.body, (str, bytes)) else answer.body.read()
    assert json.loads(body)["labels"] == ["up"]
    SageMakerClient.reset()


SCRIPT = """
const { SageMakerRuntimeClient, InvokeEndpointCommand } = require("@aws-sdk/client-sagemaker-runtime");
const client = new SageMakerRuntimeClient({ maxAttempts: 1 });
const send = (Body) => client.send(new InvokeEndpointCommand({ EndpointName: "x", Body, ContentType: "image/png" }));
(async () => {
  const answer = await send(require("fs").readFileSync("photo.png"));
  const found = JSON.parse(new TextDecoder().decode(answer.Body));
  let error;
  try { await send("GIF89a"); } catch (caught) { error = caught; }
  console.log(JSON.stringify([found.labels, answer.InvokedProductionVariant, error.name, error.OriginalStatusCode]));
})();
"""


def test_the_sdk_of_javascript(environment: dict[str, str], tmp_path: Path) -> None:
    if not FOLDER:
        return
    (tmp_path / "photo.png").write_bytes(photo("left"))
    variables = environment | {"NODE_PATH": f"{FOLDER}/node_modules"}
    command = ["node", "-e", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [["left"], "local", "ModelError", 400], done.stderr
