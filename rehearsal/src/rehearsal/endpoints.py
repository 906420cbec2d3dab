"""Endpoints: configurations, fleets of variants, updates in steps with their way back, requests and what they leave.

One container stands for all instances of a variant. The steps of an update follow each other after `STEP` seconds,
whatever the request's intervals say.
"""

from __future__ import annotations

import base64
import json
import random
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from rehearsal import docker, hosting, s3
from rehearsal.docker import Container
from rehearsal.hosting import Host, HostingError, forget, keep, listed, thing
from rehearsal.operations import CALLER, STARTED, Account, Answer, Request, control, no_gpu, now, operation, refuse

STEP = 1.0  # seconds between two steps of an update
REALTIME_SECONDS, ASYNC_SECONDS = 60, 900
WITH_ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"


@dataclass
class Variant:
    """What serves as a variant."""

    config: Mapping[str, Any]
    host: Host
    reviving: bool = False


@dataclass
class Fleet:
    """The variants of a configuration, of which an endpoint has two while it is updated."""

    config: str
    variants: dict[str, Variant] = field(default_factory=dict)

    def stop(self) -> None:
        """End its containers."""
        for variant in self.variants.values():
            variant.host.stop()


@dataclass
class Service:
    """An endpoint's fleets: the one that serves, and during an update the new one with its share of the requests."""

    old: Fleet
    new: Fleet | None = None
    share: float = 0.0
    slots: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(4))  # of async requests


SERVICES: dict[tuple[str, str], Service] = {}


@operation("sagemaker", "CreateEndpointConfig")
def create_config(account: Account, request: Request) -> Answer:
    """A configuration, of models that are there."""
    for variant in request["ProductionVariants"]:
        thing(account, "Model", variant["ModelName"])
    return keep(account, "EndpointConfig", request)


@operation("sagemaker", "DescribeEndpointConfig")
def describe_config(account: Account, request: Request) -> Answer:
    """As it was made."""
    return thing(account, "EndpointConfig", request["EndpointConfigName"])


@operation("sagemaker", "ListEndpointConfigs")
def list_configs(account: Account, request: Request) -> Answer:
    """A page."""
    return listed(account, "EndpointConfig", request)


@operation("sagemaker", "DeleteEndpointConfig")
def delete_config(account: Account, request: Request) -> Answer:
    """It is gone."""
    return forget(account, "EndpointConfig", request["EndpointConfigName"])


@operation("sagemaker", "DescribeEndpoint")
def describe(account: Account, request: Request) -> Answer:
    """As it is."""
    return {
        key: value for key, value in thing(account, "Endpoint", request["EndpointName"]).items() if value is not None
    }


@operation("sagemaker", "ListEndpoints")
def list_endpoints(account: Account, request: Request) -> Answer:
    """A page."""
    return listed(account, "Endpoint", request)


@operation("sagemaker", "CreateEndpoint")
def create(account: Account, request: Request) -> Answer:
    """An endpoint that comes into service when its containers are healthy."""
    name, config = request["EndpointName"], request["EndpointConfigName"]
    thing(account, "EndpointConfig", config)
    answer = keep(account, "Endpoint", request, EndpointStatus="Creating", LastModifiedTime=now())
    account.spawn(_create, account, name, config)
    return answer


def _create(account: Account, name: str, config: str) -> None:
    facts = account.things["Endpoint"][name]
    try:
        fleet = _fleet(account, name, config)
        SERVICES[account.name, name] = Service(fleet)
        _in_service(account, name, fleet)
    except HostingError as error:
        facts |= {"EndpointStatus": "Failed", "FailureReason": str(error), "LastModifiedTime": now()}
        account.note("failed", f"endpoint/{name}", str(error))


def _fleet(account: Account, name: str, config: str) -> Fleet:
    """Start the containers of a configuration; all or none."""
    fleet = Fleet(config)
    try:
        for variant in thing(account, "EndpointConfig", config)["ProductionVariants"]:
            fleet.variants[variant["VariantName"]] = Variant(variant, _host(account, name, variant))
    except HostingError:
        fleet.stop()
        raise
    return fleet


