"""Run a job as processes on this machine, under the contract that the script meets in a container.

Paths differ from a container's; the names of variables, arguments and files do not (a test compares them).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from pipelines.local import engine
from pipelines.local.job import GRACE, LAUNCHER, MASTER_PORT, Job, JobFailed, Outputs, failure_reason
from pipelines.local.view import TrainingView


def run(job: Job, view: TrainingView) -> Outputs:
    """Train with one launcher a host.

    Raises:
        JobFailed: when a process failed; the others are stopped by then.
        Interrupted: when a signal came; all processes are stopped by then.
    """
    hosts = [f"algo-{number}" for number in range(1, job.instances + 1)]
    gpus = engine.gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    port = MASTER_PORT if job.instances == 1 else _free_port()
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for host in hosts:
            environment = contract(job, host, hosts, gpus, port)
            for name in ("SM_INPUT_CONFIG_DIR", "SM_MODEL_DIR", "SM_OUTPUT_DATA_DIR"):
                Path(environment[name]).mkdir(parents=True, exist_ok=True)
            started = subprocess.Popen(
                [sys.executable, LAUNCHER], cwd=job.source, env=os.environ | environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            processes.append(started)
            readers.append(threading.Thread(target=_copy, args=(started, host, job.instances, view), daemon=True))
            readers[-1].start()
        code = _wait(processes)
    finally:
        _stop(processes)
        for reader in readers:
            reader.join(timeout=10)
    if code:
        raise JobFailed(failure_reason(job.root, f"the script ended with exit code {code}"))
    return Outputs(model=job.root / "model", data=job.root / "algo-1" / "output" / "data")


def contract(job: Job, host: str, hosts: list[str], gpus: int, port: int) -> dict[str, str]:
    """The `SM_*` variables that SDK V3's container driver sets, with paths of this machine."""
    base = job.root / host
    hyperparameters = _as_driver_reads(job.hyperparameters)
    channels = {**job.channels, "code": job.source}
    kind = "local_gpu" if gpus else "local_cpu"
    resources = {"current_host": host, "hosts": hosts, "network_interface_name": "lo", "current_instance_type": kind}
    inputs = {name: {"TrainingInputMode": "File"} for name in channels}
    values: dict[str, Any] = {
        "SM_MODEL_DIR": str(job.root / "model"),
        "SM_INPUT_DIR": str(base / "input"),
        "SM_INPUT_DATA_DIR": str(base / "input" / "data"),
        "SM_INPUT_CONFIG_DIR": str(base / "input" / "config"),
        "SM_OUTPUT_DIR": str(base / "output"),
        "SM_OUTPUT_FAILURE": str(base / "output" / "failure"),
        "SM_OUTPUT_DATA_DIR": str(base / "output" / "data"),
        "SM_LOG_LEVEL": 20,
        "SM_MASTER_ADDR": "127.0.0.1",
        "SM_MASTER_PORT": port,
        "SM_SOURCE_DIR": str(job.source),
        "SM_ENTRY_SCRIPT": "",  # the job has a command instead
        "SM_CHANNELS": list(channels),
        "SM_HPS": hyperparameters,
        "SM_CURRENT_HOST": host,
        "SM_CURRENT_INSTANCE_TYPE": kind,
        "SM_HOSTS": hosts,
        "SM_NETWORK_INTERFACE_NAME": "lo",
        "SM_HOST_COUNT": len(hosts),
        "SM_CURRENT_HOST_RANK": hosts.index(host),
        "SM_NUM_CPUS": os.cpu_count(),
        "SM_NUM_GPUS": gpus,
        "SM_NUM_NEURONS": 0,
        "SM_RESOURCE_CONFIG": resources,
        "SM_INPUT_DATA_CONFIG": inputs,
        "TRAINING_JOB_NAME": job.name,
    }
    values |= {f"SM_CHANNEL_{name.upper()}": str(path) for name, path in channels.items()}
    values |= {f"SM_HP_{name.upper()}": value for name, value in hyperparameters.items()}
    values["SM_TRAINING_ENV"] = {
        "channel_input_dirs": {name: str(path) for name, path in channels.items()},
        "current_host": host,
        "hosts": hosts,
        "hyperparameters": hyperparameters,
        "job_name": job.name,
        "model_dir": values["SM_MODEL_DIR"],
        "num_cpus": values["SM_NUM_CPUS"],
        "num_gpus": gpus,
        "output_data_dir": values["SM_OUTPUT_DATA_DIR"],
    }
    return {name: _text(value) for name, value in values.items()} | job.environment


def _text(value: object) -> str:
    """A value as the SDK's driver writes it: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _as_driver_reads(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """The SDK's driver takes text that is JSON for what it spells: "1.10" becomes 1.1."""
    read = {}
    for name, value in hyperparameters.items():
        try:
            read[name] = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError:
            read[name] = value
    return read


def _copy(source: subprocess.Popen[str], host: str, instances: int, view: TrainingView) -> None:
    assert source.stdout is not None
    for line in source.stdout:
        view.write(line if instances == 1 or host == "algo-1" else f"{host}: {line}")


def _wait(processes: list[subprocess.Popen[str]]) -> int:
    """Wait for all, or until one fails: its exit code."""
    running = list(processes)
    while running:
        for candidate in list(running):
            try:
                code = candidate.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            running.remove(candidate)
            if code:
                return code
    return 0


def _stop(processes: list[subprocess.Popen[str]]) -> None:
    """SIGTERM to every process group that still runs; SIGKILL after the grace period."""
    for candidate in processes:
        if candidate.poll() is None:
            os.killpg(candidate.pid, signal.SIGTERM)
    for candidate in processes:
        try:
            candidate.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(candidate.pid, signal.SIGKILL)
            candidate.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
