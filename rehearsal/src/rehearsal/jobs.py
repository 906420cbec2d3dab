"""Training and Processing jobs in containers, by SageMaker's contract for them.

Training: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo.html
Processing: https://docs.aws.amazon.com/sagemaker/latest/dg/build-your-own-processing-container.html
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from rehearsal import docker, s3, wire
from rehearsal.operations import (
    STARTED,
    Account,
    Answer,
    Request,
    no_gpu,
    now,
    operation,
    page,
    refuse,
)
from rehearsal.s3 import Failed

ENDED = ("Completed", "Failed", "Stopped")
GRACE = 120  # seconds between SIGTERM and SIGKILL: AlgorithmStopping, documented at StopTrainingJob
PULSE = 0.25  # seconds between two looks at containers
SYNC = 1.0  # between two looks at folders that are kept in S3
RESTART = 2.0  # until spot capacity is there again
# Kind: of ARNs, and the list of summaries that List… answers with.
KINDS = {
    "TrainingJob": "training-job",
    "ProcessingJob": "processing-job",
    "TransformJob": "transform-job",
    "HyperParameterTuningJob": "hyper-parameter-tuning-job",
}
UNIQUE = "Job name must be unique within an AWS account and region, and a job with this name already exists"


class Ended(Exception):  # noqa: N818
    """A job ends before its work does: stopped, or over its time."""


@dataclass
class Job:
    """A job that was asked for: the request, what Describe says, and how to end it."""

    account: Account
    word: str  # TrainingJob
    request: Request
    facts: dict[str, Any]
    role: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    accident: str = ""  # `reclaim` or `die`
    over: threading.Event = field(default_factory=threading.Event)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.request[f"{self.word}Name"])

    @property
    def folder(self) -> Path:
        """Its own folder here."""
        return self.account.folder / KINDS[self.word] / self.name

    def say(self, status: str, message: str = "") -> None:
        """Go on to the next SecondaryStatus, of which only training jobs tell."""
        if self.word != "TrainingJob":
            return
        steps = self.facts.setdefault("SecondaryStatusTransitions", [])
        if steps:
            steps[-1].setdefault("EndTime", now())
        self.facts |= {"SecondaryStatus": status, "LastModifiedTime": now()}
        steps.append({"Status": status, "StartTime": now(), "StatusMessage": message})

    def end(self, status: str, **more: Any) -> None:
        """Be over."""
        self.facts |= {f"{self.word}Status": status, "LastModifiedTime": now()} | more
        if transitions := self.facts.get("SecondaryStatusTransitions"):
            transitions[-1].setdefault("EndTime", now())
        self.facts[f"{self.word.removesuffix('Job')}EndTime"] = now()
        self.account.note(status.lower(), f"{KINDS[self.word]}/{self.name}", more.get("FailureReason", ""))
        self.over.set()


JOBS: dict[tuple[str, str, str], Job] = {}  # by account, word and name


def create(account: Account, word: str, request: Request, work: Callable[[Job], None], **facts: Any) -> Job:
    """Take a job on, and begin.

    Raises:
        Refused: when there is one of that name.
    """
    name, kind = request[f"{word}Name"], KINDS[word]
    arn = account.arn(kind, name)
    with account.lock:
        known = account.things.setdefault(word, {})
        if name in known:
            raise refuse("ResourceInUse", f"{UNIQUE} ({arn})")
        described = {name: value for name, value in request.items() if name != "Tags"}
        known[name] = described | {f"{word}Arn": arn, f"{word}Status": "InProgress", "CreationTime": now(),
                                   "LastModifiedTime": now()} | facts  # fmt: skip
        account.tags[arn] = [*request.get("Tags", [])]
    role = request.get("RoleArn") or request.get("TrainingJobDefinition", {}).get("RoleArn", "")
    job = JOBS[account.name, word, name] = Job(account, word, request, known[name], role)
    job.say("Starting", "Starting the training job")
    account.spawn(_carry_out, job, work)
    return job


def _carry_out(job: Job, work: Callable[[Job], None]) -> None:
    try:
        job.folder.mkdir(parents=True)
        work(job)
        job.say("Completed", "Training job completed")
        job.end("Completed")
    except Ended as error:
        job.say(str(error), f"Training job {error}")
        job.end("Stopped")
    except Failed as error:
        job.say("Failed", "Training job failed")
        job.end("Failed", FailureReason=str(error)[:1024])
    except Exception as error:  # a fault of the rehearsal's own, which must not look like a job that runs for ever
        trace = traceback.format_exc()
        if not job.account.closing.is_set():
            job.account.note("broken", job.name, trace)
        job.say("Failed", "Training job failed")
        job.end("Failed", FailureReason=f"InternalServerError: the rehearsal failed: {error!r}")
    finally:
        if not job.account.closing.is_set():
            shutil.rmtree(job.folder, ignore_errors=True)


@dataclass
class Host:
    """One instance of a job: what its container sees."""

    name: str
    mounts: dict[str, Path]
    env: dict[str, str]
    more: tuple[str, ...] = ()


def cluster(
    job: Job, image: str, hosts: list[Host], spec: Mapping[str, Any], isolated: bool, words: tuple[str, ...] = (),
    seconds: float = 86400, beat: Callable[[], None] = lambda: None,
) -> tuple[str, list[int]]:  # fmt: skip
    """Run a container on each host until all ended, somebody stops the job, its time is over or an accident comes.

    Args:
        job: that they belong to.
        image: on this machine.
        hosts: with what each sees.
        spec: with ContainerEntrypoint and ContainerArguments.
        isolated: whether they reach nothing but each other.
        words: arguments where the spec has none.
        seconds: that they may take.
        beat: is called again and again meanwhile.

    Returns:
        `ended`, `Stopped`, `MaxRuntimeExceeded`, `reclaim` or `die`, and the exit codes.
    """
    account, tag = job.account, f"{job.account.name}-{job.name}"
    entry = spec.get("ContainerEntrypoint") or []
    arguments = spec.get("ContainerArguments") or (() if entry else words)
    net, outcome, deadline = docker.network(account, tag, isolated), "ended", time.monotonic() + seconds
    try:
        running = [
            docker.start(
                account, image, f"{tag}-{host.name}", arguments, entry, host.env, host.mounts,
                ("--hostname", host.name, "--network", net, "--network-alias", host.name, *host.more),
                logged(job, host.name),
            )
            for host in hosts
        ]  # fmt: skip
        for hook in STARTED:
            hook(account, KINDS[job.word], job.name, lambda what: setattr(job, "accident", what))
        ends, beaten = list[threading.Thread](), time.monotonic()
        while any(container.code is None for container in running):
            late = time.monotonic() > deadline
            if (job.stop.is_set() or late) and not ends:
                outcome = "Stopped" if job.stop.is_set() else "MaxRuntimeExceeded"
                ends = [account.spawn(container.stop, GRACE) for container in running]
            failed = (
                any(container.code for container in running) and not ends
            )  # one that fails takes the others with it
            if job.accident or failed:
                outcome = job.accident or outcome
                for container in running:
                    container.kill()
            if time.monotonic() - beaten > SYNC and job.accident != "reclaim":
                beat()
                beaten = time.monotonic()
            time.sleep(PULSE)
        codes = [container.wait() for container in running]
        for thread in ends:
            thread.join()
    finally:
        docker.run("network", "rm", net)
    if 125 in codes:  # Docker's own: it made no container
        raise RuntimeError(f"Docker could not run {image}; the job's log says why")
    return ("die" if job.accident == "die" else outcome), codes


def logged(job: Job, host: str) -> Callable[[Iterable[str]], None]:
    """A reader that writes a container's lines into a stream of CloudWatch's, and finds the metrics in them."""
    group, stream = f"/aws/sagemaker/{job.word}s", f"{job.name}/{host}-{int(time.time())}"
    logs, lines, searched = job.account.client("logs", job.role), queue.Queue[str | None](), _metrics(job)

    def refusable(call: Callable[..., Any], **request: Any) -> None:
        """A job runs on without a log, where its role may not write one."""
        with contextlib.suppress(ClientError, BotoCoreError):
            call(**request)

    def write() -> None:
        refusable(logs.create_log_group, logGroupName=group)
        refusable(logs.create_log_stream, logGroupName=group, logStreamName=stream)
        going = True
        while going:
            batch = [lines.get()]
            time.sleep(PULSE)
            with contextlib.suppress(queue.Empty):
                while len(batch) < 1000:
                    batch.append(lines.get_nowait())
            going = None not in batch
            at = int(time.time() * 1000)
            if events := [{"timestamp": at, "message": line} for line in batch if line]:
                refusable(logs.put_log_events, logGroupName=group, logStreamName=stream, logEvents=events)

    def read(content: Iterable[str]) -> None:
        writer = job.account.spawn(write)
        for line in content:
            lines.put(line.rstrip("\n") or " ")
            for name, pattern in searched:
                if found := pattern.search(line):
                    with contextlib.suppress(ValueError, IndexError):
                        job.metrics[name] = float(found[1])
        lines.put(None)
        writer.join()

    return read


def _metrics(job: Job) -> list[tuple[str, re.Pattern[str]]]:
    found = job.request.get("AlgorithmSpecification", {}).get("MetricDefinitions", [])
    return [(metric["Name"], re.compile(metric["Regex"])) for metric in found]


def train(job: Job) -> None:
    """A training job, from its start to its archives."""
    request, spec = job.request, job.request["AlgorithmSpecification"]
    machines, output, limit = request["ResourceConfig"], request["OutputDataConfig"], request["StoppingCondition"]
    groups = machines.get("InstanceGroups") or [{"InstanceGroupName": "homogeneousCluster"} | machines]
    for reason in (no_gpu(group["InstanceType"]) for group in groups):
        if reason:
            raise Failed(reason)
    image = _image(job, spec["TrainingImage"])
    began, spot, key = time.monotonic(), request.get("EnableManagedSpotTraining"), output.get("KmsKeyId")
    target = f"{output['S3OutputPath'].rstrip('/')}/{job.name}/output"
    seconds, wait = limit.get("MaxRuntimeInSeconds", 86400), limit.get("MaxWaitTimeInSeconds", 86400)
    while True:
        job.say("Downloading", "Downloading input data")
        hosts, mirrors = _training_hosts(job, groups)
        job.facts.setdefault("TrainingStartTime", now())
        job.say("Training", "Training image download completed. Training in progress.")
        outcome, codes = cluster(
            job, image, hosts, spec, bool(request.get("EnableNetworkIsolation")), ("train",),
            max(1, seconds - (time.monotonic() - began)), partial(s3.send, mirrors),
        )  # fmt: skip
        docker.give_back(job.folder, image)
        if outcome != "reclaim":
            break
        job.accident = ""
        job.say("Interrupted", "Spot capacity was reclaimed")
        shutil.rmtree(job.folder)
        if not spot:
            raise Failed("InternalServerError: the instance failed")
        if job.stop.wait(RESTART) or time.monotonic() - began > wait:
            raise Ended("Stopped" if job.stop.is_set() else "MaxWaitTimeExceeded")
        job.say("Restarting", "Spot capacity is there again")
    job.say("Uploading", "Uploading generated training model")
    took = round(time.monotonic() - began)
    job.facts |= {"TrainingTimeInSeconds": took, "BillableTimeInSeconds": took}
    job.facts["FinalMetricDataList"] = [
        {"MetricName": name, "Value": value, "Timestamp": now()} for name, value in job.metrics.items()
    ]
    s3.send(mirrors)
    made = [job.folder / host.name for host in hosts]
    if any(any((folder / "output/data").iterdir()) for folder in made):
        _kept(job, [folder / "output/data" for folder in made], f"{target}/output.tar.gz", key)
    failed = any(codes) and outcome in ("ended", "die")
    if not failed and any(any((folder / "model").iterdir()) for folder in made):
        plain = output.get("CompressionType") == "NONE"
        place = _kept(job, [folder / "model" for folder in made], f"{target}/model.tar.gz", key, not plain)
        job.facts["ModelArtifacts"] = {"S3ModelArtifacts": place}
    if failed:
        raise Failed(_reason([folder / "output/failure" for folder in made], codes))
    if outcome != "ended":
        raise Ended(outcome)
    if kept := machines.get("KeepAlivePeriodInSeconds"):
        job.facts["WarmPoolStatus"] = {"Status": "Available", "ResourceRetainedBillableTimeInSeconds": kept}


def _image(job: Job, uri: str) -> str:
    try:
        return docker.image(job.account, uri, job.role)
    except LookupError as error:
        raise Failed(str(error)) from error
    except ClientError as error:
        raise Failed(f"ClientError: {uri} cannot be taken: {error.response['Error']['Message']}") from error


def _kept(job: Job, folders: list[Path], uri: str, key: str | None, packed: bool = True) -> str:
    try:
        return s3.pack(job.account, job.role, folders, uri, key, packed)
    except Exception as error:  # boto3 wraps what AWS says of an upload
        raise Failed(f"ClientError: Artifact upload failed: {error}") from error


def _reason(files: list[Path], codes: list[int]) -> str:
    said = next((file.read_text(errors="replace")[:1024] for file in files if file.is_file()), "")
    code = next(code for code in codes if code)
    return f"AlgorithmError: {said}, exit code: {code}" if said else f"AlgorithmError: , exit code: {code}"


def _training_hosts(job: Job, groups: list[dict[str, Any]]) -> tuple[list[Host], list[s3.Mirror]]:
    """Folders and settings as the contract has them, with channels and checkpoints in them."""
    account, request = job.account, job.request
    count = sum(group["InstanceCount"] for group in groups)
    names, channels = [f"algo-{number + 1}" for number in range(count)], request.get("InputDataConfig", [])
    rest, kinds = iter(names), []
    for group in groups:
        members = [next(rest) for _ in range(group["InstanceCount"])]
        kinds.append({"instance_group_name": group["InstanceGroupName"], "instance_type": group["InstanceType"],
                      "hosts": members})  # fmt: skip
    mode = request["AlgorithmSpecification"].get("TrainingInputMode", "File")
    described = {}
    for channel in channels:
        entry = {"TrainingInputMode": channel.get("InputMode", mode), "ContentType": channel.get("ContentType"),
                 "S3DistributionType": channel["DataSource"]["S3DataSource"].get("S3DataDistributionType",
                                                                                 "FullyReplicated"),
                 "RecordWrapperType": channel.get("RecordWrapperType", "None")}  # fmt: skip
        described[channel["ChannelName"]] = {key: value for key, value in entry.items() if value is not None}
    hosts, mirrors = [], []
    for number, name in enumerate(names):
        root = job.folder / name
        for part in ("input/config", "input/data", "model", "output/data"):
            (root / part).mkdir(parents=True)
        mine = next(kind for kind in kinds if name in kind["hosts"])
        config = {
            "hyperparameters": request.get("HyperParameters", {}),
            "inputdataconfig": described,
            "resourceconfig": {
                "current_host": name, "current_instance_type": mine["instance_type"],
                "current_group_name": mine["instance_group_name"], "hosts": names, "instance_groups": kinds,
                "network_interface_name": "eth0",
            },
        }  # fmt: skip
        for part, content in config.items():
            (root / f"input/config/{part}.json").write_text(json.dumps(content))
        mounts = {f"/opt/ml/{part}": root / part for part in ("input", "model", "output")}
        for channel in channels:
            if described[channel["ChannelName"]]["TrainingInputMode"] == "Pipe":
                raise Failed("ClientError: the rehearsal plays no Pipe mode")
            s3.download(account, job.role, channel["DataSource"]["S3DataSource"],
                        root / "input/data" / channel["ChannelName"], (number, count),
                        channel.get("CompressionType", "None"))  # fmt: skip
            if (
                described[channel["ChannelName"]]["TrainingInputMode"] == "FastFile"
            ):  # what streams cannot be written to
                place = f"input/data/{channel['ChannelName']}"
                mounts[f"/opt/ml/{place}:ro"] = root / place
        for part, place, path in _mirrored(request, job.name):
            (root / part).mkdir(exist_ok=True)
            mounts[path] = root / part
            mirrors.append(s3.Mirror(account, job.role, root / part, place))
            if part == "checkpoints":
                mirrors[-1].restore()
        env = {"TRAINING_JOB_NAME": job.name, "TRAINING_JOB_ARN": job.facts["TrainingJobArn"],
               "AWS_REGION": account.region} | request.get("Environment", {})  # fmt: skip
        hosts.append(Host(name, mounts, env))
    return hosts, mirrors


def _mirrored(request: Request, name: str) -> list[tuple[str, str, str]]:
    """Folder here, place in S3 and path inside of what is kept in S3 while a training job runs."""
    found = []
    if config := request.get("CheckpointConfig"):
        found.append(("checkpoints", config["S3Uri"], config.get("LocalPath", "/opt/ml/checkpoints")))
    if config := request.get("TensorBoardOutputConfig"):
        place = f"{config['S3OutputPath'].rstrip('/')}/{name}/tensorboard-output"
        found.append(("tensorboard", place, config.get("LocalPath", "/opt/ml/output/tensorboard")))
    return found


def process(job: Job) -> None:
    """A Processing job: inputs, the container, outputs."""
    account, request, spec = job.account, job.request, job.request["AppSpecification"]
    machines = request["ProcessingResources"]["ClusterConfig"]
    if reason := no_gpu(machines["InstanceType"]):
        raise Failed(reason)
    image, count = _image(job, spec["ImageUri"]), machines["InstanceCount"]
    names, hosts, mirrors = [f"algo-{number + 1}" for number in range(count)], [], []
    given = request.get("ProcessingOutputConfig", {})
    for number, name in enumerate(names):
        root = job.folder / name
        (root / "config").mkdir(parents=True)
        (root / "output").mkdir()
        (root / "config/processingjobconfig.json").write_text(json.dumps(job.facts, default=str))
        (root / "config/resourceconfig.json").write_text(json.dumps({"current_host": name, "hosts": names}))
        mounts = {"/opt/ml/config": root / "config", "/opt/ml/output": root / "output"}
        for entry in request.get("ProcessingInputs", []):
            if "S3Input" not in entry:
                raise Failed(f"ClientError: the rehearsal plays no DatasetDefinition ({entry['InputName']})")
            folder, source = root / "in" / entry["InputName"], entry["S3Input"]
            s3.download(account, job.role, source, folder, (number, count), source.get("S3CompressionType", "None"))
            mounts[source["LocalPath"]] = folder
        for entry in given.get("Outputs", []):
            folder, place = root / "out" / entry["OutputName"], entry["S3Output"]
            folder.mkdir(parents=True)
            mounts[place["LocalPath"]] = folder
            mirror = s3.Mirror(account, job.role, folder, place["S3Uri"], given.get("KmsKeyId"))
            mirrors.append((place.get("S3UploadMode", "EndOfJob"), mirror))
        env = {"PROCESSING_JOB_NAME": job.name, "AWS_REGION": account.region} | request.get("Environment", {})
        hosts.append(Host(name, mounts, env))
    job.facts["ProcessingStartTime"] = now()
    outcome, codes = cluster(
        job, image, hosts, spec, bool(request.get("NetworkConfig", {}).get("EnableNetworkIsolation")),
        seconds=request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", 86400),
        beat=partial(s3.send, [mirror for mode, mirror in mirrors if mode == "Continuous"]),
    )  # fmt: skip
    docker.give_back(job.folder, image)
    said = [job.folder / name / "output/message" for name in names]
    if message := next((file.read_text(errors="replace")[:1024] for file in said if file.is_file()), ""):
        job.facts["ExitMessage"] = message
    if outcome == "MaxRuntimeExceeded":
        raise Failed("ClientError: Job exceeded its MaxRuntimeInSeconds")
    if any(codes) and outcome != "Stopped":
        code = next(code for code in codes if code)
        raise Failed(f"AlgorithmError: See job logs for more information, exit code: {code}")
    try:
        s3.send([mirror for _, mirror in mirrors])
    except Exception as error:  # boto3 wraps what AWS says of an upload
        raise Failed(f"ClientError: Failed to upload outputs: {error}") from error
    if outcome == "Stopped":
        raise Ended(outcome)


@operation("sagemaker", "CreateTrainingJob")
def create_training(account: Account, request: Request) -> Answer:
    """Start a training job."""
    job = create(account, "TrainingJob", request, train, SecondaryStatus="Starting")
    return {"TrainingJobArn": job.facts["TrainingJobArn"]}


@operation("sagemaker", "CreateProcessingJob")
def create_processing(account: Account, request: Request) -> Answer:
    """Start a Processing job."""
    return {"ProcessingJobArn": create(account, "ProcessingJob", request, process).facts["ProcessingJobArn"]}


@operation("sagemaker", "UpdateTrainingJob")
def update_training(account: Account, request: Request) -> Answer:
    """End a warm pool."""
    facts = found(account, "TrainingJob", request)
    if "ResourceConfig" in request and "WarmPoolStatus" in facts:
        facts["WarmPoolStatus"] = facts["WarmPoolStatus"] | {"Status": "Terminated"}
    return {"TrainingJobArn": facts["TrainingJobArn"]}


def found(account: Account, word: str, request: Request) -> dict[str, Any]:
    """What Describe says of the job that a request names.

    Raises:
        Refused: when there is none.
    """
    facts = account.things.get(word, {}).get(request[f"{word}Name"])
    if facts is None:
        text = f"Could not find requested job with name: {request[f'{word}Name']}"
        raise refuse("ValidationException", "Requested resource not found." if word == "TrainingJob" else text)
    return facts


def _describe(word: str) -> Callable[[Account, Request], Answer]:
    return lambda account, request: wire.only(("sagemaker", f"Describe{word}"), found(account, word, request))


def _stop(word: str) -> Callable[[Account, Request], Answer]:
    def stop(account: Account, request: Request) -> Answer:
        facts = found(account, word, request)
        if facts[f"{word}Status"] in ENDED:
            status = facts[f"{word}Status"]
            raise refuse("ValidationException", f"The request was rejected because the job is in status {status}.")
        job = JOBS[account.name, word, request[f"{word}Name"]]
        facts[f"{word}Status"] = "Stopping"
        job.say("Stopping", "Stopping the training job")
        job.stop.set()
        return {}

    return stop


def _list(word: str) -> Callable[[Account, Request], Answer]:
    def summaries(account: Account, request: Request) -> Answer:
        key = f"{word}Summaries"
        shape = wire.model("sagemaker").operation_model(f"List{word}s").output_shape.members[key].member
        chosen = [
            {name: value for name, value in facts.items() if name in shape.members}
            for facts in account.things.get(word, {}).values()
            if matches(facts, request, word)
        ]
        by = {"Name": f"{word}Name", "Status": f"{word}Status"}.get(request.get("SortBy", ""), "CreationTime")
        chosen.sort(key=lambda facts: facts[by], reverse=request.get("SortOrder", "Descending") == "Descending")
        return page(chosen, request, key)

    return summaries


def matches(facts: Mapping[str, Any], request: Request, word: str) -> bool:
    """Whether a thing is among those that a request for a list wants."""
    wanted = request.get("WarmPoolStatusEquals")
    times = {"CreationTimeAfter": 1, "CreationTimeBefore": -1, "LastModifiedTimeAfter": 1, "LastModifiedTimeBefore": -1}
    for name, sign in times.items():
        limit: datetime | None = request.get(name)
        if limit and sign * (facts[re.sub("After|Before", "", name)] - limit).total_seconds() < 0:
            return False
    return (
        request.get("NameContains", "").lower() in facts[f"{word}Name"].lower()
        and request.get("StatusEquals", facts[f"{word}Status"]) == facts[f"{word}Status"]
        and (not wanted or facts.get("WarmPoolStatus", {}).get("Status") == wanted)
    )


for _word in KINDS:
    operation("sagemaker", f"Describe{_word}")(_describe(_word))
    operation("sagemaker", f"Stop{_word}")(_stop(_word))
    operation("sagemaker", f"List{_word}s")(_list(_word))


@operation("sagemaker", "ListTags", "AddTags", "DeleteTags")
def tags(account: Account, request: Request) -> Answer:
    """Tags of what modules keep; moto has those of pipelines."""
    arn = request["ResourceArn"]
    name = "AddTags" if "Tags" in request else "DeleteTags" if "TagKeys" in request else "ListTags"
    if arn not in account.tags:
        return account.pass_on("sagemaker", name, request)
    gone = {*request.get("TagKeys", []), *(tag["Key"] for tag in request.get("Tags", []))}
    kept = [tag for tag in account.tags[arn] if tag["Key"] not in gone] + request.get("Tags", [])
    account.tags[arn] = kept
    return {"Tags": kept} if name != "DeleteTags" else {}