def _host(account: Account, name: str, variant: Mapping[str, Any]) -> Host:
    if reason := no_gpu(variant.get("InstanceType", "")):
        raise HostingError(reason)
    serverless = variant.get("ServerlessConfig")
    stream = f"{variant['VariantName']}/i-{secrets.token_hex(8)}"
    more: dict[str, Any] = {"patience": 180.0, "memory": serverless["MemorySizeInMB"]} if serverless else {}

    def began(container: Container) -> None:
        def die(_: str) -> None:
            while container.code is None and docker.run("kill", container.name).returncode:
                time.sleep(0.1)  # it is not there yet

        for hook in STARTED:
            hook(account, "endpoint", name, die)

    try:
        group = f"/aws/sagemaker/Endpoints/{name}"
        return hosting.host(account, variant["ModelName"], group, stream, began=began, **more)
    except HostingError as error:
        word = f"The primary container for production variant {variant['VariantName']} "
        raise HostingError(f"{word if str(error).startswith('did not') else ''}{error}") from error


def _in_service(account: Account, name: str, fleet: Fleet) -> None:
    """Say what serves."""
    config, variants = thing(account, "EndpointConfig", fleet.config), []
    for each in config["ProductionVariants"]:
        weight, count = each.get("InitialVariantWeight", 1.0), each.get("InitialInstanceCount", 1)
        model = thing(account, "Model", each["ModelName"])
        image = (model.get("PrimaryContainer") or model["Containers"][0]).get("Image", each["ModelName"])
        shown = {
            "VariantName": each["VariantName"],
            "CurrentWeight": weight,
            "DesiredWeight": weight,
            "DeployedImages": [{"SpecifiedImage": image, "ResolvedImage": image, "ResolutionTime": now()}],
        }
        if serverless := each.get("ServerlessConfig"):
            shown |= {"CurrentServerlessConfig": serverless, "DesiredServerlessConfig": serverless,
                      "CurrentInstanceCount": 0, "DesiredInstanceCount": 0}  # fmt: skip
        else:
            shown |= {"CurrentInstanceCount": count, "DesiredInstanceCount": count}
        variants.append(shown)
    facts = {"EndpointStatus": "InService", "EndpointConfigName": fleet.config, "ProductionVariants": variants,
             "LastModifiedTime": now(), "FailureReason": None, "PendingDeploymentSummary": None,
             "AsyncInferenceConfig": config.get("AsyncInferenceConfig"), "DataCaptureConfig": None}  # fmt: skip
    if (capture := config.get("DataCaptureConfig")) and capture.get("EnableCapture", True):
        facts["DataCaptureConfig"] = {
            "EnableCapture": True, "CaptureStatus": "Started", "DestinationS3Uri": capture["DestinationS3Uri"],
            "CurrentSamplingPercentage": capture["InitialSamplingPercentage"], "KmsKeyId": capture.get("KmsKeyId", ""),
        }  # fmt: skip
    account.things["Endpoint"][name] |= facts
    account.note("in service", f"endpoint/{name}", fleet.config)


def _changeable(account: Account, name: str) -> dict[str, Any]:
    facts = thing(account, "Endpoint", name)
    if facts["EndpointStatus"] in ("Creating", "Updating", "RollingBack", "Deleting", "SystemUpdating"):
        raise refuse("ValidationException", f'Cannot update in-progress endpoint "{facts["EndpointArn"]}".')
    return facts


@operation("sagemaker", "UpdateEndpoint")
def update(account: Account, request: Request) -> Answer:
    """Blue/green: a new fleet beside the old one, requests in steps, and back when a container or an alarm says so."""
    name, config = request["EndpointName"], request["EndpointConfigName"]
    with account.lock:
        facts = _changeable(account, name)
        if facts["EndpointStatus"] == "Failed" or (account.name, name) not in SERVICES:
            raise refuse("ValidationException", f'Cannot update endpoint "{facts["EndpointArn"]}" that is Failed.')
        thing(account, "EndpointConfig", config)
        pending = {"EndpointConfigName": config, "StartTime": now()}
        facts |= {"EndpointStatus": "Updating", "PendingDeploymentSummary": pending, "FailureReason": None}
    account.spawn(_update, account, name, config, request)
    return {"EndpointArn": facts["EndpointArn"]}


