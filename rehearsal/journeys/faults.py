"""What becomes of the verbs of a project that the SageMaker template made, when AWS has accidents.

    python -m rehearsal --run faults [train|deploy|pipeline …]          # in the project's folder

Each case plays an accident, runs a verb, which recovers or says in one sentence what is there, and then runs the verb
without it, which ends right. At the end nothing is left that bills.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import boto3

CHANGES = {"COMPUTE__INSTANCE_TYPE": "ml.m5.xlarge", "ENDPOINT__INSTANCE_TYPE": "ml.m5.xlarge", "TRAINING__EPOCHS": "2"}
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
    ("deploy", "container-dies=0s", False, r"went back to what it was: The primary container .* ping health check"),
    ("deploy", "never-an-answer=UpdateEndpoint", False, r"AWS gave no answer"),
    ("pipeline", "lost-answer=CreatePipeline,StartPipelineExecution,CreateModelPackageGroup", True, ""),
    ("pipeline", "throttle=3", True, ""),
    ("pipeline", "container-dies=2s", False, r"error: step \S+ failed: "),
    ("pipeline", "never-an-answer=StartPipelineExecution", False, r"AWS gave no answer; .*`make status`"),
]
OWNER = boto3.session.Session(os.environ["REHEARSAL_OWNER"], "rehearsal")


def ask(name: str, **request: Any) -> dict[str, Any]:
    """Have the rehearsal do something of its own."""
    asked = urllib.request.Request(f"{os.environ['REHEARSAL']}/_rehearsal/{name}", json.dumps(request).encode())
    with urllib.request.urlopen(asked) as answer:
        return dict(json.loads(answer.read()))


def make(verb: str, owner: bool = False, **variables: str) -> tuple[int, str]:
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


def play(verb: str, fault: str, recovers: bool, said: str) -> list[str]:
    """One case; what is wrong."""
    variables, wrong, before = {"YES": "1"} | ({} if verb == "deploy" else {"WAIT": "1"}), list[str](), len(jobs(verb))
    ask("faults", faults=[fault])
    code, text = make(verb, **variables)
    played = [event for event in ask("events")["events"] if event["kind"] == "fault"]
    ask("faults", faults=[])
    if not played:
        wrong.append("the fault did not happen")
    if "Traceback" in text or (code == 0) != recovers or not re.search(said, text):
        wrong.append(f"ended with {code}, and said:\n{text[-1200:]}")
    new = len(jobs(verb)) - before
    if new > 1 or (verb != "deploy" and new != 1):
        wrong.append(f"{new} were started")
    until(lambda: not running(verb))
    if not recovers:
        again, text = make(verb, **variables)
        if again:
            wrong.append(f"the same verb again ended with {again}, and said:\n{text[-1200:]}")
    if left := running(verb):
        wrong.append(f"still running: {left}")
    return wrong


def main() -> int:
    """Command line."""
    chosen, bad = sys.argv[1:] or ["train", "deploy", "pipeline"], 0
    for verb, variables in (("bootstrap", {"YES": "1"}), ("image-push", {})):
        code, text = make(verb, verb == "bootstrap", **variables)
        if code:
            print(text)
            return 1
    for policy in OWNER.client("iam").list_policies(Scope="Local")["Policies"]:
        if re.search("-(Verbs|Around)Policy-", policy["PolicyName"]):
            OWNER.client("iam").attach_user_policy(UserName="person", PolicyArn=policy["Arn"])
    if "deploy" in chosen:
        for verb, more in (("train", {"WAIT": "1"}), ("pull", {}), ("deploy", {})):
            code, text = make(verb, YES="1", **more) if verb != "pull" else make(verb)
            if code:
                print(text)
                return 1
        OWNER.client("sagemaker").delete_endpoint(EndpointName=jobs("deploy")[0]["EndpointName"])
        until(lambda: not jobs("deploy"))
    for case in CASES:
        if case[0] in chosen:
            began, seen = time.monotonic(), len(ask("events")["events"])
            wrong = play(*case)
            bad += bool(wrong)
            word = "FAILED" if wrong else "recovers" if case[2] else "says so, and the same verb again ends right"
            print(f"{case[0]:9}{case[1]:84}{time.monotonic() - began:5.0f} s  {word}", flush=True)
            for event in ask("events", since=seen)["events"]:
                if event["kind"] in ("broken", "gap"):
                    print(f"    {event['kind']}: {event['what']} {event['text'][-600:]}")
            print("".join(f"    {line}\n" for line in "\n".join(wrong).splitlines()), end="", flush=True)
    code, text = make("destroy", owner=True, ALL="1", CONFIRM=os.environ.get("PROJECT", "image-classifier"), YES="1")
    left = jobs("deploy") + running("train")
    print(f"left that bills: {left or 'nothing'}" + (f"; destroy said:\n{text[-800:]}" if code else ""))
    return 1 if bad or left or code else 0


if __name__ == "__main__":
    sys.exit(main())
