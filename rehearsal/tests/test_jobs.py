"""Training and Processing as requests ask for them, in a stub's container."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from conftest import ROLE, STUB, until
from rehearsal import docker, jobs
from rehearsal.operations import Account

Clients = Callable[[str], Any]

MACHINES = {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1}


def training(name: str = "a-job", code: str = "", hosts: int = 1, **more: Any) -> dict[str, Any]:
    """A request for a training job."""
    return {
        "TrainingJobName": name, "RoleArn": ROLE, "HyperParameters": {"code": code, "epochs": "3"},
        "AlgorithmSpecification": {"TrainingImage": STUB, "TrainingInputMode": "File"},
        "OutputDataConfig": {"S3OutputPath": "s3://the-bucket/jobs/"},
        "ResourceConfig": MACHINES | {"InstanceCount": hosts},
        "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
    } | more  # fmt: skip


def channel(name: str, uri: str, **more: Any) -> dict[str, Any]:
    """A channel of objects in S3."""
    source = {"S3DataType": "S3Prefix", "S3Uri": uri} | more
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def ended(client: Clients, name: str = "a-job", word: str = "TrainingJob") -> dict[str, Any]:
    """What Describe says of a job in the end."""
    call = getattr(client("sagemaker"), {"TrainingJob": "describe_training_job",
                                         "ProcessingJob": "describe_processing_job"}[word])  # fmt: skip

    def look() -> dict[str, Any] | None:
        facts: dict[str, Any] = call(**{f"{word}Name": name})
        return facts if facts[f"{word}Status"] in jobs.ENDED else None

    return until(look)


def running(client: Clients, name: str = "a-job") -> None:
    """Wait for a job to train."""
    describe = client("sagemaker").describe_training_job
    until(lambda: describe(TrainingJobName=name)["SecondaryStatus"] == "Training")


def put(client: Clients, **objects: str) -> None:
    """Objects by key, with `__` for a slash."""
    for key, text in objects.items():
        client("s3").put_object(Bucket="the-bucket", Key=key.replace("__", "/"), Body=text.encode())


def content(client: Clients, key: str) -> bytes:
    """Of an object."""
    return bytes(client("s3").get_object(Bucket="the-bucket", Key=key)["Body"].read())


def archive(client: Clients, key: str) -> dict[str, str]:
    """The files of a .tar.gz in S3."""
    with tarfile.open(fileobj=io.BytesIO(content(client, key))) as tar:
        return {member.name: tar.extractfile(member).read().decode() for member in tar if member.isfile()}  # type: ignore[union-attr]


def test_training_sees_the_contract_and_leaves_its_archives(account: Account, client: Clients) -> None:
    put(client, data__train__a="1", data__train__deep__b="2", data__training="3")
    code = """
import json, os, glob
print("loss=0.5"); print("loss=0.25")
seen = {p: open(p).read() for p in glob.glob("/opt/ml/input/**", recursive=True) if os.path.isfile(p)}
seen |= {"env": [os.environ["TRAINING_JOB_NAME"], os.environ["MINE"]], "host": os.uname().nodename}
json.dump(seen, open("/opt/ml/model/seen.json", "w"))
os.makedirs("/opt/ml/output/data/deep"); open("/opt/ml/output/data/deep/x", "w").write("x")
"""
    request = training(code=code, Environment={"MINE": "yes"}, InputDataConfig=[
        channel("train", "s3://the-bucket/data/train/"), channel("loose", "s3://the-bucket/data/train")])  # fmt: skip
    request["AlgorithmSpecification"]["MetricDefinitions"] = [{"Name": "loss", "Regex": "loss=([0-9.]+)"}]
    made = client("sagemaker").create_training_job(**request, Tags=[{"Key": "project", "Value": "p"}])
    facts = ended(client)
    assert facts["TrainingJobStatus"] == "Completed", facts.get("FailureReason")
    assert [step["Status"] for step in facts["SecondaryStatusTransitions"]] == [
        "Starting", "Downloading", "Training", "Uploading", "Completed"
    ]  # fmt: skip
    assert facts["ModelArtifacts"]["S3ModelArtifacts"] == "s3://the-bucket/jobs/a-job/output/model.tar.gz"
    assert [(m["MetricName"], m["Value"]) for m in facts["FinalMetricDataList"]] == [("loss", 0.25)]
    seen = json.loads(archive(client, "jobs/a-job/output/model.tar.gz")["seen.json"])
    inside = "/opt/ml/input"
    assert {path: text for path, text in seen.items() if path.startswith(f"{inside}/data")} == {
        f"{inside}/data/train/a": "1", f"{inside}/data/train/deep/b": "2",
        f"{inside}/data/loose/a": "1", f"{inside}/data/loose/deep/b": "2", f"{inside}/data/loose/training": "3",
    }  # fmt: skip
    config = {name: json.loads(seen[f"{inside}/config/{name}.json"])
              for name in ("hyperparameters", "inputdataconfig", "resourceconfig")}  # fmt: skip
    assert config["hyperparameters"]["epochs"] == "3"
    assert config["inputdataconfig"]["train"] == {
        "TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"
    }  # fmt: skip
    assert config["resourceconfig"]["hosts"] == ["algo-1"] == [seen["host"]]
    assert seen["env"] == ["a-job", "yes"]
    assert archive(client, "jobs/a-job/output/output.tar.gz") == {"deep/x": "x"}
    group = "/aws/sagemaker/TrainingJobs"
    stream = client("logs").describe_log_streams(logGroupName=group)["logStreams"][0]["logStreamName"]
    assert stream.startswith("a-job/algo-1-")
    events = client("logs").get_log_events(logGroupName=group, logStreamName=stream)["events"]
    assert [event["message"] for event in events] == ["loss=0.5", "loss=0.25"]
    assert client("sagemaker").list_tags(ResourceArn=made["TrainingJobArn"])["Tags"] == [
        {"Key": "project", "Value": "p"}
    ]
    until(lambda: not [*account.folder.glob("training-job/*")])
    with pytest.raises(ClientError, match="ResourceInUse"):
        client("sagemaker").create_training_job(**request)


def test_hosts_reach_each_other_and_an_isolated_network_nothing_else(account: Account, client: Clients) -> None:
    code = """