def _update(account: Account, name: str, config: str, request: Request) -> None:
    facts, service = account.things["Endpoint"][name], SERVICES[account.name, name]
    deployment = request.get("DeploymentConfig") or {}
    before_it = {item["VariantName"]: item for item in facts["ProductionVariants"]}
    try:
        service.new, service.share = _fleet(account, name, config), 0.0
        for share in _shares(deployment, sum(item["CurrentInstanceCount"] for item in before_it.values())):
            service.share = share
            account.note("step", f"endpoint/{name}", f"{share:.0%} of the requests to {config}")
            if share < 1 or deployment.get("AutoRollbackConfiguration"):
                time.sleep(STEP)
            _alarmed(account, deployment)
    except HostingError as error:
        facts["EndpointStatus"] = "RollingBack"
        new, service.new, service.share = service.new, None, 0.0
        if new:
            new.stop()
        facts |= {"EndpointStatus": "InService", "FailureReason": str(error), "PendingDeploymentSummary": None,
                  "LastModifiedTime": now()}  # fmt: skip
        account.note("failed", f"endpoint/{name}", str(error))
        return
    old, service.old, service.new = service.old, service.new or service.old, None
    _in_service(account, name, service.old)
    facts["LastDeploymentConfig"] = deployment or None
    if request.get("RetainAllVariantProperties"):
        for item in facts["ProductionVariants"]:
            kept = before_it.get(item["VariantName"], {})
            item |= {key: kept[key] for key in kept if key.endswith(("Weight", "InstanceCount"))}
    old.stop()


def _shares(deployment: Mapping[str, Any], instances: int) -> list[float]:
    """Which part of the requests the new fleet gets, step by step."""
    routing = deployment.get("BlueGreenUpdatePolicy", {}).get("TrafficRoutingConfiguration", {})
    size = routing.get("CanarySize") or routing.get("LinearStepSize") or {}
    part = size.get("Value", 100) / (100 if size.get("Type") != "INSTANCE_COUNT" else max(instances, 1))
    if rolling := deployment.get("RollingUpdatePolicy"):
        size = rolling["MaximumBatchSize"]
        part = size["Value"] / (100 if size["Type"] != "INSTANCE_COUNT" else max(instances, 1))
    if routing.get("Type") == "CANARY":
        return [min(part, 1.0), 1.0]
    steps, done = [], 0.0
    while done < 1:
        done = min(done + max(part, 0.01), 1.0)
        steps.append(done)
    return steps


def _alarmed(account: Account, deployment: Mapping[str, Any]) -> None:
    names = [item["AlarmName"] for item in deployment.get("AutoRollbackConfiguration", {}).get("Alarms", [])]
    if names:
        found = account.client("cloudwatch").describe_alarms(AlarmNames=names, StateValue="ALARM")["MetricAlarms"]
        if found:
            raise HostingError(f"Alarm(s) {', '.join(item['AlarmName'] for item in found)} in state ALARM")


@operation("sagemaker", "UpdateEndpointWeightsAndCapacities")
def weigh(account: Account, request: Request) -> Answer:
    """Other weights and counts for variants that are there."""
    with account.lock:
        facts = _changeable(account, request["EndpointName"])
        known = {item["VariantName"]: item for item in facts["ProductionVariants"]}
        asked = request["DesiredWeightsAndCapacities"]
        if strange := [item["VariantName"] for item in asked if item["VariantName"] not in known]:
            raise refuse("ValidationException", f"The variant name(s) {strange} is/are not present within endpoint "
                         f'configuration "{facts["EndpointConfigName"]}".')  # fmt: skip
        facts["EndpointStatus"] = "Updating"
        for item in asked:
            known[item["VariantName"]] |= {key: value for key, value in item.items() if key.startswith("Desired")}

    def settle() -> None:
        time.sleep(STEP / 2)
        for item in facts["ProductionVariants"]:
            item |= {"CurrentWeight": item["DesiredWeight"], "CurrentInstanceCount": item["DesiredInstanceCount"]}
        facts.update(EndpointStatus="InService", LastModifiedTime=now())

    account.spawn(settle)
    return {"EndpointArn": facts["EndpointArn"]}


@control("scale")
def scale(account: Account, request: Request) -> Answer:
    """Give a variant a number of instances, as its autoscaling would: {"endpoint": …, "variant": …, "count": 0}."""
    facts = thing(account, "Endpoint", request["endpoint"])
    wanted = request.get("variant")
    for item in facts["ProductionVariants"]:
        if wanted in (None, item["VariantName"]):
            item |= {"CurrentInstanceCount": request["count"], "DesiredInstanceCount": request["count"]}
    return {"variants": facts["ProductionVariants"]}


