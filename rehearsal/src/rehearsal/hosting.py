"""A model in its container, by the contract of hosting: `docker run <image> serve`, /ping and /invocations on 8080.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from __future__ import annotations

import functools
import http.client
import secrets
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from rehearsal import docker, operations, s3
from rehearsal.operations import Account, Answer, Request, missing, operation, page, refuse

PING_SECONDS = 2  # in which /ping answers
STOP_SECONDS = 30  # between SIGTERM and SIGKILL
LATE = "Your invocation timed out while waiting for a response from container primary"
# Kind: of ARNs, and as AWS's refusals name it.
KINDS = {
    "Model": ("model", "model"),
    "EndpointConfig": ("endpoint-config", "endpoint configuration"),
    "Endpoint": ("endpoint", "endpoint"),
}


class HostingError(Exception):
    """Why a model does not serve, as a FailureReason says it."""


def ask(account: Account, name: str, **request: Any) -> Answer:
    """What SageMaker answers to a request of the rehearsal's own."""
    handler = operations.HANDLERS.get(("sagemaker", name))
    return handler(account, request) if handler else account.pass_on("sagemaker", name, request)


def thing(account: Account, word: str, name: str) -> dict[str, Any]:
    """A Model, EndpointConfig or Endpoint as Describe has it."""
    found = account.things.setdefault(word, {}).get(name)
    if found is None:
        kind, called = KINDS[word]
        raise missing(f'{called} "{account.arn(kind, name)}"')
    return found


def keep(account: Account, word: str, request: Request, **facts: Any) -> Answer:
    """Remember something new with its tags; the answer is its ARN."""
    kind, called = KINDS[word]
    name = request[f"{word}Name"]
    arn, known = account.arn(kind, name), account.things.setdefault(word, {})
    with account.lock:
        if name in known:
            raise refuse("ValidationException", f'Cannot create already existing {called} "{arn}".')
        described = {key: value for key, value in request.items() if key != "Tags"}
        known[name] = described | {f"{word}Arn": arn, "CreationTime": operations.now()} | facts
        account.tags[arn] = [*request.get("Tags", [])]
    return {f"{word}Arn": arn}


def listed(account: Account, word: str, request: Request) -> Answer:
    """A page of summaries."""
    part = request.get("NameContains", "").lower()
    by = {"Name": f"{word}Name"}.get(request.get("SortBy", ""), "CreationTime")
    shown = (f"{word}Name", f"{word}Arn", "CreationTime", "LastModifiedTime", "EndpointStatus")
    found = [{key: facts[key] for key in shown if key in facts}
             for facts in account.things.get(word, {}).values() if part in facts[f"{word}Name"].lower()]  # fmt: skip
    found.sort(key=lambda facts: facts[by], reverse=request.get("SortOrder", "Descending") == "Descending")
    return page(found, request, f"{word}s")


def forget(account: Account, word: str, name: str) -> Answer:
    """Remove something and its tags."""
    thing(account, word, name)
    del account.things[word][name]
    account.tags.pop(account.arn(KINDS[word][0], name), None)
    return {}


@operation("sagemaker", "CreateModel")
def create_model(account: Account, request: Request) -> Answer:
    """A model: nothing is looked at before it serves."""
    return keep(account, "Model", request)


@operation("sagemaker", "DescribeModel")
def describe_model(account: Account, request: Request) -> Answer:
    """As it was made."""
    return {"EnableNetworkIsolation": False} | thing(account, "Model", request["ModelName"])


@operation("sagemaker", "ListModels")
def list_models(account: Account, request: Request) -> Answer:
    """A page."""
    return listed(account, "Model", request)


@operation("sagemaker", "DeleteModel")
def delete_model(account: Account, request: Request) -> Answer:
    """It is gone; what serves it goes on."""
    return forget(account, "Model", request["ModelName"])


@dataclass
class Host:
    """A container that serves a model."""

    container: docker.Container
    address: tuple[str, int]
    role: str
    network: str = ""  # of its own

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, seconds: float = 60
    ) -> tuple[int, dict[str, str], bytes]:
        """Its answer: status, headers in small letters, body.

        Raises:
            TimeoutError: when it takes longer.
            OSError: when nobody answers.
        """
        deadline = time.monotonic() + seconds
        connection = http.client.HTTPConnection(*self.address, timeout=seconds)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            if connection.sock:
                connection.sock.settimeout(max(deadline - time.monotonic(), 0.01))
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"no answer of HTTP: {error!r}") from error
        finally:
            connection.close()

    def healthy(self) -> bool:
        """Whether /ping says 200."""
        try:
            return self.ask("GET", "/ping", seconds=PING_SECONDS)[0] == 200
        except OSError:
            return False

    def stop(self) -> None:
        """As AWS ends a container of hosting."""
        if self.container.code is None:
            self.container.stop(STOP_SECONDS)
        if self.network:
            docker.run("network", "rm", self.network)


