"""The cloud verbs of a project that the SageMaker template made, one after the other, in a rehearsed account.

    python -m rehearsal --run sagemaker_template            # in the project's folder
    make rehearse DATA=<folder of images>                   # the same, from the project

Every verb runs as it is. What this sets, and says: instance types without a GPU, and short searches.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

FOLDER = Path(".cache") / "rehearsal"
# By variables of the environment, which the settings read: the only change to what the project would ask of AWS.
CHANGES = {
    "COMPUTE__INSTANCE_TYPE": "ml.m5.xlarge",
    "ENDPOINT__INSTANCE_TYPE": "ml.m5.xlarge",
    "ENDPOINT__INSTANCES": "2",
    "ENDPOINT__CAPTURE_PERCENT": "100",
    "TRAINING__EPOCHS": "6",
    "PIPELINE__MIN_ACCURACY": "0.5",
    "TUNING__MAX_JOBS": "2",
    "TUNING__MAX_PARALLEL_JOBS": "1",
    "MONITORING__MINIMUM": "10",
}
MADE = re.compile(
    r"sagemaker:(Create\w+|StartPipelineExecution)|scheduler:CreateSchedule|cloudwatch:Put(MetricAlarm|Dashboard)|"
    r"application-autoscaling:RegisterScalableTarget|cloudformation:(ExecuteChangeSet|DeleteStack)|ecr:PutImage"
)
PATIENCE = 300  # seconds for what a step waits for itself


class FailedError(Exception):
    """A step did not do what it should."""


@dataclass
class Row:
    """What became of a step."""

    title: str
    verbs: list[str] = field(default_factory=list)
    seconds: float = 0.0
    made: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wrong: str = ""


class Journey:
    """The project in this folder, on its way."""

    def __init__(self, data: str | None) -> None:
        self.data: dict[str, Any] = {"DATA": data} if data else {}
        self.owner = boto3.session.Session(os.environ["REHEARSAL_OWNER"], "rehearsal")
        self.rows, self.row, self.seen, self.facts = list[Row](), Row(""), 0, dict[str, str]()
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.log = (FOLDER / "journey.log").open("w", encoding="utf-8")
        self.there = set(re.findall(r"(?m)^  make (\S+)", self._make({}, "help")))
        self.images = self._project("from pipelines.local import data; print(data.SAMPLE)")
        self.name = self._project("from pipelines import project; print(project.name())")

    def _project(self, code: str) -> str:
        done = subprocess.run([".venv/bin/python", "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def _make(self, more: dict[str, str], verb: str, **variables: str) -> str:
        """Run a verb; its output.

        Raises:
            FailedError: when it says that it failed, with its last lines.
        """
        words = ["make", "--no-print-directory", verb, *(f"{key}={value}" for key, value in variables.items())]
        self.log.write(f"\n$ {' '.join(words)}\n")
        outer = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        done = subprocess.run(words, env=outer | CHANGES | more, text=True, errors="replace", stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        self.log.write(done.stdout)
        self.log.flush()
        if done.returncode:
            raise FailedError(f"`{' '.join(words)}` ended with {done.returncode}:\n" + done.stdout[-1500:].strip())
        return done.stdout

    def verb(self, verb: str, found: str = "", more: dict[str, str] | None = None, **variables: str) -> str:
        """Run a verb, which has to succeed, and find something in what it says."""
        self.row.verbs.append(verb)
        said = self._make(more or {}, verb, **variables)
        if not found:
            return said
        if match := re.search(found, said):
            return match[1] if match.groups() else match[0]
        raise FailedError(f"`make {verb}` did not say {found!r}:\n{said[-1500:].strip()}")

    def as_owner(self, verb: str, **variables: str) -> str:
        """Run a verb with all rights, as whoever sets an account up has them."""
        return self.verb(verb, more={"AWS_ACCESS_KEY_ID": os.environ["REHEARSAL_OWNER"]}, **variables)

    def ask(self, name: str, **request: Any) -> dict[str, Any]:
        """Have the rehearsal do something of its own."""
        asked = urllib.request.Request(f"{os.environ['REHEARSAL']}/_rehearsal/{name}", json.dumps(request).encode())
        with urllib.request.urlopen(asked) as answer:
            return dict(json.loads(answer.read()))

    def until(self, what: str, look: Callable[[], Any]) -> Any:
        """What a look gives, as soon as it gives something."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := look():
                return found
            time.sleep(1)
        raise FailedError(f"{what} did not come within {PATIENCE} s")

    def step(self, title: str, needs: str, work: Callable[[], object], always: bool = False) -> None:
        """One step, where the project has the verbs for it and none has failed before."""
        missing = [verb for verb in needs.split() if verb not in self.there]
        if missing or (not always and any(row.wrong for row in self.rows)):
            return
        self.row, began = Row(title), time.monotonic()
        print(f"{title:<52}", end="", flush=True)
        try:
            work()
        except (FailedError, OSError) as error:
            self.row.wrong = str(error)
        self.row.seconds = time.monotonic() - began
        for event in (new := self.ask("events", since=self.seen)["events"]):
            if event["kind"] == "executed" and MADE.fullmatch(event["what"]):
                self.row.made.append(event["what"].partition(":")[2].removeprefix("Create"))
            if event["kind"] in ("refused", "failed", "broken", "gap", "fault"):
                self.row.refused.append(f"{event['kind']}: {event['what']} {event['text']}".strip())
        self.seen += len(new)
        self.rows.append(self.row)
        made = {word: self.row.made.count(word) for word in self.row.made}
        shown = ", ".join(f"{count} x {word}" if count > 1 else word for word, count in made.items())
        print(f"{self.row.seconds:6.0f} s  {'FAILED' if self.row.wrong else shown}", flush=True)
        if self.row.wrong:
            print(self.row.wrong, flush=True)

    def left(self) -> list[str]:
        """What is in the account."""
        client, found = self.owner.client, list[str]()
        for service, call, key, name in (
            ("sagemaker", "list_endpoints", "Endpoints", "EndpointName"),
            ("sagemaker", "list_endpoint_configs", "EndpointConfigs", "EndpointConfigName"),
            ("sagemaker", "list_models", "Models", "ModelName"),
            ("sagemaker", "list_pipelines", "PipelineSummaries", "PipelineName"),
            ("sagemaker", "list_model_package_groups", "ModelPackageGroupSummaryList", "ModelPackageGroupName"),
            ("s3", "list_buckets", "Buckets", "Name"),
            ("ecr", "describe_repositories", "repositories", "repositoryName"),
            ("cloudformation", "describe_stacks", "Stacks", "StackName"),
            ("scheduler", "list_schedules", "Schedules", "Name"),
            ("cloudwatch", "describe_alarms", "MetricAlarms", "AlarmName"),
            ("cloudwatch", "list_dashboards", "DashboardEntries", "DashboardName"),
            ("iam", "list_roles", "Roles", "RoleName"),
        ):
            found += [f"{key} {item[name]}" for item in getattr(client(service), call)()[key]]
        for kind in ("training", "processing", "transform", "hyper_parameter_tuning"):
            word = "".join(part.capitalize() for part in f"{kind}_job".split("_"))
            running = getattr(client("sagemaker"), f"list_{kind}_jobs")(StatusEquals="InProgress")
            found += [f"{word} {job[f'{word}Name']}" for job in running[f"{word}Summaries"]]
        targets = client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
        return found + [f"scalable target {item['ResourceId']}" for item in targets["ScalableTargets"]]

    # What the steps do.

    def bootstrap(self) -> None:
        """The stack; then the person gets its two policies, as docs/aws.md says."""
        self.as_owner("bootstrap", YES="1")
        iam = self.owner.client("iam")
        for policy in iam.list_policies(Scope="Local")["Policies"]:
            if re.search("-(Verbs|Around)Policy-", policy["PolicyName"]):
                iam.attach_user_policy(UserName="person", PolicyArn=policy["Arn"])
        self.verb("doctor", "is there and up to date")

    def process(self) -> None:
        """Images become a packed data set."""
        self.facts["packed"] = self.verb("process", r"DATA=(s3://[^`\s]+)", WAIT="1", YES="1", **self.data)

    def train(self) -> None:
        """On two hosts, stopped in the middle, resumed and finished."""
        self.verb("train", r"costs at most \d", DATA=self.facts["packed"], INSTANCE_COUNT="2", PLAN="1")
        job = self.verb("train", r"started (\S+)\.", DATA=self.facts["packed"], INSTANCE_COUNT="2", YES="1")
        run = re.search(r"\d{8}-\d{6}-[0-9a-f]{4}", job)
        sagemaker, self.facts["run"] = self.owner.client("sagemaker"), run[0] if run else ""
        facts = sagemaker.describe_training_job(TrainingJobName=job)
        bucket, _, prefix = facts["CheckpointConfig"]["S3Uri"].removeprefix("s3://").partition("/")

        def saved() -> bool:
            listed = self.owner.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")
            status = sagemaker.describe_training_job(TrainingJobName=job)["TrainingJobStatus"]
            return bool(listed.get("Contents")) or status != "InProgress"

        self.until("a checkpoint", saved)
        sagemaker.stop_training_job(TrainingJobName=job)
        status = self.until("the job's end", lambda: (
            now := sagemaker.describe_training_job(TrainingJobName=job)["TrainingJobStatus"]
        ) in ("Stopped", "Failed", "Completed") and now)  # fmt: skip
        if status != "Stopped":
            raise FailedError(f"{job} was stopped and is {status}")
        self.verb("train", "done; fetch it", RUN=self.facts["run"], INSTANCE_COUNT="2", WAIT="1", YES="1")

    def look(self) -> None:
        """Its log, its run on this machine, what there is and what it costs."""
        if "evaluate" in self.there:
            self.verb("data", **self.data)  # what the run was tested on lies on this machine, too
        self.verb("logs", "epoch", ARGS="--once")
        self.verb("pull", self.facts["run"])
        self.verb("status", "in all at most")

    def tune(self) -> None:
        """A search."""
        self.verb("tune", "best: ", DATA=self.facts["packed"], WAIT="1", YES="1")

    def register(self) -> None:
        """The run on this machine is measured, registered and approved."""
        self.verb("evaluate", RUN=self.facts["run"])
        self.verb("register", "Pending|Approved", RUN=self.facts["run"])
        self.verb("approve", "Approved", YES="1")

    def pipeline(self) -> None:
        """From images to a package that waits for approval, which it gets."""
        self.verb("pipeline", "done; the model is registered", WAIT="1", YES="1", **self.data)
        self.verb("approve", "Approved", YES="1")

    def deploy(self) -> None:
        """The champion behind an endpoint, and a question."""
        self.verb("deploy", "is in service", PACKAGE="champion", YES="1")
        self.verb("invoke", re.escape(Path(self.image()).name), IMAGE=self.image())

    def image(self) -> str:
        """A picture of the data."""
        folder = Path(self.data.get("DATA", self.images))
        return str(next(path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".png", ".jpg", ".jpeg")))

    def update(self) -> None:
        """The same again, a part of the requests first."""
        self.verb("deploy", "is in service", {"ENDPOINT__ROLLOUT": "canary"}, RUN=self.facts["run"], YES="1")

    def second(self) -> None:
        """A second variant gets some of the requests, then more."""
        said = self.verb("deploy", r"VARIANT=(\S+) WEIGHT", PACKAGE="champion", WEIGHT="10", YES="1")
        self.verb("invoke", IMAGE=self.image(), VARIANT=said)
        self.verb("shift-traffic", VARIANT=said, WEIGHT="50")

    def asynchronous(self) -> None:
        """An endpoint that answers through S3; it deletes itself when its time has come."""
        name = f"{self.name}-later"
        self.verb("deploy", "is in service", PACKAGE="champion", TYPE="async", ENDPOINT=name, YES="1")
        self.verb("invoke", IMAGE=self.image(), ENDPOINT=name)
        fired = self.ask("fire", prefix=f"{name}-end")["fired"]
        if not fired or any("error" in item for item in fired):
            raise FailedError(f"the end of {name} did not take place: {fired}")
        free = ("EndpointConfigs", "Models")  # which it leaves, as they cost nothing
        self.until(f"the end of {name}", lambda: not [
            line for line in self.left() if name in line and not line.startswith(free)])  # fmt: skip

    def serverless(self) -> None:
        """An endpoint without instances, and its removal."""
        name = f"{self.name}-small"
        self.verb("deploy", "is in service", PACKAGE="champion", TYPE="serverless", ENDPOINT=name, YES="1",
                  ARGS="--set endpoint.capture_percent=0")  # fmt: skip
        self.verb("invoke", IMAGE=self.image(), ENDPOINT=name)
        self.verb("destroy", "nothing is left", ENDPOINT=name, YES="1")

    def batch(self) -> None:
        """All pictures of a class, or of the data."""
        folder = Path(self.data.get("DATA", self.images))
        first = next((path for path in sorted(folder.iterdir()) if path.is_dir()), folder)
        self.verb("batch", r" 0 of them without an answer", DATA=str(first), RUN=self.facts["run"], WAIT="1", YES="1")

    def monitor(self) -> None:
        """Captured requests are compared with what the artifact was made from, by the schedule that this makes."""
        self.verb("deploy", "is in service", RUN=self.facts["run"], YES="1")
        self.verb("monitor", YES="1")
        for _ in range(3):
            self.verb("invoke", IMAGE=self.image())
        fired = self.ask("fire", schedule=f"{self.name}-monitor")["fired"][0]
        if "error" in fired:
            raise FailedError(f"the schedule's job did not start: {fired['error']}")
        job = fired["answer"]["ProcessingJobArn"].rpartition("/")[2]
        describe = self.owner.client("sagemaker").describe_processing_job
        facts = self.until("the comparison's end", lambda: (
            found := describe(ProcessingJobName=job))["ProcessingJobStatus"] != "InProgress" and found)  # fmt: skip
        if facts["ProcessingJobStatus"] != "Completed":
            raise FailedError(f"{job} is {facts['ProcessingJobStatus']}: {facts.get('FailureReason')}")

    def run(self) -> None:
        """All steps that the project has verbs for."""
        steps: list[tuple[str, str, Callable[[], object]]] = [
            ("bootstrap, doctor", "bootstrap doctor", self.bootstrap),
            ("image-push", "image-push", lambda: self.verb("image-push")),
            ("process", "process", self.process),
            ("train on 2 hosts, stop it, train RUN=", "train", self.train),
            ("logs, pull, status", "logs pull status", self.look),
            ("tune", "tune", self.tune),
            ("evaluate, register, approve", "evaluate register approve", self.register),
            ("pipeline, approve", "pipeline approve", self.pipeline),
            ("deploy PACKAGE=champion, invoke", "deploy invoke approve", self.deploy),
            ("deploy as an update, a canary first", "deploy invoke approve", self.update),
            ("deploy WEIGHT=10, invoke VARIANT=, shift-traffic", "deploy invoke shift-traffic", self.second),
            ("deploy TYPE=async, invoke, its own end", "deploy invoke approve", self.asynchronous),
            ("deploy TYPE=serverless, invoke, destroy ENDPOINT=", "deploy invoke approve", self.serverless),
            ("batch", "batch", self.batch),
            ("monitor, invoke, its schedule", "monitor", self.monitor),
        ]
        for title, needs, work in steps:
            self.step(title, needs, work)
        self.step("destroy", "destroy", lambda: self.verb("destroy", "nothing is left|nothing of", YES="1"), True)
        self.step("destroy ALL=1", "destroy",
                  lambda: self.as_owner("destroy", ALL="1", CONFIRM=self.name, YES="1"), True)  # fmt: skip


