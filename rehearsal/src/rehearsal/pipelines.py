"""Executions of pipelines: the definition's language is interpreted, and each step asks for what it says.

The language: https://aws-sagemaker-mlops.github.io/sagemaker-model-building-pipeline-definition-JSON-schema/
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from rehearsal import jobs, packages, s3, wire
from rehearsal.operations import Account, Answer, Request, missing, now, operation, page, refuse

RUNS = {"Training": "TrainingJob", "Processing": "ProcessingJob", "Transform": "TransformJob",
        "Tuning": "HyperParameterTuningJob"}  # fmt: skip
CASTS: dict[str, Callable[[Any], Any]] = {
    "Integer": int,
    "Float": float,
    "Boolean": lambda value: str(value).lower() == "true",
}
COMPARES = {
    "Equals": lambda left, right: left == right,
    "GreaterThan": lambda left, right: left > right,
    "GreaterThanOrEqualTo": lambda left, right: left >= right,
    "LessThan": lambda left, right: left < right,
    "LessThanOrEqualTo": lambda left, right: left <= right,
}
# What a policy of retries names, by how a job's FailureReason or AWS's refusal begins.
RETRIED = {
    "ThrottlingException": "Step.THROTTLING",
    "InternalFailure": "Step.SERVICE_FAULT",
    "ServiceUnavailable": "Step.SERVICE_FAULT",
    "ResourceLimitExceeded": "SageMaker.RESOURCE_LIMIT",
    "InternalServerError": "SageMaker.JOB_INTERNAL_ERROR",
    "CapacityError": "SageMaker.CAPACITY_ERROR",
}
# What Pipelines retries where no policy says it; https://docs.aws.amazon.com/sagemaker/latest/dg/pipelines-retry-policy.html
AUTOMATIC = {kind: {"MaxAttempts": 5} for kind in ("Step.THROTTLING", "Step.SERVICE_FAULT")}  # how often is not said
LONGEST_WAIT = 2.0  # seconds before a retry: the rehearsal does not wait as long as a policy says
# Not part of a cached step's key: https://docs.aws.amazon.com/sagemaker/latest/dg/pipelines-default-keys.html
UNKEYED = {"Tags", "ExperimentConfig", *(f"{word}Name" for word in RUNS.values())}


class StepFailed(Exception):  # noqa: N818
    """Why a step failed."""


@dataclass
class Execution:
    """One execution of a pipeline."""

    account: Account
    arn: str
    facts: dict[str, Any]
    role: str
    definition: dict[str, Any]
    given: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)  # as ListPipelineExecutionSteps has them
    made: dict[str, dict[str, Any]] = field(default_factory=dict)  # by step: what later ones may refer to
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    running: dict[str, jobs.Job] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def id(self) -> str:
        """The last part of the ARN."""
        return self.arn.rpartition("/")[2]

    def value(self, node: Any) -> Any:
        """A part of the definition, with what it refers to.

        Raises:
            StepFailed: when that is nowhere.
        """
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        if [*node] == ["Get"]:
            return self._got(node["Get"])
        if [*node] == ["Std:Join"]:
            return node["Std:Join"]["On"].join(str(self.value(part)) for part in node["Std:Join"]["Values"])
        if [*node] == ["Std:JsonGet"]:
            return self._from_file(node["Std:JsonGet"])
        return {key: self.value(item) for key, item in node.items()}

    def _got(self, path: str) -> Any:
        kind, _, rest = path.partition(".")
        if kind == "Parameters" and rest in self.given:
            return self.given[rest]
        pipeline = self.arn.partition("/execution/")[0]
        variables = {
            "PipelineExecutionId": self.id, "PipelineExecutionArn": self.arn, "PipelineArn": pipeline,
            "PipelineName": pipeline.rpartition("/")[2], "StartDateTime": f"{self.facts['CreationTime']:%FT%T.000Z}",
            "CurrentDateTime": f"{now():%FT%T.000Z}",
        }  # fmt: skip
        if kind == "Execution" and rest in variables:
            return variables[rest]
        step, _, rest = rest.partition(".")
        node: Any = self.made.get(step)
        for name, number, plain in re.findall(r"\['([^']+)'\]|\[(\d+)\]|([^.\[\]']+)", rest):
            if isinstance(node, list) and name:  # by what a list's items are called
                node = next((item for item in node if name in (v for k, v in item.items() if k.endswith("Name"))), None)
            elif isinstance(node, list):
                node = node[int(number or plain)] if int(number or plain) < len(node) else None
            else:
                node = node.get(name or plain) if isinstance(node, dict) else None
        if node is None:
            raise StepFailed(f"ClientError: {path} is not there")
        return node

    def _from_file(self, asked: dict[str, Any]) -> Any:
        """A value of a property file, which a Processing step wrote."""
        if "S3Uri" in asked:
            uri = self.value(asked["S3Uri"])
        else:
            _, step, _, name = asked["PropertyFile"]["Get"].split(".")
            file = next((file for file in self.files.get(step, []) if file["PropertyFileName"] == name), None)
            if file is None:
                raise StepFailed(f"ClientError: the step {step} has no property file {name}")
            outputs = self.made[step]["ProcessingOutputConfig"]["Outputs"]
            place = next(output for output in outputs if output["OutputName"] == file["OutputName"])
            uri = f"{place['S3Output']['S3Uri'].rstrip('/')}/{file['FilePath']}"
        bucket, key = s3.split(uri)
        try:
            node = json.loads(self.account.client("s3", self.role).get_object(Bucket=bucket, Key=key)["Body"].read())
            for name, plain in re.findall(r"\[['\"]?([^\]'\"]+)['\"]?\]|([^.\[\]]+)", asked["Path"].removeprefix("$")):
                node = node[int(name or plain)] if isinstance(node, list) else node[name or plain]
        except (ClientError, ValueError, KeyError, IndexError, TypeError) as error:
            raise StepFailed(f"ClientError: {asked['Path']} cannot be read from {uri}: {error!r}") from error
        if isinstance(node, dict | list):
            raise StepFailed(f"ClientError: {asked['Path']} of {uri} is no value that JsonGet takes, but a structure")
        return node

    def run(self) -> None:
        """Do each step when those that it needs are done, several at a time."""
        waiting, threads = [*self.definition["Steps"]], dict[str, threading.Thread]()
        most = self.facts.get("ParallelismConfiguration", {}).get("MaxParallelExecutionSteps", 50)
        while True:
            status = {entry["StepName"]: entry["StepStatus"] for entry in self.steps}
            failed = self.stop.is_set() or any(word in ("Failed", "Stopped") for word in status.values())
            for step in [*waiting]:
                ready = all(status.get(name) == "Succeeded" for name in needs(step))
                if ready and not failed and sum(thread.is_alive() for thread in threads.values()) < most:
                    waiting.remove(step)
                    entry = {"StepName": step["Name"], "StepStatus": "Executing", "StartTime": now(), "Metadata": {}}
                    self.steps.append(entry)
                    threads[step["Name"]] = self.account.spawn(self._step, step, entry, waiting)
            if not any(thread.is_alive() for thread in threads.values()):
                begun = {entry["StepName"]: entry["StepStatus"] for entry in self.steps}
                if begun == status and (failed or all(needs(step) - {*begun} for step in waiting)):
                    break
            time.sleep(jobs.PULSE)
        words = [entry["StepStatus"] for entry in self.steps]
        end = "Failed" if "Failed" in words else "Stopped" if self.stop.is_set() else "Succeeded"
        if end == "Failed":
            self.facts["FailureReason"] = "Step failure: One or multiple steps failed."
        self.facts |= {"PipelineExecutionStatus": end, "LastModifiedTime": now()}
        self.account.note(end.lower(), f"pipeline-execution/{self.id}", self.facts.get("FailureReason", ""))

    def _step(self, step: dict[str, Any], entry: dict[str, Any], waiting: list[dict[str, Any]]) -> None:
        try:
            if step["Type"] == "Condition":
                outcome = all(self._holds(condition) for condition in step["Arguments"]["Conditions"])
                entry["Metadata"] = {"Condition": {"Outcome": str(outcome)}}
                waiting += step["Arguments"]["IfSteps" if outcome else "ElseSteps"]
            else:
                self._done(step, entry)
            entry["StepStatus"] = "Succeeded"
        except StepFailed as error:
            entry |= {"StepStatus": "Stopped" if self.stop.is_set() else "Failed", "FailureReason": str(error)}
        except Exception as error:  # a definition that the language does not have, or a fault of the rehearsal's own
            self.account.note("broken", step["Name"], traceback.format_exc())
            entry |= {"StepStatus": "Failed", "FailureReason": f"ClientError: {error!r}"}
        entry["EndTime"] = now()

    def _holds(self, condition: dict[str, Any]) -> bool:
        kind = condition["Type"]
        if kind == "Not":
            return not self._holds(condition["Expression"])
        if kind == "Or":
            return any(self._holds(part) for part in condition["Conditions"])
        if kind == "In":
            return bool(self.value(condition["QueryValue"]) in self.value(condition["Values"]))
        return bool(COMPARES[kind](self.value(condition["LeftValue"]), self.value(condition["RightValue"])))

    def _done(self, step: dict[str, Any], entry: dict[str, Any]) -> None:
        """Carry a step out, again where its policies say so, or take what an earlier one did."""
        arguments, policies = self.value(step["Arguments"]), step.get("RetryPolicies", [])
        if step["Type"] == "Fail":
            entry["Metadata"] = {"Fail": {"ErrorMessage": arguments["ErrorMessage"]}}
            raise StepFailed(arguments["ErrorMessage"])
        known = self._cached(step, arguments)
        if known:
            entry["CacheHitResult"] = {"SourcePipelineExecutionArn": known["execution"]}
            entry["Metadata"], self.made[step["Name"]] = known["metadata"], known["made"]
        attempt = 0
        while not known:
            attempt += 1
            entry["AttemptCount"] = attempt
            try:
                self._once(step, arguments, entry)
                break
            except StepFailed as error:
                kind = RETRIED.get(re.split(r"\W", str(error))[0], "")
                policy = next((policy for policy in policies if kind in policy["ExceptionType"]), AUTOMATIC.get(kind))
                if policy is None or attempt > policy.get("MaxAttempts", 0) or self.stop.is_set():
                    raise
                self.stop.wait(min(policy.get("IntervalSeconds", 1), LONGEST_WAIT))
        self.files[step["Name"]] = step.get("PropertyFiles", [])
        kept = {"execution": self.arn, "metadata": entry["Metadata"], "made": self.made[step["Name"]], "at": now()}
        if not known:
            self._cache()[_key(step, arguments)] = kept

    def _cache(self) -> dict[str, Any]:
        caches = self.account.things.setdefault("step-cache", {})
        return caches.setdefault(self.arn.partition("/execution/")[0], {})

    def _cached(self, step: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any] | None:
        config, known = step.get("CacheConfig", {}), self._cache().get(_key(step, arguments))
        if not config.get("Enabled") or known is None or now() - known["at"] > duration(config.get("ExpireAfter", "")):
            return None
        return dict(known)

    def _once(self, step: dict[str, Any], arguments: dict[str, Any], entry: dict[str, Any]) -> None:
        sagemaker, kind = self.account.client("sagemaker", self.role), step["Type"]
        try:
            if kind in RUNS:
                word = RUNS[kind]
                prefix = arguments.get(f"{word}Name") or f"pipelines-{step['Name']}"
                name = f"{prefix}-{self.id}-{secrets.token_hex(5)}"[-63 if word != RUNS["Tuning"] else -32 :].lstrip(
                    "-"
                )
                made = sagemaker._make_api_call(f"Create{word}", arguments | {f"{word}Name": name})
                entry["Metadata"] = {word.replace("HyperParameter", ""): {"Arn": made[f"{word}Arn"]}}
                self._await(word, name, step["Name"])
            elif kind == "Model":
                name = arguments.get("ModelName") or f"pipelines-{self.id}-{step['Name']}-{secrets.token_hex(5)}"
                made = sagemaker.create_model(**arguments | {"ModelName": name})
                entry["Metadata"] = {"Model": {"Arn": made["ModelArn"]}}
                self.made[step["Name"]] = {"ModelName": name, "ModelArn": made["ModelArn"]}
            elif kind == "RegisterModel":
                group = {"ModelPackageGroupName": arguments.get("ModelPackageGroupName", "")}
                if group["ModelPackageGroupName"] not in self.account.things.get(packages.GROUP, {}):
                    sagemaker.create_model_package_group(**group)
                made = sagemaker.create_model_package(**arguments)
                entry["Metadata"] = {"RegisterModel": {"Arn": made["ModelPackageArn"]}}
                self.made[step["Name"]] = arguments | {"ModelPackageArn": made["ModelPackageArn"]}
            else:
                raise StepFailed(f"ClientError: the rehearsal plays no step of type {kind}")
        except ClientError as error:
            said = error.response["Error"]
            raise StepFailed(f"{said['Code']}: {said['Message']}") from error
        except BotoCoreError as error:
            raise StepFailed(f"ValidationException: {error}") from error

    def _await(self, word: str, name: str, step: str) -> None:
        job = jobs.JOBS[self.account.name, word, name]
        self.running[step] = job
        while not job.over.wait(jobs.PULSE):
            if self.stop.is_set():
                job.stop.set()
        self.made[step] = job.facts
        if job.facts[f"{word}Status"] != "Completed":
            reason = job.facts.get("FailureReason", f"the job is {job.facts[f'{word}Status']}")
            raise StepFailed(reason)


def needs(step: dict[str, Any]) -> set[str]:
    """Names of the steps that one waits for: those it names, and those it refers to; not for its branches' sake."""
    arguments = {key: value for key, value in step.get("Arguments", {}).items() if key not in ("IfSteps", "ElseSteps")}
    return {*step.get("DependsOn", []), *_named(arguments)}


