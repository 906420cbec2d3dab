"""Programs that know nothing of a rehearsal, as the documents of SageMaker and boto3 write them, run in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
import boto3
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.training.configs import Compute, InputData, SourceCode
from sagemaker.train import ModelTrainer

image = sys.argv[1]
iam, sagemaker = boto3.client("iam"), boto3.client("sagemaker")
trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
role = iam.create_role(RoleName="SageMakerRole", AssumeRolePolicyDocument=document)["Role"]["Arn"]
iam.attach_role_policy(RoleName="SageMakerRole", PolicyArn="arn:aws:iam::aws:policy/AmazonSageMakerFullAccess")
data = Session().upload_data("points.csv", key_prefix="points")
trainer = ModelTrainer(
    training_image=image,
    source_code=SourceCode(source_dir="source", entry_script="train.py"),
    compute=Compute(instance_type="ml.m5.large", instance_count=1),
    base_job_name="slope",
    role=role,
)
trainer.train(input_data_config=[InputData(channel_name="train", data_source=data)], wait=True)
model = trainer._latest_training_job.model_artifacts.s3_model_artifacts
container = {"Image": image, "ModelDataUrl": model}
sagemaker.create_model(ModelName="slope", PrimaryContainer=container, ExecutionRoleArn=role)
variant = {"VariantName": "one", "ModelName": "slope", "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
sagemaker.create_endpoint_config(EndpointConfigName="slope", ProductionVariants=[variant])
sagemaker.create_endpoint(EndpointName="slope", EndpointConfigName="slope")
sagemaker.get_waiter("endpoint_in_service").wait(EndpointName="slope", WaiterConfig={"Delay": 1})
answer = boto3.client("sagemaker-runtime").invoke_endpoint(EndpointName="slope", ContentType="text/csv", Body=b"21")
print("answer:", answer["Body"].read().decode())
"""
TRAIN = """
import os

with open(os.path.join(os.environ["SM_CHANNEL_TRAIN"], "points.csv")) as file:
    points = [tuple(map(float, line.split(","))) for line in file]
slope = sum(x * y for x, y in points) / sum(x * x for x, _ in points)
with open(os.path.join(os.environ["SM_MODEL_DIR"], "handler.py"), "w") as file:
    file.write(f"def answer(body, headers): return 200, 'text/csv', str({slope} * float(body)).encode()")
"""


def test_a_program_of_somebody_else(image: str, tmp_path: Path) -> None:
    """It trains with the SDK and asks an endpoint; the role has AWS's own policy, and nothing names an account."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train.py").write_text(TRAIN)
    (tmp_path / "points.csv").write_text("1,2\n2,4\n3,6\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [sys.executable, "-m", "rehearsal", "--run", "program.py", image]
    # What leads to AWS itself, and to somebody's account, is not used.
    shell = os.environ | {"AWS_PROFILE": "somebody", "AWS_SESSION_TOKEN": "secret"}
    done = subprocess.run(words, cwd=tmp_path, env=shell, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "answer: 42.0"