def page(journey: Journey, left: list[str], seconds: float) -> str:
    """The journey as HTML."""
    cell = html.escape
    rows = "".join(
        f"<tr class={'wrong' if row.wrong else 'right'}><td>{cell(row.title)}<td>{row.seconds:.0f}&nbsp;s"
        f"<td>{cell(', '.join(row.made))}<td>{'<br>'.join(map(cell, dict.fromkeys(row.refused)))}"
        f"<td><pre>{cell(row.wrong)}</pre>"
        for row in journey.rows
    )
    changes = "".join(f"<li><code>{cell(name)}={cell(value)}</code>" for name, value in CHANGES.items())
    return (
        "<!doctype html><meta charset=utf-8><title>Rehearsal</title><style>body{font:16px sans-serif;margin:2em auto;"
        "max-width:70em}th{text-align:left}"
        "td{padding:.3em .8em;vertical-align:top;border-top:1px solid #ccc}.wrong{background:#fdd}"
        f"pre{{white-space:pre-wrap}}</style><h1>Rehearsal of {cell(journey.name)}</h1><p>Executed as requested in "
        f"containers on this machine in {seconds:.0f} s; never run on AWS. Prices are recorded ones. Left: "
        f"{cell(', '.join(left) or 'nothing')}."
        f"<p>Set for it:<ul>{changes}</ul><table><tr><th>step<th>time<th>made<th>refused, failed, not played<th>{rows}"
        "</table>"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--data", help="folder of images, a sub-folder a class (the sample digits)")
    parser.add_argument("--without", default="", help="verbs whose steps are left out, as in `tune batch`")
    options = parser.parse_args()
    if not Path("pipelines/__main__.py").is_file():
        print("this is no folder of a project that the template made", file=sys.stderr)
        return 2
    print("requests are executed in containers on this machine; nothing reaches AWS. Prices are recorded ones of "
          "us-east-1. Set for it:")  # fmt: skip
    print("".join(f"  {name}={value}\n" for name, value in CHANGES.items()), flush=True)
    began, journey = time.monotonic(), Journey(options.data)
    journey.there -= {*options.without.split()}
    journey.run()
    left = journey.left()
    wrong = [row for row in journey.rows if row.wrong]
    verbs = {verb for row in journey.rows for verb in row.verbs}
    (FOLDER / "journey.html").write_text(page(journey, left, time.monotonic() - began), encoding="utf-8")
    print(f"\nexecuted: {len(verbs)} verbs in {len(journey.rows) - len(wrong)} steps: {', '.join(sorted(verbs))}")
    for kind in ("refused", "failed", "gap", "broken"):
        found = [text for row in journey.rows for text in row.refused if text.startswith(kind)]
        print(f"{kind}: {len(found) or 'nothing'}" + "".join(f"\n  {text[:300]}" for text in sorted({*found})))
    print(f"left: {', '.join(left) or 'nothing'}")
    print(f"{time.monotonic() - began:.0f} s; {FOLDER / 'journey.html'}, log: {FOLDER / 'journey.log'}")
    return 1 if wrong or left else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