def _named(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(path := node.get("Get"), str) and path.startswith("Steps."):
            yield path.split(".")[1]
        for item in node.values():
            yield from _named(item)
    elif isinstance(node, list):
        for item in node:
            yield from _named(item)


def _key(step: dict[str, Any], arguments: dict[str, Any]) -> str:
    kept = {key: value for key, value in arguments.items() if key not in UNKEYED}
    return json.dumps([step["Name"], step["Type"], kept], sort_keys=True, default=str)


def duration(text: str) -> timedelta:
    """A length of time as ISO 8601 has it, and the SDK: `P30D`, `PT1H`, `30d`."""
    units = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
    parts = re.findall(r"(?i)(\d+)([wdhms])", text)
    return sum((timedelta(**{units[unit.lower()]: int(count)}) for count, unit in parts), timedelta())


EXECUTIONS: dict[tuple[str, str], Execution] = {}  # by account and ARN


def _execution(account: Account, request: Request) -> Execution:
    found = EXECUTIONS.get((account.name, request["PipelineExecutionArn"]))
    if found is None:
        raise missing(f"the pipeline execution {request['PipelineExecutionArn']}")
    return found


@operation("sagemaker", "CreatePipeline")
def create(account: Account, request: Request) -> Answer:
    """Moto 5.2.5 takes a name twice, and keeps what it had."""
    name = request["PipelineName"]
    try:
        account.pass_on("sagemaker", "DescribePipeline", {"PipelineName": name})
    except ClientError:
        return account.pass_on("sagemaker", "CreatePipeline", request)
    text = "Pipeline names must be unique within an AWS account and region. Pipeline with name"
    raise refuse("ValidationException", f"{text} ({name}) already exists.")


@operation("sagemaker", "StartPipelineExecution")
def start(account: Account, request: Request) -> Answer:
    """Begin; the same token again names the execution that it began."""
    pipeline = account.pass_on("sagemaker", "DescribePipeline", {"PipelineName": request["PipelineName"]})
    tokens = account.things.setdefault("execution-token", {})
    token = f"{request['PipelineName']}/{request.get('ClientRequestToken', secrets.token_hex(8))}"
    with account.lock:
        if token in tokens:
            return {"PipelineExecutionArn": tokens[token]["arn"]}
        execution_id = secrets.token_hex(6)
        arn = f"{pipeline['PipelineArn']}/execution/{execution_id}"
        tokens[token] = {"arn": arn}
    definition = json.loads(pipeline["PipelineDefinition"])
    given = {item["Name"]: item["Value"] for item in request.get("PipelineParameters", [])}
    values = {}
    for parameter in definition.get("Parameters", []):
        name = parameter["Name"]
        value = given.get(name, parameter.get("DefaultValue"))
        values[name] = CASTS.get(parameter["Type"], str)(value) if value is not None else None
    if strange := {*given} - {*values}:
        raise missing(f"the pipeline parameter {', '.join(sorted(strange))}")
    facts = {"PipelineArn": pipeline["PipelineArn"], "PipelineExecutionArn": arn, "CreationTime": now(),
             "PipelineExecutionStatus": "Executing", "LastModifiedTime": now(), "StartTime": now(),
             "PipelineExecutionDisplayName": request.get("PipelineExecutionDisplayName"),
             "PipelineExecutionDescription": request.get("PipelineExecutionDescription"),
             "ParallelismConfiguration": request.get("ParallelismConfiguration", {})}  # fmt: skip
    execution = Execution(account, arn, {key: value for key, value in facts.items() if value}, pipeline["RoleArn"],
                          definition, values)  # fmt: skip
    EXECUTIONS[account.name, arn] = execution
    account.spawn(execution.run)
    return {"PipelineExecutionArn": arn}


@operation("sagemaker", "DescribePipelineExecution")
def describe(account: Account, request: Request) -> Answer:
    """How far it is."""
    return wire.only(("sagemaker", "DescribePipelineExecution"), _execution(account, request).facts)


@operation("sagemaker", "DescribePipelineDefinitionForExecution")
def definition(account: Account, request: Request) -> Answer:
    """What it was started with."""
    found = _execution(account, request)
    return {"PipelineDefinition": json.dumps(found.definition), "CreationTime": found.facts["CreationTime"]}


@operation("sagemaker", "ListPipelineParametersForExecution")
def parameters(account: Account, request: Request) -> Answer:
    """The parameters' values."""
    given = [{"Name": name, "Value": str(value)} for name, value in _execution(account, request).given.items()]
    return page(given, request, "PipelineParameters")


@operation("sagemaker", "ListPipelineExecutionSteps")
def steps(account: Account, request: Request) -> Answer:
    """Its steps, the newest first unless the request says otherwise."""
    listed = [dict(entry) for entry in _execution(account, request).steps]
    return page(listed if request.get("SortOrder") == "Ascending" else listed[::-1], request, "PipelineExecutionSteps")


@operation("sagemaker", "ListPipelineExecutions")
def executions(account: Account, request: Request) -> Answer:
    """The executions of a pipeline."""
    arn = account.pass_on("sagemaker", "DescribePipeline", {"PipelineName": request["PipelineName"]})["PipelineArn"]
    shown = ("PipelineExecutionArn", "StartTime", "PipelineExecutionStatus", "PipelineExecutionDisplayName")
    mine = [found for (name, _), found in EXECUTIONS.items() if name == account.name]
    listed = [
        {key: found.facts[key] for key in shown if key in found.facts}
        for found in mine
        if found.facts["PipelineArn"] == arn
    ]
    return page(
        listed if request.get("SortOrder") == "Ascending" else listed[::-1], request, "PipelineExecutionSummaries"
    )


@operation("sagemaker", "StopPipelineExecution")
def stop(account: Account, request: Request) -> Answer:
    """End it and the jobs of its steps."""
    found = _execution(account, request)
    if found.facts["PipelineExecutionStatus"] == "Executing":
        found.facts["PipelineExecutionStatus"] = "Stopping"
        found.stop.set()
    return {"PipelineExecutionArn": found.arn}
