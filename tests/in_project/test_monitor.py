"""`monitor`: what counts as drift and how often chance does, captured requests of every kind, the requests to AWS."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from botocore.session import get_session
from botocore.validate import ParamValidator
from PIL import Image

import imaging
from inference import inference
from inference.export import write_artifact
from model import build_model
from pipelines import SOURCE, config, project, runs
from pipelines.cloud import destroy, inventory
from pipelines.cloud.account import Account
from pipelines.monitoring import monitor as verb_module
from pipelines.terminal import UserError
from processing import monitor
from processing.preprocess import pack
from tests.cloud import KEY, NETWORK, STACK, Recorder, aws, check_golden
from tests.helpers import CLASSES, Verb, draw
from tests.test_deploy import NAME, Hosting, hosting, run, settings
from tests.test_inference import archive, artifact, classifier
from training.config import Hyperparameters, resolve
from training.data import load_channels
from training.distributed import World
from training.loop import fit

__all__ = ["archive", "artifact", "aws", "classifier", "hosting"]  # fixtures
NOON = datetime(2026, 11, 21, 12, 30, tzinfo=UTC)
Body = tuple[str, bytes]  # its content type, too


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose baseline has 180 images."""
    folder = tmp_path_factory.mktemp("watched")
    for label in CLASSES:
        (folder / "raw" / label).mkdir(parents=True)
        for number in range(400):
            draw(label, number).save(folder / "raw" / label / f"{number}.png")
    pack(folder / "raw", folder / "packed")
    splits = load_channels(folder / "packed" / "train", folder / "packed" / "validation")
    settled = resolve(Hyperparameters(epochs=2, batch_size=64, precision="fp32"), 12, len(splits[0]))
    torch.manual_seed(0)
    model, _ = fit(build_model("cnn", 3, 12), *splits, settled, World(rank=0, size=1, device=torch.device("cpu")))
    write_artifact(folder / "model", model, settled, splits[1], {"val_accuracy": 1.0}, "abc")
    runs.pack(folder / "model", folder / "model.tar.gz")
    return folder / "model.tar.gz"


@pytest.fixture(scope="module")
def model(watched: Path) -> inference.Classifier:
    return inference.model_fn(str(watched.parent / "model"))


def png(image: Image.Image) -> Body:
    return "image/png", imaging.encode_png(np.asarray(image.convert("RGB")))


def line(kind: str, body: bytes, answer: str, when: datetime = NOON) -> dict[str, Any]:
    """A captured request, as an endpoint writes it that captures JSON as text and everything else in base64."""
    as_text = kind == "application/json"
    given = {"encoding": "JSON", "data": body.decode()} if as_text else {
        "encoding": "BASE64", "data": base64.b64encode(body).decode()
    }  # fmt: skip
    return {
        "captureData": {
            "endpointInput": {"observedContentType": kind, "mode": "INPUT", **given},
            "endpointOutput": {"observedContentType": "application/json", "mode": "OUTPUT", "data": answer,
                               "encoding": "JSON"},
        },
        "eventMetadata": {"eventId": "a", "inferenceTime": when.isoformat().replace("+00:00", "Z")},
        "eventVersion": "0",
    }  # fmt: skip


def answered(model: inference.Classifier, body: Body, when: datetime = NOON) -> str:
    kind, content = body
    prediction = inference.predict_fn(inference.input_fn(content, kind), model)
    return json.dumps(line(kind, content, inference.output_fn(prediction)[0], when))


def write(folder: Path, lines: Iterable[str], name: str = "a") -> Path:
    """Where an endpoint puts them."""
    file = folder / "AllTraffic" / "2026" / "11" / "21" / "12" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return folder


def usual(seed: int, count: int = 240) -> list[Image.Image]:
    """New images of the distribution that the model knows."""
    labels = np.random.default_rng(seed).choice(CLASSES, count)
    return [draw(str(label), 10_000 * (seed + 1) + number) for number, label in enumerate(labels)]