def host(
    account: Account, model: str, group: str, stream: str, env: Mapping[str, str] | None = None, patience: float = 480,
    memory: int = 0, began: Callable[[docker.Container], None] = lambda _: None,
) -> Host:  # fmt: skip
    """Start a model's container, and wait until it is healthy.

    Args:
        account: that has the model.
        model: its name.
        group: of CloudWatch's logs that gets its lines.
        stream: of these.
        env: more variables than the model names.
        patience: seconds until /ping has to answer.
        memory: MB that it may take; 0: what there is.
        began: is handed the container as soon as it runs.

    Raises:
        HostingError: when it does not serve.
    """
    facts = thing(account, "Model", model)
    definitions = facts.get("Containers") or [facts["PrimaryContainer"]]
    if len(definitions) > 1:
        raise HostingError(f"the rehearsal plays no model of several containers, and {model} has {len(definitions)}")
    definition, role = definitions[0], facts["ExecutionRoleArn"]
    if name := definition.get("ModelPackageName"):
        package = ask(account, "DescribeModelPackage", ModelPackageName=name)
        held = package["InferenceSpecification"]["Containers"][0]
        both = (held.get("Environment") or {}) | (definition.get("Environment") or {})
        definition = held | {"Environment": both}
    variables = {"AWS_REGION": account.region} | (definition.get("Environment") or {}) | dict(env or {})
    folder = account.folder / "models" / secrets.token_hex(6)
    (folder / "model").mkdir(parents=True)
    try:
        image = docker.image(account, definition["Image"], role)
        _fetch(account, definition, folder, role)
    except (LookupError, ClientError, tarfile.TarError, EOFError, s3.Failed) as error:
        raise HostingError(str(error)) from error
    isolated, name = bool(facts.get("EnableNetworkIsolation")), f"{account.name}-{folder.name}"
    # Docker publishes no port of a network that has no way out: there its own address is asked.
    more = ["--network", docker.network(account, name, True)] if isolated else ["--publish", "127.0.0.1::8080"]
    more += ["--memory", f"{memory}m"] if memory else []
    container = docker.start(
        account, image, name, ["serve"], env=variables, mounts={"/opt/ml/model:ro": folder / "model"}, more=more,
        read=functools.partial(log, account, role, group, stream),
    )  # fmt: skip
    began(container)
    found = Host(container, _address(container, isolated), role, name if isolated else "")
    deadline = time.monotonic() + patience
    while not found.healthy():
        if container.code is not None or time.monotonic() > deadline or account.closing.is_set():
            container.kill()
            container.wait()
            found.stop()
            raise HostingError("did not pass the ping health check. Please check CloudWatch logs for this endpoint.")
        time.sleep(0.2)
    return found


def _address(container: docker.Container, isolated: bool) -> tuple[str, int]:
    for _ in range(100):
        if not isolated:
            where, _, port = container.address(8080).rpartition(":")
            return where or "127.0.0.1", int(port or 0)
        networks = docker.facts_of(container.name).get("NetworkSettings", {}).get("Networks", {})
        if address := next((str(entry["IPAddress"]) for entry in networks.values() if entry.get("IPAddress")), ""):
            return address, 8080
        if container.code is not None:
            break
        time.sleep(0.1)
    return "127.0.0.1", 0


def _fetch(account: Account, definition: Mapping[str, Any], folder: Path, role: str) -> None:
    """Unpack the archive of a model into its folder, with the rights of its role."""
    source = definition.get("ModelDataSource", {}).get("S3DataSource", {})
    uri = definition.get("ModelDataUrl") or source.get("S3Uri")
    if source.get("CompressionType") == "None":
        s3.download(account, role, source, folder / "model")
    if not uri or source.get("CompressionType") == "None":
        return
    try:
        account.client("s3", role).download_file(*s3.split(uri), str(folder / "model.tar.gz"))
    except ClientError as error:
        raise LookupError(
            f'Could not access model data at {uri}. Please ensure that the role "{role}" exists and that its trust '
            "relationship policy allows the action \"sts:AssumeRole\" for the service principal "
            f'"sagemaker.amazonaws.com". Also ensure that the role has "s3:GetObject" permissions and that the object '
            f"is located in {account.region}. ({error})"
        ) from error  # fmt: skip
    with tarfile.open(folder / "model.tar.gz") as archive:
        archive.extractall(folder / "model", filter="data")


def log(account: Account, role: str, group: str, stream: str, lines: Iterable[str]) -> None:
    """Hand a container's lines to CloudWatch as its role may; without the right to, they are nowhere, as on AWS."""
    logs = account.client("logs", role)

    def quietly(call: Callable[..., Any], **request: Any) -> bool:
        try:
            call(**request)
        except (ClientError, OSError) as error:
            return "ResourceAlreadyExists" in str(error)
        return True

    there = quietly(logs.create_log_group, logGroupName=group)
    there = quietly(logs.create_log_stream, logGroupName=group, logStreamName=stream) and there
    for line in lines:
        if there and not account.closing.is_set():
            event = {"timestamp": int(time.time() * 1000), "message": line.rstrip("\n") or " "}
            quietly(logs.put_log_events, logGroupName=group, logStreamName=stream, logEvents=[event])