@operation("sagemaker", "DeleteEndpoint")
def delete(account: Account, request: Request) -> Answer:
    """The endpoint ends, and its scaling with it, by the rights of who asks."""
    name = request["EndpointName"]
    facts = thing(account, "Endpoint", name)
    if facts["EndpointStatus"] in ("Updating", "RollingBack"):
        raise refuse("ValidationException", f'Cannot delete in-progress endpoint "{facts["EndpointArn"]}".')
    _unscale(account, name, CALLER.get().principal)  # a request of its own, so the lock is free
    with account.lock:
        if facts["EndpointStatus"] == "Deleting":
            return {}
        facts["EndpointStatus"] = "Deleting"
    account.spawn(_delete, account, name)
    return {}


def _unscale(account: Account, name: str, caller: str) -> None:
    scaling = account.client("application-autoscaling", caller)
    for target in targets(account, name):
        keys = ("ServiceNamespace", "ResourceId", "ScalableDimension")
        try:
            scaling.deregister_scalable_target(**{key: target[key] for key in keys})
        except ClientError as error:
            raise refuse("ValidationException", f"Cannot delete the endpoint: {error}") from error


def targets(account: Account, name: str) -> list[dict[str, Any]]:
    """What application autoscaling knows of an endpoint."""
    found = account.client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    return [item for item in found["ScalableTargets"] if item["ResourceId"].startswith(f"endpoint/{name}/")]


def _delete(account: Account, name: str) -> None:
    if service := SERVICES.pop((account.name, name), None):
        service.old.stop()
        if service.new:
            service.new.stop()
    forget(account, "Endpoint", name)
    account.note("deleted", f"endpoint/{name}")


def _serving(account: Account, name: str) -> tuple[dict[str, Any], Service]:
    facts = account.things.get("Endpoint", {}).get(name)
    service = SERVICES.get((account.name, name))
    if facts is None or service is None or facts["EndpointStatus"] not in ("InService", "Updating", "RollingBack"):
        raise refuse("ValidationError", f"Endpoint {name} of account {account.number} not found.")
    return facts, service


def _chosen(facts: Mapping[str, Any], service: Service, target: str | None) -> Variant:
    """The variant that answers a request, by its name or by the weights."""
    fleet = service.new if service.new and random.random() < service.share else service.old  # noqa: S311
    if target is not None:
        if target not in fleet.variants:
            raise refuse("ValidationError", f"Variant {target} not found for endpoint {facts['EndpointName']}.")
        return fleet.variants[target]
    weights = {item["VariantName"]: item["CurrentWeight"] for item in facts["ProductionVariants"]}
    if fleet is service.new:
        weights = {key: each.config.get("InitialVariantWeight", 1.0) for key, each in fleet.variants.items()}
    names = [key for key in fleet.variants if weights.get(key)] or [*fleet.variants]
    return fleet.variants[random.choices(names, [weights.get(key) or 1.0 for key in names])[0]]  # noqa: S311


def _answer(
    account: Account, name: str, variant: Variant, body: bytes, headers: dict[str, str], seconds: float
) -> tuple[dict[str, str], bytes]:
    """A container's answer of 200; anything else is AWS's ModelError."""
    group = f"arn:aws:logs:{account.region}:{account.number}:log-group:/aws/sagemaker/Endpoints/{name}"
    started = time.monotonic()
    try:
        status, given, content = variant.host.ask("POST", "/invocations", body, headers, seconds)
    except TimeoutError:
        status, given, content = 0, {}, hosting.LATE.encode()
    except OSError as error:
        if variant.host.container.code is not None and not variant.reviving:
            variant.reviving = True
            account.spawn(_revive, account, name, variant)
        raise refuse("ServiceUnavailable", f"The endpoint {name} has no healthy container", 503) from error
    _measure(account, name, variant, status, time.monotonic() - started)
    if 200 <= status < 300:
        return given, content
    text, kind = content.decode(errors="replace"), "client" if 400 <= status < 500 else "server"
    said = f'Received {kind} error ({status}) from primary with message "{text}". See {group} for more information.'
    raise refuse("ModelError", said, 424, OriginalStatusCode=status, OriginalMessage=text, LogStreamArn=group)