def report(archive: Path, folder: Path, *more: str) -> dict[str, Any]:
    output = folder.parent / "output"
    words = ["--artifact", str(archive), "--data", str(folder), "--output", str(output), *more]
    assert monitor.main(words) == 0
    (file,) = output.glob("*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    file.unlink()
    return found


def test_more_of_the_same_is_no_drift(watched: Path, model: inference.Classifier, tmp_path: Path) -> None:
    verdicts = []
    for seed in range(8):
        lines = (answered(model, png(image)) for image in usual(seed))
        verdicts.append(report(watched, write(tmp_path / str(seed) / "captured", lines))["verdict"])
    assert set(verdicts) == {"no drift"}


def compared(before: list[int], now: list[int], limit: float) -> dict[str, Any]:
    """The comparison of two counts of predictions."""
    none = {"counts": [0], "edges": [0, 1]}
    baseline: dict[str, Any] = {"predictions": {str(number): count for number, count in enumerate(before)}}
    sample = monitor.Sample(labels=Counter({str(number): count for number, count in enumerate(now)}))
    baseline |= dict.fromkeys(sample.values, none)
    return monitor.compare(baseline, sample, limit)["predictions"]


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Thousands of comparisons of two samples of one distribution, small and large, with few and with many bins."""
    random, usual, strict, plain = np.random.default_rng(0), [], [], []
    shapes = [np.ones(10), np.ones(500), np.array([0.02] * 19 + [20.0]), 1 / np.arange(1, 101), np.array([8.0, 90, 2])]
    for shape in shapes:
        for before, now in [(20, 200), (180, 200), (2048, 200), (2048, 20_000)]:
            for _ in range(500):
                pair = [random.multinomial(count, shape / shape.sum()).tolist() for count in (before, now)]
                found = compared(pair[0], pair[1], 0.2)
                usual.append(found["drift"])
                strict.append(compared(pair[0], pair[1], 0.0)["drift"])
                plain.append(found["psi"] > 0.2)
    assert len(usual) == 10_000
    assert sum(usual) <= sum(strict) <= 6  # 1 is expected
    assert sum(plain) > 1000  # what a limit alone would do


@pytest.mark.parametrize(
    ("degrees", "wanted"), [(1, 15.137), (4, 23.513), (9, 33.720), (19, 50.795), (99, 161.319)]
)  # tables of the distribution
def test_quantile(degrees: int, wanted: float) -> None:
    assert monitor.quantile(degrees, 0.9999) == pytest.approx(wanted, rel=0.08)


def test_psi_by_hand_and_what_is_merged() -> None:
    value, bins = monitor.psi([500, 500], [250, 750])
    p, q = np.array([500.5, 500.5]) / 1001, np.array([250.5, 750.5]) / 1001
    assert bins == 2
    assert value == pytest.approx(float(((q - p) * np.log(q / p)).sum()))
    assert value == pytest.approx(0.25 * np.log(3), rel=0.01)
    assert monitor.psi([0, 0, 0, 100], [0, 0, 0, 100])[1] == 2
    assert monitor.psi([0, 0, 0, 100], [50, 0, 0, 50])[0] > 1  # a full bin never takes in its empty neighbours
    assert monitor.psi([1, 1, 1, 1, 96], [1, 1, 1, 1, 96]) == (0, 2)
    assert monitor.psi([1] * 1000, [1] * 1000) == (0, 20)
    assert np.isfinite(monitor.psi([0, 0], [0, 0])[0])


def test_no_value_is_lost_outside_of_the_bins() -> None:
    assert imaging.counted([-1.0, 0.0, 0.7, 1.0, 1.2], [0.0, 0.5, 1.0]) == [2, 3]


SHIFTS = {
    "brightness": lambda image: image.point(lambda value: min(value + 60, 255)),
    "contrast": lambda image: image.point(lambda value: 110 + value // 4),
}


@pytest.mark.parametrize("what", [*SHIFTS, "predictions", "confidence"])
def test_each_change_is_seen(watched: Path, model: inference.Classifier, tmp_path: Path, what: str) -> None:
    images = usual(1)
    if what in SHIFTS:
        images = [SHIFTS[what](image) for image in images]
    elif what == "predictions":
        images = [draw("up", 50_000 + number) for number in range(240)]
    lines = [answered(model, png(image)) for image in images]
    if what == "confidence":
        records = [json.loads(text) for text in lines]
        for record in records:
            answer = json.loads(record["captureData"]["endpointOutput"]["data"])
            answer["probabilities"] = [[0.34, 0.33, 0.33]]
            record["captureData"]["endpointOutput"]["data"] = json.dumps(answer)
        lines = [json.dumps(record) for record in records]
    found = report(watched, write(tmp_path / "captured", lines))
    assert found["verdict"] == "drift"
    assert found["measures"][what]["drift"]
    assert found["measures"][what]["psi"] > found["measures"][what]["limit"] >= 0.2
    if what in ("predictions", "confidence"):
        assert not found["measures"]["brightness"]["drift"]


def test_few_images_never_alarm(
    watched: Path, model: inference.Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    black = answered(model, png(Image.new("RGB", (12, 12))))
    for count in (0, 1, 199):
        folder = write(tmp_path / str(count) / "captured", [black] * count)
        found = report(watched, folder, "--endpoint", "e")
        assert (found["verdict"], found["images"]) == ("not enough images", count)
        shown = capsys.readouterr().out.splitlines()[-1]
        assert "Drift" not in shown.replace("ModelDrift", "")
    assert report(watched, write(tmp_path / "200" / "captured", [black] * 200))["verdict"] == "drift"


def npy(numbers: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, numbers)
    return file.getvalue()


def test_every_kind_of_request_gives_the_same_numbers(
    watched: Path, model: inference.Classifier, tmp_path: Path
) -> None:
    """One image, alone or in a batch, as a file, in base64, as normalised numbers, as .npy; a large one is fitted."""
    image = draw("left", 77_777)
    pixels = np.array(image.convert("RGB"))
    numbers = imaging.normalise(torch.from_numpy(pixels[None]), model.mean, model.std).numpy()
    encoded = base64.b64encode(png(image)[1]).decode()
    enlarged = np.repeat(np.repeat(pixels, 10, axis=0), 10, axis=1)
    wide = np.concatenate([np.zeros_like(enlarged), enlarged, np.zeros_like(enlarged)], axis=1)  # its middle counts
    bodies: list[tuple[Body, int]] = [
        (png(image), 1),
        (("application/x-image", png(image)[1]), 1),
        (("application/json", json.dumps({"instances": [{"b64": encoded}, {"b64": encoded}]}).encode()), 2),
        (("application/json", json.dumps({"instances": numbers.tolist()}).encode()), 1),
        (("application/x-npy", npy(np.concatenate([numbers] * 3).astype(np.float32))), 3),
        (png(Image.fromarray(wide)), 1),
    ]
    for number, (body, count) in enumerate(bodies):
        found = report(watched, write(tmp_path / str(number) / "captured", [answered(model, body)]))
        assert (found["skipped"], found["images"]) == ({}, count)
        seen = imaging.fit(wide, 12) if body[1] == bodies[-1][0][1] else pixels
        answer = inference.classify([seen], model)
        wanted = imaging.image_statistics(seen[None]) | {"confidence": [max(answer["probabilities"][0])]}
        baseline = json.loads((watched.parent / "model" / "baseline.json").read_text())
        for name, values in wanted.items():
            now = imaging.counted(values * count, baseline[name]["edges"])
            assert found["measures"][name]["now"] == now, (body[0], name)
        assert found["measures"]["predictions"]["now"] == [
            count * (label == answer["labels"][0]) for label in model.classes
        ]


def test_statistics_are_those_of_the_baseline(watched: Path, model: inference.Classifier, tmp_path: Path) -> None:
    """The validation split, sent as requests, has the baseline's very histograms."""
    folder = watched.parent / "packed" / "validation"
    images = np.concatenate([np.load(path) for path in sorted(folder.glob("images-*.npy"))])
    lines = [answered(model, ("image/png", imaging.encode_png(image))) for image in images]
    found = report(watched, write(tmp_path / "captured", lines), "--minimum", "1")
    for name, measure in found["measures"].items():
        if name != "confidence":  # batches of other sizes differ in a probability's last digits
            assert measure["now"] == measure["baseline"], name
        assert measure["psi"] < 0.02
    assert (found["verdict"], found["images"]) == ("no drift", len(images))


def broken(good: str) -> dict[str, list[str]]:
    """Lines that cannot be used, by the reason that is counted."""

    def but(place: str, **change: Any) -> str:
        record = json.loads(good)
        record["captureData"][place] |= change
        return json.dumps(record)

    answer = json.loads(json.loads(good)["captureData"]["endpointOutput"]["data"])
    record = json.loads(good)
    return {
        "damaged, or input or output is missing": [
            good[:90], "[]", "7", "nonsense", '"' + "x" * 10, json.dumps({**record, "eventMetadata": {}}), "[" * 99_999,
            json.dumps({**record, "eventMetadata": {"inferenceTime": "yesterday"}}),
            json.dumps({**record, "captureData": {"endpointInput": record["captureData"]["endpointInput"]}}),
            but("endpointInput", data="not base64!"), but("endpointInput", data=None),
            but("endpointInput", data="!" + record["captureData"]["endpointInput"]["data"]),
        ],
        "not answered with predictions": [
            but("endpointOutput", data='{"error": "too large"}'), but("endpointOutput", data="<html>"),
            but("endpointOutput", data=json.dumps(answer | {"probabilities": [[]]})),
            but("endpointOutput", data=json.dumps(answer | {"labels": [{}]})),
        ],
        "answered by a model with other classes": [
            but("endpointOutput", data=json.dumps(answer | {"labels": ["cat"]})),
        ],
        "not readable as images": [
            but("endpointInput", data=base64.b64encode(b"no image").decode()),
            but("endpointInput", data=base64.b64encode(b"1,2").decode(), observedContentType="text/csv"),
            but("endpointInput", data=base64.b64encode(b"1,2").decode(), observedContentType=7),
        ],
        "with another number of images than of predictions": [
            but("endpointOutput", data=json.dumps(answer | {"labels": ["up", "up"]})),
        ],
    }  # fmt: skip


def test_what_cannot_be_used_is_counted_and_skipped(
    watched: Path, model: inference.Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = answered(model, png(draw("up", 1)))
    bad = broken(good)
    lines = [good, "", *(text for texts in bad.values() for text in texts), good]
    folder = write(tmp_path / "captured", lines)
    write(folder, [good], "b")
    (folder / "c.jsonl").write_bytes(b"\xff\xfe\n" + good.encode()[:50])  # the last line of a file that was cut
    (folder / ".monitored").touch()
    found = report(watched, folder, "--endpoint", "e")
    bad["damaged, or input or output is missing"] += ["", ""]
    assert found["skipped"] == {reason: len(texts) for reason, texts in bad.items()}
    assert (found["images"], found["requests"]) == (3, 3 + sum(map(len, bad.values())))
    shown = capsys.readouterr().out
    assert f"skipped 1 of {found['requests']} requests: answered by a model with other classes" in shown
    assert json.loads(shown.splitlines()[-1])["Skipped"] == sum(map(len, bad.values()))


def test_only_the_period_counts(watched: Path, model: inference.Classifier, tmp_path: Path) -> None:
    end = datetime(2026, 11, 21, 12, tzinfo=UTC)
    moments = [end, end + timedelta(minutes=1), end - timedelta(seconds=1), end - timedelta(hours=1),
               end - timedelta(hours=1, seconds=1), end - timedelta(days=1)]  # fmt: skip
    lines = [answered(model, png(draw("up", 1)), when) for when in moments]
    for hours, images in ((1, 2), (24, 4)):
        found = report(
            watched, write(tmp_path / "captured", lines), "--end", "2026-11-21T12:20:00Z", "--hours", str(hours)
        )
        assert found["images"] == images
        assert found["skipped"] == {"outside of the period": 6 - images}
        assert found["end"] == "2026-11-21T12:00:00+00:00"
    for hour, requests in (("10", 1), ("13", 1), ("09", 0), ("14", 0)):  # files of the hours beside it are read
        place = tmp_path / hour / "captured" / "AllTraffic" / "2026" / "11" / "21" / hour / "a.jsonl"
        place.parent.mkdir(parents=True)
        place.write_text(lines[2])
        found = report(watched, tmp_path / hour / "captured", "--end", "2026-11-21T12:20:00Z")
        assert (found["requests"], found["images"]) == (requests, requests)


def test_the_metrics_are_what_the_alarm_and_the_dashboard_read(
    watched: Path, model: inference.Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = [png(image.point(lambda value: value // 8)) for image in usual(2)]
    write(tmp_path / "captured", [answered(model, body) for body in dark])
    found = report(watched, tmp_path / "captured", "--endpoint", NAME)
    emitted = json.loads(capsys.readouterr().out.splitlines()[-1])
    (directive,) = emitted["_aws"]["CloudWatchMetrics"]
    assert abs(emitted["_aws"]["Timestamp"] / 1000 - datetime.now(UTC).timestamp()) < 60
    assert directive["Namespace"] == verb_module.NAMESPACE
    assert directive["Dimensions"] == [["EndpointName"]]
    names = {metric["Name"] for metric in directive["Metrics"]}
    assert names == {"Images", "Skipped", *verb_module.MEASURES}
    assert all(isinstance(emitted[name], int | float) for name in names)
    brightness = found["measures"]["brightness"]
    assert emitted["Drift"] >= emitted["Brightness"] == brightness["psi"] / brightness["limit"] > 1
    place = verb_module.Watched(emitted["EndpointName"], "AllTraffic", "", "")
    (alarm,) = (alarm for alarm in verb_module.alarms(config.load(), place) if alarm["MetricName"] == "Drift")
    assert alarm["Namespace"] == directive["Namespace"]
    assert alarm["Dimensions"] == [{"Name": "EndpointName", "Value": NAME}]
    assert (alarm["Threshold"], alarm["ComparisonOperator"]) == (1.0, "GreaterThanThreshold")
    read = {row[1] for widget in verb_module.widgets(config.load(), place) for row in widget["properties"]["metrics"]
            if row[0] == directive["Namespace"]}  # fmt: skip
    assert read == names - {"Skipped"}


def test_what_is_wrong_is_one_sentence(watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.tar.gz").write_bytes(b"x")
    for file, folder, words in [
        (tmp_path / "none.tar.gz", tmp_path, "there is no artifact at"),
        (tmp_path / "broken.tar.gz", tmp_path, "cannot be unpacked"),
        (watched, tmp_path / "none", "is no folder; name one that holds captured requests"),
    ]:
        code = monitor.main(["--artifact", str(file), "--data", str(folder), "--output", str(tmp_path / "o")])
        assert code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1


def test_the_script_needs_no_torch() -> None:
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import processing.monitor; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_a_folder_is_compared_here_without_an_account(
    watched: Path, model: inference.Classifier, verb: Verb, project: Path, tmp_path: Path
) -> None:
    folder = project / "artifacts" / "20261121-093000-a1b2"
    folder.mkdir(parents=True)
    (folder / "model.tar.gz").write_bytes(watched.read_bytes())
    (project / "artifacts" / "latest").symlink_to(folder.name)
    captured = write(tmp_path / "my captures", [answered(model, png(image)) for image in usual(3, 60)])
    done = verb("monitor", "--data", str(captured), "--set", "monitoring.minimum=50")
    assert done.returncode == 0, done.stderr
    assert "no drift: 60 images against 180 of the baseline (minimum 50)" in done.stdout
    assert json.loads((folder / "monitoring" / "report.json").read_text())["verdict"] == "no drift"
    failed = verb("monitor", "--data", str(tmp_path / "none"))
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert "RUN goes with DATA" in verb("monitor", "--run", folder.name).stderr


# ---- AWS


def watch(*overrides: str, name: str = NAME, yes: bool = True) -> None:
    verb_module.monitor(Account(settings(*overrides)), name, yes)


def ours(calls: Recorder) -> Recorder:
    """The writing requests of `monitor`, those of `deploy` apart."""
    names = ("PutMetricAlarm", "PutDashboard")
    return Recorder(
        (name, given) for name, given in calls
        if name in names
        or (str(given.get("Name", given.get("Key"))).endswith(("-monitor", "/.monitored")) and name[:3] != "Get")
    )  # fmt: skip


def requested(calls: Recorder, operation: str) -> dict[str, Any]:
    """The job that the newest schedule starts, after botocore's validator has taken it."""
    job: dict[str, Any] = json.loads(ours(calls).named(operation)[-1]["Target"]["Input"])
    text = json.dumps(job).replace("<aws.scheduler.execution-id>", "d32c5kddcf5bb8c3")
    text = text.replace("<aws.scheduler.scheduled-time>", "2026-11-21T12:20:00Z")
    shape = get_session().get_service_model("sagemaker").operation_model("CreateProcessingJob").input_shape
    found = ParamValidator().validate(json.loads(text), shape)
    assert not found.has_errors(), found.generate_report()
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", json.loads(text)["ProcessingJobName"])
    return job


def expanded(calls: Recorder) -> Recorder:
    """With what is JSON inside of a request as such."""
    found = Recorder()
    for name, given in ours(calls):
        shown = dict(given)
        if "Target" in shown:
            shown["Target"] = {**shown["Target"], "Input": json.loads(shown["Target"]["Input"])}
        if "DashboardBody" in shown:
            shown["DashboardBody"] = json.loads(shown["DashboardBody"])
        shown.pop("EndDate", None)
        found.append((name, shown))
    return found


@pytest.fixture
def captured(hosting: Hosting) -> Hosting:
    """An endpoint that captures; the code is uploaded already."""
    boto3.client("s3").put_object(Bucket=STACK.bucket, Key=f"source/{project.source_hash()}.complete", Body=b"")
    run("endpoint.capture_percent=50")
    return hosting


def test_what_monitor_makes(captured: Hosting, capsys: pytest.CaptureFixture[str]) -> None:
    made = captured.calls
    watch()
    printed = capsys.readouterr().out
    assert "hourly a processing job on 1 x ml.m5.large of 30 minutes at most, 3 alarms, a dashboard" in printed
    assert (
        "0.25 USD an hour, 6.00 USD a day at most; with CloudWatch 2.06 USD until the endpoint ends in 8.0" in printed
    )
    assert printed.index("at most") < printed.index("is compared hourly")
    check_golden("monitor", expanded(made))
    job = requested(made, "CreateSchedule")
    assert {"Key": "project", "Value": NAME} in job["Tags"]
    schedule = boto3.client("scheduler").get_schedule(Name=f"{NAME}-monitor")
    ends = boto3.client("scheduler").get_schedule(Name=f"{NAME}-end")["ScheduleExpression"]
    assert f"at({schedule['EndDate']:%Y-%m-%dT%H:%M:%S})" == ends  # and it deletes itself then
    assert schedule["ActionAfterCompletion"] == "DELETE"
    cloudwatch = boto3.client("cloudwatch")
    alarms = cloudwatch.describe_alarms()["MetricAlarms"]
    assert {alarm["AlarmName"] for alarm in alarms} == {f"{NAME}-{what}" for what in ("drift", "errors", "latency")}
    assert {action for alarm in alarms for action in alarm["AlarmActions"]} == {STACK.topic}
    assert json.loads(cloudwatch.get_dashboard(DashboardName=f"{NAME}-monitor")["DashboardBody"])["widgets"]


def test_the_job_reads_what_the_endpoint_serves(captured: Hosting) -> None:
    watch("monitoring.schedule=daily", *NETWORK, f"aws.kms_key={KEY}", "compute.isolation=true")
    check_golden("monitor_everything", expanded(captured.calls))
    job = requested(captured.calls, "CreateSchedule")
    inputs = {item["InputName"]: item["S3Input"]["S3Uri"] for item in job["ProcessingInputs"]}
    serves = boto3.client("sagemaker").list_models()["Models"][0]["ModelName"]
    facts = boto3.client("sagemaker").describe_model(ModelName=serves)
    assert inputs["artifact"] == facts["PrimaryContainer"]["ModelDataUrl"]
    assert inputs["captured"] == f"s3://{STACK.bucket}/capture/{NAME}/AllTraffic/"
    assert "VolumeKmsKeyId" in job["ProcessingResources"]["ClusterConfig"]
    watch("monitoring.instance_type=ml.g5.xlarge", f"aws.kms_key={KEY}")
    job = requested(captured.calls, "UpdateSchedule")
    assert "VolumeKmsKeyId" not in job["ProcessingResources"]["ClusterConfig"]  # it has a disk of its own


def test_again_it_is_updated_in_place(captured: Hosting) -> None:
    watch()
    run("endpoint.capture_percent=50", "endpoint.ttl_hours=2", run="20261121-093000-a1b2")
    watch("monitoring.schedule=daily", "monitoring.limit=0.5", "monitoring.minimum=7", "monitoring.latency_ms=20")
    tried = ours(captured.calls)
    assert [name for name, _ in tried if "Schedule" in name] == ["UpdateSchedule", "CreateSchedule", "UpdateSchedule"]
    job = requested(captured.calls, "UpdateSchedule")
    words = job["AppSpecification"]["ContainerArguments"]
    assert dict(zip(words[::2], words[1::2], strict=True)).items() >= {"--limit": "0.5", "--minimum": "7",
                                                                       "--hours": "24"}.items()  # fmt: skip
    scheduler, ending = boto3.client("scheduler"), [f"{NAME}-end{what}" for what in ("", "-alarms", "-dashboard")]
    assert {item["Name"] for item in scheduler.list_schedules()["Schedules"]} == {*ending, f"{NAME}-monitor"}
    assert len({scheduler.get_schedule(Name=name)["ScheduleExpression"] for name in ending}) == 1  # all moved with it
    alarms = boto3.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert {alarm["Threshold"] for alarm in alarms} == {1.0, 0.05, 20_000.0}
    ends = scheduler.get_schedule(Name=f"{NAME}-monitor")["EndDate"]
    assert ends - datetime.now(UTC) < timedelta(hours=2)


def test_the_model_of_a_package_and_the_busiest_variant(captured: Hosting) -> None:
    package = "arn:aws:sagemaker:us-east-1:123456789012:model-package/models/1"
    uri = "s3://elsewhere/a/model.tar.gz"
    answers = captured.calls.answers
    answers["DescribeEndpointConfig"] = {
        "DataCaptureConfig": {"EnableCapture": True, "InitialSamplingPercentage": 5, "DestinationS3Uri": "s3://b/c/",
                              "CaptureOptions": [{"CaptureMode": "InputAndOutput"}]},
        "ProductionVariants": [{"VariantName": "AllTraffic", "ModelName": "a", "InitialVariantWeight": 10.0},
                               {"VariantName": "challenger", "ModelName": "b", "InitialVariantWeight": 90.0}],
    }  # fmt: skip
    answers["DescribeModel"] = lambda asked: {"Containers": [{"ModelPackageName": package}]} if asked == {
        "ModelName": "b"} else {}  # fmt: skip
    answers["DescribeModelPackage"] = {"InferenceSpecification": {"Containers": [{"ModelDataUrl": uri}]}}
    found = verb_module.find(Account(settings()), NAME)
    assert found == verb_module.Watched(NAME, "challenger", f"s3://b/c/{NAME}/challenger", uri)


@pytest.mark.parametrize(
    "capture",
    [
        None,
        {"EnableCapture": False, "InitialSamplingPercentage": 5},
        {"EnableCapture": True, "InitialSamplingPercentage": 0},
        {"EnableCapture": True, "InitialSamplingPercentage": 5, "CaptureOptions": [{"CaptureMode": "Input"}]},
    ],
)
def test_without_capture_it_refuses_with_the_fix(captured: Hosting, capture: dict[str, Any] | None) -> None:
    both = {"CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}]}
    facts: dict[str, Any] = {"ProductionVariants": [{"VariantName": "AllTraffic", "ModelName": "a"}]}
    captured.calls.answers["DescribeEndpointConfig"] = facts | (
        {"DataCaptureConfig": both | capture} if capture else {}
    )
    with pytest.raises(UserError, match=rf"does not capture .* make deploy ENDPOINT={NAME} ARGS='--set endpoint.capt"):
        watch()
    assert not ours(captured.calls)


def test_without_an_endpoint(hosting: Hosting) -> None:
    with pytest.raises(UserError, match=f"there is no endpoint {NAME}"):
        watch()
    assert not ours(hosting.calls)


def test_it_asks_and_keeps_to_the_budget(captured: Hosting, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"2\.06 USD is over aws\.budget_usd"):
        watch("aws.budget_usd=1", yes=False)
    assert "at most" in capsys.readouterr().out
    with pytest.raises(UserError, match="say YES=1"):
        watch(yes=False)
    assert not ours(captured.calls)
    run("endpoint.capture_percent=50", "endpoint.ttl_hours=0", "aws.budget_usd=900")
    with pytest.raises(UserError, match=r"188\.\d\d USD is over"):  # a month of it
        watch(yes=False)
    watch("monitoring.schedule=daily")
    assert "EndDate" not in ours(captured.calls).named("CreateSchedule")[0]


@pytest.mark.usefixtures("captured")
def test_a_comparison_that_comes_too_late_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    watch("monitoring.schedule=daily")
    assert "WARNING: it may end before the first comparison" in capsys.readouterr().out
    watch()
    assert "WARNING" not in capsys.readouterr().out


def attached() -> dict[str, str]:
    found = [item for item in inventory.everything(Account(settings())) if item.of]
    return {item.kind if item.kind != "alarm" else item.name: item.of for item in found}


def test_status_shows_it_and_destroy_removes_it(captured: Hosting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destroy, "PAUSE", 0.0)
    for listed in ("HyperParameterTuningJob", "TrainingJob", "ProcessingJob", "TransformJob"):
        captured.calls.answers[f"List{listed}s"] = {f"{listed}Summaries": []}
    run("endpoint.capture_percent=50", endpoint=f"{NAME}-b")
    both = (NAME, f"{NAME}-b")
    for name in both:
        watch(name=name)
    scheduler = boto3.client("scheduler")
    for name, tags in ((f"{NAME}-2-monitor", [{"Key": "project", "Value": f"{NAME}-2"}]), (f"{NAME}-other", [])):
        target = {"Arn": "arn:aws:scheduler:::aws-sdk:sagemaker:createProcessingJob", "RoleArn": STACK.role,
                  "Input": json.dumps({"Tags": tags})}  # fmt: skip
        scheduler.create_schedule(Name=name, ScheduleExpression="rate(1 hour)", FlexibleTimeWindow={"Mode": "OFF"},
                                  Target=target)  # fmt: skip
    cloudwatch = boto3.client("cloudwatch")
    cloudwatch.put_dashboard(DashboardName=f"{NAME}-mine", DashboardBody="{}")
    items = inventory.everything(Account(settings()))
    wanted = ["monitoring", "dashboard", "end schedule", "end of alarms", *(f"{name}-{what}" for name in both
                                                           for what in ("drift", "errors", "latency"))]  # fmt: skip
    assert {*attached()} == {*wanted}
    lines = inventory.table(items)
    assert re.search(rf"monitoring +{NAME}-monitor .*0\.250 USD/h  hourly 1 x ml\.m5\.large, 30 min", "\n".join(lines))
    start = len(captured.calls)
    destroy.destroy(Account(settings()), NAME, yes=True)
    gone = {
        item for name, given in captured.calls[start:] if name.startswith("Delete") for item in map(str, given.values())
    }
    assert {f"{NAME}-monitor", f"['{NAME}-monitor']", f"['{NAME}-drift']"} <= gone
    assert {*attached().values()} == {f"{NAME}-b"}
    boto3.client("sagemaker").delete_endpoint(EndpointName=f"{NAME}-b")  # its time was up: the alarms are left
    assert "end schedule" not in attached()
    assert any(item.kind == "monitoring" for item in inventory.everything(Account(settings())))
    destroy.destroy(Account(settings()), f"{NAME}-b", yes=True)
    assert attached() == {}
    assert {item["Name"] for item in scheduler.list_schedules()["Schedules"]} >= {f"{NAME}-2-monitor", f"{NAME}-other"}
    assert [board["DashboardName"] for board in cloudwatch.list_dashboards()["DashboardEntries"]] == [f"{NAME}-mine"]
    with pytest.raises(UserError, match=f"the project has no endpoint {NAME}-b"):
        destroy.destroy(Account(settings()), f"{NAME}-b", yes=True)


def test_refusals_of_aws_are_one_sentence(captured: Hosting) -> None:
    from botocore.exceptions import ClientError

    denied = ClientError({"Error": {"Code": "AccessDeniedException", "Message": "no"}}, "UpdateSchedule")
    captured.calls.answers["UpdateSchedule"] = denied
    with pytest.raises(UserError, match=rf"monitoring {NAME} failed: no .*make doctor"):
        watch()