import json, socket, time
hosts = json.load(open("/opt/ml/input/config/resourceconfig.json"))
me, other = hosts["current_host"], [h for h in hosts["hosts"] if h != hosts["current_host"]][0]
server = socket.create_server(("", 5000))
while True:
    try: socket.create_connection((other, 5000)).close(); break
    except OSError: time.sleep(0.1)
server.accept()  # the other has connected too
try: socket.create_connection(("1.1.1.1", 53), 2); out = "open"
except OSError: out = "isolated"
open(f"/opt/ml/model/{me}", "w").write(out)
"""
    client("sagemaker").create_training_job(**training(code=code, hosts=2, EnableNetworkIsolation=True))
    facts = ended(client)
    assert facts["TrainingJobStatus"] == "Completed", facts.get("FailureReason")
    assert archive(client, "jobs/a-job/output/model.tar.gz") == {"algo-1": "isolated", "algo-2": "isolated"}
    assert not docker.run("network", "ls", "--quiet", "--filter", f"label=rehearsal={account.name}").stdout


def test_why_a_job_failed(account: Account, client: Clients) -> None:
    code = 'open("/opt/ml/output/failure", "w").write("no such thing"); raise SystemExit(3)'
    client("sagemaker").create_training_job(**training(code=code))
    assert ended(client)["FailureReason"] == "AlgorithmError: no such thing, exit code: 3"
    request = training("other", InputDataConfig=[channel("train", "s3://the-bucket/none/")])
    client("sagemaker").create_training_job(**request)
    assert 'No S3 objects found under S3 URL "s3://the-bucket/none/"' in ended(client, "other")["FailureReason"]
    request = training("gpu")
    request["ResourceConfig"]["InstanceType"] = "ml.g5.xlarge"
    client("sagemaker").create_training_job(**request)
    assert "plays no GPU" in ended(client, "gpu")["FailureReason"]


RESUMES = """
import os, signal, sys, time
place = "/opt/ml/checkpoints/epoch"
start = int(open(place).read()) if os.path.exists(place) else 0
def stop(*_): open("/opt/ml/output/data/signal", "w").write("x"); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("from", start)
for epoch in range(start, 3 if start else 1000):
    with open("/opt/ml/checkpoints/new", "w") as new: new.write(str(epoch + 1))
    os.replace(new.name, place); time.sleep(0.2)