def _revive(account: Account, name: str, variant: Variant) -> None:
    """Start a container that died anew, as AWS does."""
    account.note("died", f"endpoint/{name}", f"a container of {variant.config['VariantName']}, which is started anew")
    try:
        variant.host = _host(account, name, variant.config)
    except HostingError as error:
        account.note("failed", f"endpoint/{name}", str(error))
    variant.reviving = False


def _measure(account: Account, name: str, variant: Variant, status: int, seconds: float) -> None:
    """CloudWatch's metrics of a request."""
    own = [{"Name": "EndpointName", "Value": name}, {"Name": "VariantName", "Value": variant.config["VariantName"]}]
    values = {"Invocations": 1.0, "Invocation4XXErrors": float(400 <= status < 500),
              "Invocation5XXErrors": float(status >= 500 or not status), "ModelLatency": seconds * 1e6}  # fmt: skip
    account.client("cloudwatch").put_metric_data(
        Namespace="AWS/SageMaker",
        MetricData=[{"MetricName": key, "Dimensions": own, "Value": value} for key, value in values.items()],
    )


@operation("sagemaker-runtime", "InvokeEndpoint")
def invoke(account: Account, request: Request) -> Answer:
    """One request, answered within a minute."""
    name, body = request["EndpointName"], bytes(request.get("Body") or b"")
    facts, service = _serving(account, name)
    if facts.get("AsyncInferenceConfig"):
        raise refuse("ValidationError", f"Endpoint {name} is asynchronous: use InvokeEndpointAsync.")
    variant = _chosen(facts, service, request.get("TargetVariant"))
    most = (4 if variant.config.get("ServerlessConfig") else 6) * 2**20
    if len(body) > most:
        raise refuse("ValidationError", "1 validation error detected: Value at 'body' failed to satisfy constraint: "
                     f"Member must have length less than or equal to {most}")  # fmt: skip
    given, content = _answer(account, name, variant, body, _headers(request), REALTIME_SECONDS)
    kind = given.get("content-type", "application/octet-stream")
    if facts.get("DataCaptureConfig"):
        account.spawn(_capture, account, facts, variant, (request.get("ContentType", ""), body), (kind, content))
    answer = {"Body": content, "ContentType": kind, "InvokedProductionVariant": variant.config["VariantName"]}
    return answer | ({"CustomAttributes": given[WITH_ATTRIBUTES]} if WITH_ATTRIBUTES in given else {})


def _headers(request: Request) -> dict[str, str]:
    """What a container is told."""
    named = {"Content-Type": request.get("ContentType"), "Accept": request.get("Accept"),
             "X-Amzn-SageMaker-Custom-Attributes": request.get("CustomAttributes"),
             "X-Amzn-SageMaker-Inference-Id": request.get("InferenceId")}  # fmt: skip
    return {key: value for key, value in named.items() if value}


def _capture(
    account: Account, facts: Mapping[str, Any], variant: Variant, asked: tuple[str, bytes], answered: tuple[str, bytes]
) -> None:
    """Write a request and its answer where data capture wants them, by the rights of the model's role."""
    config = thing(account, "EndpointConfig", facts["EndpointConfigName"])["DataCaptureConfig"]
    if random.uniform(0, 100) > config["InitialSamplingPercentage"]:  # noqa: S311
        return
    readable = config.get("CaptureContentTypeHeader", {})
    modes = [option["CaptureMode"] for option in config["CaptureOptions"]]
    data = {}
    for mode, (kind, content) in {"Input": asked, "Output": answered}.items():
        plain = kind.partition(";")[0].strip()
        form = ("JSON" if plain in readable.get("JsonContentTypes", []) else
                "CSV" if plain in readable.get("CsvContentTypes", []) else "BASE64")  # fmt: skip
        text = base64.b64encode(content).decode() if form == "BASE64" else content.decode(errors="replace")
        if mode in modes or "InputAndOutput" in modes:
            data[f"endpoint{mode}"] = {
                "observedContentType": kind, "mode": mode.upper(), "data": text, "encoding": form,
            }  # fmt: skip
    at, number = now(), f"{secrets.token_hex(4)}-{secrets.token_hex(2)}"
    line = {"captureData": data, "eventVersion": "0",
            "eventMetadata": {"eventId": number, "inferenceTime": f"{at:%Y-%m-%dT%H:%M:%SZ}"}}  # fmt: skip
    bucket, prefix = s3.split(config["DestinationS3Uri"].rstrip("/"))
    key = f"{facts['EndpointName']}/{variant.config['VariantName']}/{at:%Y/%m/%d/%H/%M-%S}-000-{number}.jsonl"
    _write(account, variant.host.role, bucket, f"{prefix}/{key}" if prefix else key, json.dumps(line).encode() + b"\n",
           config.get("KmsKeyId"))  # fmt: skip


