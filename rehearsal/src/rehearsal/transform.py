"""Batch transform: a model's container is asked for each object, or each record of it.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-batch-code.html
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from botocore.exceptions import ClientError

from rehearsal import hosting, jobs, s3
from rehearsal.jobs import Ended, Job
from rehearsal.operations import Account, Answer, Request, no_gpu, now, operation
from rehearsal.s3 import Failed

MB = 1 << 20


def transform(job: Job) -> None:
    """Serve the model, ask it, write the answers."""
    account, request = job.account, job.request
    if reason := no_gpu(request["TransformResources"]["InstanceType"]):
        raise Failed(reason)
    if request.get("DataProcessing"):
        raise Failed("ClientError: the rehearsal plays no DataProcessing of a transform job")
    source, limit = request["TransformInput"]["DataSource"]["S3DataSource"], request.get("MaxPayloadInMB", 6)
    env = {"SAGEMAKER_BATCH": "true", "SAGEMAKER_MAX_PAYLOAD_IN_MB": str(limit),
           "SAGEMAKER_BATCH_STRATEGY": request.get("BatchStrategy", "MultiRecord"),
           "SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": str(request.get("MaxConcurrentTransforms", 1))}  # fmt: skip
    role = hosting.thing(account, "Model", request["ModelName"])["ExecutionRoleArn"]
    job.role = role
    found = s3.objects(account, role, source)
    job.facts["TransformStartTime"] = now()
    stream = f"{job.name}/i-{job.account.name}-{int(time.time())}"
    try:
        host = hosting.host(account, request["ModelName"], "/aws/sagemaker/TransformJobs", stream,
                            env | request.get("Environment", {}))  # fmt: skip
    except hosting.HostingError as error:
        raise Failed(f"ClientError: {error}") from error
    bad = list[str]()

    def one(place: tuple[str, str, str]) -> None:
        if job.stop.is_set():
            return
        try:
            _answer(job, host, place, limit * MB, role)
        except (Failed, ClientError, OSError) as error:
            bad.append(f"{place[2]}: {error}")

    try:
        with ThreadPoolExecutor(request.get("MaxConcurrentTransforms") or 1) as pool:
            list(pool.map(one, found))
    finally:
        host.stop()
    if job.stop.is_set():
        raise Ended("Stopped")
    if bad:
        account.note("transform", job.name, "; ".join(bad))
        raise Failed(f"ClientError: See job logs for more information ({len(bad)} of {len(found)} objects: {bad[0]})")


def _answer(job: Job, host: hosting.Host, place: tuple[str, str, str], limit: int, role: str) -> None:
    request, (bucket, key, name) = job.request, place
    given, output = request["TransformInput"], request["TransformOutput"]
    client, model = job.account.client("s3", role), request.get("ModelClientConfig", {})
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    split, several = given.get("SplitType", "None"), request.get("BatchStrategy", "MultiRecord") == "MultiRecord"
    if split not in ("None", "Line"):
        raise Failed(f"the rehearsal plays no SplitType {split}")
    answers = []
    for part in [body] if split == "None" else _records(body, limit if several else 0):
        if len(part) > limit:
            raise Failed(f"{len(part)} bytes are more than MaxPayloadInMB")
        headers = {"Content-Type": given.get("ContentType", "application/octet-stream"),
                   "Accept": output.get("Accept", "*/*")}  # fmt: skip
        for attempt in range(model.get("InvocationsMaxRetries", 3) + 1):
            status, _, answer = host.ask("POST", "/invocations", part, headers,
                                         model.get("InvocationsTimeoutInSeconds", 600))  # fmt: skip
            if status < 500 or attempt == model.get("InvocationsMaxRetries", 3):
                break
        if status >= 300:
            raise Failed(f"the model answered {status}: {answer[:200].decode(errors='replace')}")
        answers.append(answer)
    joined = b"".join(answer + (b"\n" if output.get("AssembleWith") == "Line" else b"") for answer in answers)
    to, prefix = s3.split(output["S3OutputPath"].rstrip("/"))
    path = f"{prefix}/{name}.out" if prefix else f"{name}.out"
    client.put_object(Bucket=to, Key=path, Body=joined, **s3.encryption(output.get("KmsKeyId")))


def _records(body: bytes, limit: int) -> list[bytes]:
    """Lines, as many together as a request may have; 0: each alone."""
    parts = list[bytes]()
    for line in body.splitlines(keepends=True):
        if parts and len(parts[-1]) + len(line) <= limit:
            parts[-1] += line
        else:
            parts.append(line)
    return parts


@operation("sagemaker", "CreateTransformJob")
def create(account: Account, request: Request) -> Answer:
    """Start a transform job."""
    hosting.thing(account, "Model", request["ModelName"])
    facts: dict[str, Any] = {}
    return {
        "TransformJobArn": jobs.create(account, "TransformJob", request, transform, **facts).facts["TransformJobArn"]
    }