open("/opt/ml/model/epochs", "w").write(f"{start}")
"""


def test_a_stopped_job_gets_a_signal_and_resumes_from_its_checkpoint(account: Account, client: Clients) -> None:
    kept = {"CheckpointConfig": {"S3Uri": "s3://the-bucket/checkpoints/run"}}
    sagemaker = client("sagemaker")
    sagemaker.create_training_job(**training(code=RESUMES, **kept))
    running(client)
    until(lambda: client("s3").list_objects_v2(Bucket="the-bucket", Prefix="checkpoints/run/epoch").get("Contents"))
    assert sagemaker.describe_training_job(TrainingJobName="a-job")["TrainingJobStatus"] == "InProgress"
    sagemaker.stop_training_job(TrainingJobName="a-job")
    facts = ended(client)
    assert (facts["TrainingJobStatus"], facts["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert archive(client, "jobs/a-job/output/output.tar.gz") == {"signal": "x"}
    with pytest.raises(ClientError, match="in status Stopped"):
        sagemaker.stop_training_job(TrainingJobName="a-job")
    sagemaker.create_training_job(**training("b-job", RESUMES, **kept))
    assert ended(client, "b-job")["TrainingJobStatus"] == "Completed"
    assert int(archive(client, "jobs/b-job/output/model.tar.gz")["epochs"]) > 0


def test_reclaimed_spot_capacity_restarts_a_job_from_what_was_in_s3(account: Account, client: Clients) -> None:
    request = training(code=RESUMES, CheckpointConfig={"S3Uri": "s3://the-bucket/c"}, EnableManagedSpotTraining=True)
    request["StoppingCondition"]["MaxWaitTimeInSeconds"] = 3600
    client("sagemaker").create_training_job(**request)
    until(lambda: client("s3").list_objects_v2(Bucket="the-bucket", Prefix="c/epoch").get("Contents"))
    jobs.JOBS[account.name, "TrainingJob", "a-job"].accident = "reclaim"
    facts = ended(client)
    assert facts["TrainingJobStatus"] == "Completed", facts.get("FailureReason")
    assert [step["Status"] for step in facts["SecondaryStatusTransitions"]] == [
        "Starting", "Downloading", "Training", "Interrupted", "Restarting", "Downloading", "Training", "Uploading",
        "Completed",
    ]  # fmt: skip
    assert int(archive(client, "jobs/a-job/output/model.tar.gz")["epochs"]) > 0


def test_the_time_of_a_job_is_limited(account: Account, client: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is over before the container is there, or before what runs in it heeds the signal."""
    monkeypatch.setattr(jobs, "GRACE", 1)
    client("sagemaker").create_training_job(**training(code=RESUMES, StoppingCondition={"MaxRuntimeInSeconds": 3},
                                                       CheckpointConfig={"S3Uri": "s3://the-bucket/c"}))  # fmt: skip
    facts = ended(client)
    assert (facts["TrainingJobStatus"], facts["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")


def test_processing_moves_inputs_and_outputs(account: Account, client: Clients) -> None:
    put(client, raw__a="1", raw__b="2")
    code = """
import os, json; os.chdir("/opt/ml")
config = json.load(open("config/processingjobconfig.json")); os.makedirs("processing/out/deep")
print(config["ProcessingJobName"], *sorted(os.listdir("processing/in")), file=open("processing/out/deep/names", "w"))
"""
    request: dict[str, Any] = {
        "ProcessingJobName": "a-job", "RoleArn": ROLE,
        "AppSpecification": {"ImageUri": STUB, "ContainerEntrypoint": ["python3", "-c"], "ContainerArguments": [code]},
        "ProcessingResources": {"ClusterConfig": MACHINES},
        "ProcessingInputs": [{"InputName": "raw", "S3Input": {
            "S3Uri": "s3://the-bucket/raw/", "LocalPath": "/opt/ml/processing/in", "S3DataType": "S3Prefix",
            "S3InputMode": "File"}}],
        "ProcessingOutputConfig": {"Outputs": [{"OutputName": "packed", "S3Output": {
            "S3Uri": "s3://the-bucket/packed", "LocalPath": "/opt/ml/processing/out", "S3UploadMode": "EndOfJob"}}]},
    }  # fmt: skip
    sagemaker = client("sagemaker")
    sagemaker.create_processing_job(**request)
    facts = ended(client, word="ProcessingJob")
    assert facts["ProcessingJobStatus"] == "Completed", facts.get("FailureReason")
    assert content(client, "packed/deep/names") == b"a-job a b\n"
    request |= {"ProcessingJobName": "b-job"}
    request["AppSpecification"]["ContainerArguments"] = ["raise SystemExit(4)"]
    sagemaker.create_processing_job(**request)
    assert "exit code: 4" in ended(client, "b-job", "ProcessingJob")["FailureReason"]
    listed = sagemaker.list_processing_jobs(SortBy="Name", SortOrder="Ascending", StatusEquals="Failed")
    assert [job["ProcessingJobName"] for job in listed["ProcessingJobSummaries"]] == ["b-job"]
    with pytest.raises(ClientError, match="Could not find requested job"):
        sagemaker.describe_processing_job(ProcessingJobName="none")


def test_nothing_is_left(account: Account, client: Clients) -> None:
    client("sagemaker").create_training_job(**training(code="import time; time.sleep(600)"))
    until(lambda: docker.run("ps", "--quiet", "--filter", f"label=rehearsal={account.name}").stdout)
    account.close()
    for kind in (["ps", "--all"], ["network", "ls"]):
        assert not docker.run(*kind, "--quiet", "--filter", f"label=rehearsal={account.name}").stdout
    assert not account.folder.exists()