def _write(account: Account, role: str, bucket: str, key: str, body: bytes, kms: str | None) -> None:
    try:
        account.client("s3", role).put_object(Bucket=bucket, Key=key, Body=body, **s3.encryption(kms))
    except (ClientError, BotoCoreError) as error:
        account.note("refused", f"s3:PutObject {bucket}/{key}", str(error))


@operation("sagemaker-runtime", "InvokeEndpointAsync")
def invoke_later(account: Account, request: Request) -> Answer:
    """A request whose body lies in S3, and whose answer will."""
    name = request["EndpointName"]
    facts, service = _serving(account, name)
    if not facts.get("AsyncInferenceConfig"):
        raise refuse("ValidationError", f"Endpoint {name} is not asynchronous: use InvokeEndpoint.")
    output = facts["AsyncInferenceConfig"]["OutputConfig"]
    number, file = request.get("InferenceId") or secrets.token_hex(16), secrets.token_hex(16)
    good = f"{output['S3OutputPath'].rstrip('/')}/{request.get('S3OutputPathExtension', '').strip('/')}/{file}.out"
    good = good.replace(f"//{file}", f"/{file}")
    bad = f"{output.get('S3FailurePath', output['S3OutputPath']).rstrip('/')}/{file}-error.out"
    account.spawn(_later, account, request | {"InferenceId": number}, facts, service, good, bad)
    return {"InferenceId": number, "OutputLocation": good} | (
        {"FailureLocation": bad} if output.get("S3FailurePath") else {}
    )


def _later(account: Account, request: Request, facts: dict[str, Any], service: Service, good: str, bad: str) -> None:
    name, output = request["EndpointName"], facts["AsyncInferenceConfig"]["OutputConfig"]
    variant, place = _chosen(facts, service, None), request.get("InputLocation", "")
    seconds, reason = float(request.get("InvocationTimeoutSeconds") or ASYNC_SECONDS), ""
    with service.slots:
        if not any(item["CurrentInstanceCount"] for item in facts["ProductionVariants"]):
            time.sleep(STEP)  # until the alarm about a backlog without an instance has brought one
            scale(account, {"endpoint": name, "count": 1})
        try:
            body = bytes(request.get("Body") or b"")
            if place:
                bucket, key = s3.split(place)
                found = account.client("s3", variant.host.role).get_object(Bucket=bucket, Key=key)
                if found["ContentLength"] > 2**30:
                    raise refuse("ValidationError", f"{place} has {found['ContentLength']} bytes, more than 1 GB")
                body = found["Body"].read()
            content = _answer(account, name, variant, body, _headers(request), seconds)[1]
        except Exception as error:  # whatever it is, the caller finds it where failures lie
            reason = str(error)
            content = reason.encode()
    bucket, key = s3.split(bad if reason else good)
    if not reason or output.get("S3FailurePath"):
        _write(account, variant.host.role, bucket, key, content, output.get("KmsKeyId"))
    topic = output.get("NotificationConfig", {}).get("ErrorTopic" if reason else "SuccessTopic")
    if topic:
        message = {"awsRegion": account.region, "eventTime": f"{now():%Y-%m-%dT%H:%M:%SZ}",
                   "invocationStatus": "Failed" if reason else "Completed", "eventName": "InferenceResult",
                   "requestParameters": {"endpointName": name, "inputLocation": place},
                   "responseParameters": {"outputLocation": good}, "inferenceId": request["InferenceId"]}  # fmt: skip
        try:
            account.client("sns", variant.host.role).publish(TopicArn=topic, Message=json.dumps(message))
        except ClientError as error:
            account.note("refused", f"sns:Publish {topic}", str(error))
