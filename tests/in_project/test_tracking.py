"""Tracking: MLflow after the fact, whatever its store does, and TensorBoard's event files.

The tests of MLflow need `pipelines/tracking/`, which a bake with the answer mlflow has.
"""

from __future__ import annotations

import importlib
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines import ROOT
from tests.helpers import Verb, verb_environment
from training import board

RUN = "20261121-093000-a1b2"
HISTORY = [
    {"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch, "val_loss": 2 / epoch, "val_accuracy": epoch / 4,
     "images_per_second": 1000.0 + epoch}
    for epoch in (1, 2, 3)
]  # fmt: skip
needs_mlflow = pytest.mark.skipif(not (ROOT / "pipelines" / "tracking").exists(), reason="baked without mlflow")


@pytest.fixture
def run(project: Path) -> Path:
    """A finished run in a copy of the project."""
    folder = project / "artifacts" / RUN
    folder.mkdir(parents=True)
    (folder.parent / "latest").symlink_to(RUN)
    (folder / "model.tar.gz").write_bytes(b"weights")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in HISTORY))
    last = {key: HISTORY[-1][key] for key in ("val_accuracy", "val_loss", "train_loss")}
    (folder / "metrics.json").write_text(json.dumps(last | {"epochs": 3, "seconds": 60.0}))
    facts = {"run": RUN, "hyperparameters": {"epochs": 3, "model": "cnn"}, "git_commit": "abc", "mode": "process",
             "dataset_fingerprint": "f" * 64, "data": "data/digits", "seconds": 60.0}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def stored(project: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(project / "artifacts" / "mlflow.db") as database:
        return database.execute(query).fetchall()


@needs_mlflow
def test_a_run_is_logged_whole_and_once(run: Path, project: Path, verb: Verb) -> None:
    done = verb("track")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"logged run {RUN} to sqlite:///")
    query = "SELECT key, step, value FROM metrics ORDER BY key, step"
    points = stored(project, query)
    assert [point[1:] for point in points if point[0] == "val_accuracy"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [point[1:] for point in points if point[0] == "seconds"] == [(3, 60.0)]
    assert dict(stored(project, "SELECT key, value FROM params")) == {"epochs": "3", "model": "cnn"}
    tags = dict(stored(project, "SELECT key, value FROM tags"))
    assert tags["dataset_fingerprint"] == "f" * 64
    assert tags["git_commit"] == tags["mlflow.source.git.commit"] == "abc"
    assert tags["artifact"].endswith(f"artifacts/{RUN}/model.tar.gz")
    assert stored(project, "SELECT status, end_time - start_time FROM runs") == [("FINISHED", 60_000)]
    assert [path.read_bytes() for path in (project / "artifacts" / "mlflow").rglob("model.tar.gz")] == [b"weights"]

    assert verb("track", "--run", RUN).stdout.endswith("already\n")
    assert stored(project, query) == points

    (run / "evaluation.json").write_text(json.dumps({"metrics": {"accuracy": {"value": 0.5, "ci_low": 0.4}}}))
    assert verb("track").stdout.startswith("logged")  # `make evaluate` came later: only what is new is added
    assert set(stored(project, query)) - set(points) == {("test_accuracy", 3, 0.5)}
    assert len(stored(project, query)) == len(points) + 1
    assert len(stored(project, "SELECT * FROM runs")) == 1


@needs_mlflow
@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("call", ["log_batch", "log_artifact", "set_terminated"])
def test_a_run_that_was_logged_half_is_completed(call: str, project: Path, verb: Verb) -> None:
    """A kill at each place in between, and after the first half of the metrics."""
    code = (
        "import os, sys, mlflow, pipelines.tracking.track as track; track.BATCH = 4; count = 0\n"
        f"real = mlflow.MlflowClient.{call}\n"
        "def killed(*words, **options):\n"
        "    global count; count += 1\n"
        f"    if count == {3 if call == 'log_batch' else 1}: os._exit(9)\n"
        "    return real(*words, **options)\n"
        f"mlflow.MlflowClient.{call} = killed; track.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, env=verb_environment(), timeout=120)
    assert done.returncode == 9
    assert stored(project, "SELECT status FROM runs") == [("RUNNING",)]
    assert verb("track").stdout.startswith("logged")
    assert stored(project, "SELECT status FROM runs") == [("FINISHED",)]
    counts = stored(project, "SELECT key, COUNT(*) FROM metrics GROUP BY key")
    expected = {key: 3 for key in HISTORY[0] if key != "epoch"} | {"epochs": 1, "seconds": 1}
    assert dict(counts) == expected


Reply = Callable[[BaseHTTPRequestHandler], None]


def rubbish(status: int, body: bytes, kind: str = "application/json") -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then: no read ever waits long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(600):
        handler.wfile.write(b" ")
        time.sleep(0.2)


def silent(_: BaseHTTPRequestHandler) -> None:
    time.sleep(120)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that answers everything as the parameter says."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            try:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request.param(self)
            except OSError:
                pass  # nobody waits any more

        do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:secret@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def check_warning(done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 0
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"warning: run {RUN} is not in MLflow (")
    assert done.stderr.endswith(f"; log it with `make track RUN={RUN}`\n")
    assert reason in done.stderr
    assert "secret" not in done.stderr


INFO = {"run_id": "1", "run_uuid": "1", "run_name": RUN, "experiment_id": "1", "status": "RUNNING", "start_time": 1,
        "lifecycle_stage": "active", "artifact_uri": "mlflow-artifacts:/1"}  # fmt: skip
FORGETFUL = {"experiment": {"experiment_id": "1", "name": "x"}, "run": {"info": INFO, "data": {}}}
STORES = {
    "silent": (silent, "timed out"),
    "trickling": (trickle, "not done after 8 seconds"),
    "empty": (rubbish(200, b"{}"), "Invalid value"),
    "forgetful": (rubbish(200, json.dumps(FORGETFUL).encode()), "says yes to everything, but does not have the run"),
    "a login page": (rubbish(200, b"<html>sign in</html>", "text/html"), "not in a valid JSON format"),
    "cut": (rubbish(200, b'{"experiment": {"exp'), "not in a valid JSON format"),
    "of another kind": (rubbish(200, b'{"experiment": [1, 2], "runs": "none", "run": 7}'), ""),
    "failing": (rubbish(500, b"<html>oops</html>", "text/html"), "500"),
    "forbidding": (rubbish(403, b'{"error_code": "PERMISSION_DENIED", "message": "not yours"}'), "not yours"),
    "elsewhere": (rubbish(404, b"nothing here"), "404"),
}


@needs_mlflow
@pytest.mark.parametrize(("store", "reason"), STORES.values(), ids=STORES, indirect=["store"])
def test_a_slow_or_lying_store_costs_seconds_and_one_line(store: str, reason: str, run: Path, project: Path) -> None:
    code = "import pipelines.tracking.track as track; track.PATIENCE = 8.0; raise SystemExit(track.main())"
    environment = verb_environment() | {"MLFLOW_TRACKING_URI": store, "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
    command = [sys.executable, "-c", code, "--optional"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)
    check_warning(done, reason)
    assert run.exists()


@needs_mlflow
def test_a_store_that_is_down_says_so(run: Path, verb: Verb) -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"
        check_warning(verb("track", "--optional", MLFLOW_TRACKING_URI=uri), "Connection refused")
        done = verb("track", "--set", f"tracking.uri={uri}")
    assert done.returncode == 1  # asked for by name it is an error
    assert len(done.stderr.splitlines()) == 1
    assert "Connection refused" in done.stderr
    assert run.exists()


@needs_mlflow
def test_a_database_that_is_locked_or_no_database(run: Path, project: Path, verb: Verb) -> None:
    file = project / "artifacts" / "mlflow.db"
    assert verb("track").returncode == 0
    shutil.copytree(run, run.with_name("20261121-093000-ffff"))
    (run.parent / "latest").unlink()
    facts = run.with_name("20261121-093000-ffff") / "run.json"
    facts.write_text(facts.read_text().replace(RUN, "20261121-093000-ffff"))
    with sqlite3.connect(file) as database:
        database.execute("BEGIN EXCLUSIVE")
        done = verb("track", "--optional", "--run", "20261121-093000-ffff")
        database.rollback()
    assert done.returncode == 0
    assert "database is locked" in done.stderr
    file.write_bytes(b"no database at all" * 100)
    done = verb("track", "--optional", "--run", RUN)
    check_warning(done, "file is not a database")


@needs_mlflow
@pytest.mark.parametrize("store", [silent], indirect=True)
def test_training_is_done_once_and_well_whatever_the_store_does(store: str, project: Path) -> None:
    """`make train-local` with a store that never answers: its run is published before anyone asks the store."""
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (project / ".venv" / "bin" / "python").chmod(0o755)
    (project / ".venv" / ".ready").touch()
    words = ["make", "train-local", "LOCAL_MODE=process", "ARGS=--set training.epochs=2"]
    environment = verb_environment() | {"MLFLOW_TRACKING_URI": store, "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "validation accuracy" in done.stdout
    assert "warning: run " in done.stderr
    assert "ignored" not in done.stderr
    assert len([path for path in (project / "artifacts").iterdir() if not path.is_symlink()]) == 1


ARN = "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/ours"


@needs_mlflow
@pytest.mark.filterwarnings("ignore:.*wsgi is deprecated")
def test_an_arn_is_a_signed_conversation_with_sagemaker(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLflow's own server in this process behind AWS's plugin: what is sent is understood, signed and kept once."""
    track: Any = importlib.import_module("pipelines.tracking.track")
    import mlflow
    import requests
    from mlflow.server import app, handlers

    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    handlers.initialize_backend_stores(f"sqlite:///{tmp_path}/server.db", default_artifact_root=str(tmp_path / "kept"))
    server, asked = app.test_client(), []

    def send(_: object, request: requests.PreparedRequest, **__: Any) -> requests.Response:
        asked.append(request)
        told = server.open(request.path_url, method=request.method, data=request.body, headers={
            key: value for key, value in request.headers.items() if key not in ("Host", "Content-Length")})  # fmt: skip
        reply = requests.Response()
        reply.status_code, reply._content, reply.url = told.status_code, told.data, str(request.url)
        return reply

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    try:
        assert track.log(run, ARN) == f"logged run {RUN} to {ARN}"
        assert track.log(run, ARN) == f"run {RUN} is in {ARN} already"
    finally:
        mlflow.set_tracking_uri("")
    assert {request.url.partition("/api")[0] for request in asked if request.url} == {
        "https://eu-west-1.experiments.sagemaker.aws"
    }
    assert all("/eu-west-1/sagemaker-mlflow/aws4_request" in request.headers["Authorization"] for request in asked)
    assert [path.read_bytes() for path in (tmp_path / "kept").rglob("model.tar.gz")] == [b"weights"]
    with sqlite3.connect(tmp_path / "server.db") as database:
        assert database.execute("SELECT COUNT(*) FROM metrics").fetchone() == (3 * 5 + 2,)


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.glob(board.FILES)
    events = EventAccumulator(str(file)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_every_epoch_is_a_point_once_in_every_folder(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b" / "c"]
    for resumed in (0, 2):  # a run that is resumed tells all that was before, and replaces the file
        made = board.Board(folders)
        for epochs in range(resumed + 1, 4):
            made.add(HISTORY[:epochs])
            found = points(folders[1])
            assert found["val_accuracy"] == [(epoch, epoch / 4) for epoch in range(1, epochs + 1)]
    assert points(folders[0]) == found
    assert set(found) == set(HISTORY[0]) - {"epoch", "step"}


def test_events_that_cannot_be_written_cost_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    made = board.Board([tmp_path / "file" / "folder"])
    with caplog.at_level("INFO", "training"):
        for epochs in (1, 2, 3):
            made.add(HISTORY[:epochs])
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("warning: no more TensorBoard events, ")


def test_without_tensorboard_nothing_is_written_and_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with caplog.at_level("INFO", "training"):
        board.Board([tmp_path]).add(HISTORY)
    assert not caplog.messages
    assert not list(tmp_path.iterdir())


def test_a_run_has_its_events_and_sagemaker_gets_them_live(packed: Path, tmp_path: Path) -> None:
    folders = {"SM_CHANNEL_TRAIN": packed / "train", "SM_CHANNEL_VALIDATION": packed / "validation",
               "SM_MODEL_DIR": tmp_path / "model", "SM_OUTPUT_DATA_DIR": tmp_path / "output",
               "TENSORBOARD_FOLDER": tmp_path / "live"}  # fmt: skip
    command = [sys.executable, "training/train.py", "--epochs", "2", "--batch_size", "16"]
    environment = verb_environment() | {name: str(path) for name, path in folders.items()}
    subprocess.run(command, cwd=ROOT / "src", env=environment, check=True, capture_output=True)
    lines = (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()
    found = points(tmp_path / "live")
    assert found == points(tmp_path / "output")
    wanted = [epoch["val_accuracy"] for epoch in map(json.loads, lines)]
    assert [value for _, value in found["val_accuracy"]] == pytest.approx(wanted)
