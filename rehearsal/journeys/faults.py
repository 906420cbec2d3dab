"""What becomes of the verbs of a project that the SageMaker template made, when AWS has accidents.

    python -m rehearsal --run faults [train|deploy|pipeline …]          # in the project's folder
    python -m rehearsal --run faults --quick [--artifact model.tar.gz] [train|deploy|pipeline …]

Each case plays an accident, runs a verb, which recovers or says in one sentence what is there, and then runs the verb
without it, which ends right. At the end nothing is left that bills. `--quick` asks for machines with a GPU, which the
rehearsal does not play: jobs and endpoints are made and end at once, and no container runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import boto3

TYPES = ("COMPUTE__INSTANCE_TYPE", "COMPUTE__PROCESS_INSTANCE_TYPE", "ENDPOINT__INSTANCE_TYPE")
CHANGES = dict.fromkeys(TYPES, "ml.m5.xlarge") | {"TRAINING__EPOCHS": "2"}
# Verb, faults, whether it recovers, and what it says where it does not.
CASES: list[tuple[str, str, bool, str]] = [
    ("train", "lost-answer=CreateTrainingJob", True, ""),
    ("train", "throttle=3", True, ""),
    ("train", "spot-after=4s", True, ""),
    ("train", "container-dies=4s", False, r"error: \S+ failed: AlgorithmError"),
    ("train", "never-an-answer=CreateTrainingJob", False, r"AWS gave no answer; .*; but (\S+) runs\. Follow it with"),
    ("deploy", "lost-answer=CreateModel,CreateEndpointConfig,CreateEndpoint,CreateSchedule", True, ""),
    ("deploy", "throttle=3", True, ""),
    ("deploy", "lost-answer=UpdateEndpoint", True, ""),
    ("deploy", "container-dies=1s", False, r"went back to what it was: The primary container .* ping health check"),
    ("deploy", "never-an-answer=UpdateEndpoint", False, r"AWS gave no answer"),
    ("deploy", "never-an-answer=CreateEndpoint", False, r"AWS gave no answer"),
    ("pipeline", "lost-answer=CreatePipeline,StartPipelineExecution,CreateModelPackageGroup", True, ""),
    ("pipeline", "throttle=3", True, ""),
    ("pipeline", "container-dies=0.5s", False, r"error: step \S+ failed: "),
    ("pipeline", "never-an-answer=StartPipelineExecution", False, r"AWS gave no answer; .*`make status`"),
]
ALONE = ("never-an-answer=CreateEndpoint",)  # cases of `--quick`, where there is no endpoint to update
OWNER = boto3.session.Session(os.environ["REHEARSAL_OWNER"], "rehearsal")


def ask(name: str, **request: Any) -> dict[str, Any]:
    """Have the rehearsal do something of its own."""
    asked = urllib.request.Request(f"{os.environ['REHEARSAL']}/_rehearsal/{name}", json.dumps(request).encode())
    with urllib.request.urlopen(asked) as answer:
        return dict(json.loads(answer.read()))


def make(verb: str, variables: Mapping[str, str], owner: bool = False) -> tuple[int, str]:
    """Run a verb: its exit code and what it says."""
    words = ["make", "--no-print-directory", verb, *(f"{key}={value}" for key, value in variables.items())]
    outer = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    rights = {"AWS_ACCESS_KEY_ID": os.environ["REHEARSAL_OWNER"]} if owner else {}
    done = subprocess.run(words, env=outer | CHANGES | rights, text=True, errors="replace", stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    return done.returncode, done.stdout


def until(look: Callable[[], Any], seconds: float = 240) -> None:
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not look() and time.monotonic() < deadline:
        time.sleep(1)


def jobs(word: str) -> list[dict[str, Any]]:
    """The jobs of a kind, or the executions of pipelines."""
    sagemaker = OWNER.client("sagemaker")
    if word == "train":
        return list(sagemaker.list_training_jobs()["TrainingJobSummaries"])
    if word == "deploy":
        return list(sagemaker.list_endpoints()["Endpoints"])
    names, found = [item["PipelineName"] for item in sagemaker.list_pipelines()["PipelineSummaries"]], []
    for name in names:
        found += sagemaker.list_pipeline_executions(PipelineName=name)["PipelineExecutionSummaries"]
    return found


def running(word: str) -> list[dict[str, Any]]:
    """Those that have not ended."""
    going = ("InProgress", "Stopping", "Executing")
    return [item for item in jobs(word)
            if item.get("TrainingJobStatus") in going or item.get("PipelineExecutionStatus") in going]  # fmt: skip


def play(verb: str, fault: str, recovers: bool, said: str, quick: bool, given: dict[str, str]) -> list[str]:
    """One case; what is wrong."""
    wrong, before, seen = list[str](), len(jobs(verb)), len(ask("events")["events"])
    ask("faults", faults=[fault])
    code, text = make(verb, given)
    played = [event for event in ask("events", since=seen)["events"] if event["kind"] == "fault"]
    ask("faults", faults=[])
    over = "plays no GPU" in text and "answer" not in text if quick and verb == "deploy" else code == 0
    if not played:
        wrong.append("the fault did not happen")
    if "Traceback" in text or over != recovers or not (re.search(said, text) or quick):
        wrong.append(f"ended with {code}, and said:\n{text[-1200:]}")
    new = len(jobs(verb)) - before
    if new > 1 or (verb != "deploy" and new != 1):
        wrong.append(f"{new} were started")
    until(lambda: not running(verb))
    if not recovers and not quick:
        again, text = make(verb, given)
        if again:
            wrong.append(f"the same verb again ended with {again}, and said:\n{text[-1200:]}")
    if quick and verb == "deploy":
        make("destroy", {"YES": "1"})
        until(lambda: not jobs(verb), 30)
    if left := running(verb) + (jobs(verb) if quick and verb == "deploy" else []):
        wrong.append(f"still there: {left}")
    return wrong


def prepare(quick: bool, deploys: bool) -> str:
    """The stack, its rights, the images, and a run to deploy; what went wrong."""
    for verb, variables in (("bootstrap", {"YES": "1"}), ("image-push", {})):
        code, text = make(verb, variables, verb == "bootstrap")
        if code:
            return text
    for policy in OWNER.client("iam").list_policies(Scope="Local")["Policies"]:
        if re.search("-(Verbs|Around)Policy-", policy["PolicyName"]):
            OWNER.client("iam").attach_user_policy(UserName="person", PolicyArn=policy["Arn"])
    if deploys and not quick:
        for verb, variables in (("train", {"WAIT": "1", "YES": "1"}), ("pull", {})):
            code, text = make(verb, variables)
            if code:
                return text
    return ""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Play accidents on the verbs of a project.")
    parser.add_argument("verbs", nargs="*", default=["train", "deploy", "pipeline"])
    parser.add_argument("--quick", action="store_true", help="without containers")
    parser.add_argument("--artifact", default="", help="to deploy (a run that is trained first)")
    options = parser.parse_args()
    if options.quick:
        CHANGES.update(dict.fromkeys(TYPES, "ml.g5.xlarge"))
    if trouble := prepare(options.quick, "deploy" in options.verbs):
        print(trouble)
        return 1
    bad, artifact = 0, {"ARTIFACT": options.artifact} if options.artifact else {}
    given = {"train": {"WAIT": "1"}, "deploy": artifact, "pipeline": {"WAIT": "1"}}
    for verb, fault, recovers, said in CASES:
        other = ("spot", "container", "lost-answer=Update", "never-an-answer=Update") if options.quick else ALONE
        if verb not in options.verbs or fault.startswith(other):
            continue
        began, seen = time.monotonic(), len(ask("events")["events"])
        more = {"YES": "1"} | ({} if options.quick and verb != "deploy" else given[verb])
        wrong = play(verb, fault, recovers, said, options.quick, more)
        bad += bool(wrong)
        word = "FAILED" if wrong else "recovers" if recovers else "says so"
        print(f"{verb:9}{fault:84}{time.monotonic() - began:5.0f} s  {word}", flush=True)
        for event in ask("events", since=seen)["events"]:
            if event["kind"] == "broken":
                print(f"    {event['kind']}: {event['what']} {event['text'][-600:]}")
        print("".join(f"    {line}\n" for line in "\n".join(wrong).splitlines()), end="", flush=True)
    make("destroy", {"YES": "1"})
    until(lambda: not jobs("deploy"), 60)
    left = jobs("deploy") + running("train")
    print(f"left that bills: {left or 'nothing'}")
    return 1 if bad or left else 0


if __name__ == "__main__":
    sys.exit(main())
