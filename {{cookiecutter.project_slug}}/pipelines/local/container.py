"""Run a job in real containers through SDK V3's `ModelTrainer`, and clean up what its local mode leaves behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines import ROOT, project
from pipelines.local import engine
from pipelines.local.job import LAUNCHER, Interrupted, Job, JobFailed, Outputs, failure_reason
from pipelines.local.view import TrainingView
from pipelines.terminal import log_to

DATA = "/opt/ml/input/data/"
WRITTEN = [f"{DATA}{channel}" for channel in ("checkpoints", "sm_drivers")]  # the second by the SDK's own `chmod +x`
WEIGHTS = "/root/.cache/torch/hub/checkpoints"  # where torch keeps what it downloaded, in the image
# A container's root has two rights: to write into folders of the person who started it, and to do that `chmod` there.
RIGHTS = {"cap_drop": ["ALL"], "cap_add": ["DAC_OVERRIDE", "FOWNER"], "security_opt": ["no-new-privileges:true"]}


@contextlib.contextmanager
def least_rights() -> Iterator[None]:
    """Let the SDK start its containers with no more rights than they need.

    Its local mode takes no such option: it writes a file for compose, and starts that. So the file is written anew
    between the two, with `RIGHTS`, and with all channels but the checkpoints, `src/` among them, read-only. It also
    shares this machine's cache of published weights, or each run would download them.
    """
    import yaml
    from sagemaker.train.local.local_container import _LocalContainer

    write = _LocalContainer._generate_compose_file

    def written(self: Any, environment: dict[str, str], volumes: list[str]) -> Any:
        content = write(self, environment, volumes)
        services = {
            host: service | RIGHTS | {"volumes": [*map(read_only, service["volumes"]), f"{cache()}:{WEIGHTS}"]}
            for host, service in content["services"].items()
        }
        file = Path(self.container_root, "docker-compose.yaml")
        file.write_text(yaml.safe_dump(content | {"services": services}), encoding="utf-8")
        return content  # the SDK takes its own apart

    _LocalContainer._generate_compose_file = written
    try:
        yield
    finally:
        _LocalContainer._generate_compose_file = write


def cache() -> Path:
    """Where torch keeps downloaded weights on this machine, as `torch.hub.get_dir` says; it need not be installed.

    Docker from snap sees no folder whose name begins with a dot right in the home folder, so there they are kept here.
    """
    hidden = engine.about("Docker Root Dir").startswith("/var/snap/")
    cached = str(ROOT / ".cache") if hidden else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("TORCH_HOME") or f"{cached}/torch").expanduser() / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def read_only(volume: str) -> str:
    """A volume of compose's file, read-only where the container has nothing to write there."""
    place, *flags = volume.split(":")[1:]
    if not place.startswith(DATA) or place in WRITTEN:
        return volume
    return ":".join([*volume.split(":")[:2], ",".join([*flags, "ro"])])


def run(job: Job, image: str, view: TrainingView) -> Outputs:
    """Train in one container a host.

    Args:
        job: what to run.
        image: an image of the local engine.
        view: takes the containers' output.

    Raises:
        JobFailed: when a container failed.
        Interrupted: when a signal came; the containers are stopped by then.
    """
    log_to(job.root / "sdk.log")
    from sagemaker.core.training.configs import Compute, InputData, SourceCode
    from sagemaker.train.model_trainer import Mode, ModelTrainer

    gpus = engine.container_gpus()
    trainer = ModelTrainer(
        training_mode=Mode.LOCAL_CONTAINER,
        training_image=image,
        base_job_name=project.name()[:40],
        source_code=SourceCode(source_dir=str(job.source), command=f"exec python3 {LAUNCHER}"),
        compute=Compute(instance_type="local_gpu" if gpus else "local_cpu", instance_count=job.instances),
        hyperparameters=job.hyperparameters,
        environment=job.environment | {"PYTHONDONTWRITEBYTECODE": "1"},  # or root would leave files in src/
        local_container_root=str(job.root),
    )
    inputs = [InputData(channel_name=name, data_source=str(path)) for name, path in job.channels.items()]
    python_path = os.environ.pop("PYTHONPATH", None)  # it would break the Python of docker-compose 1.29
    try:
        with contextlib.redirect_stdout(view), least_rights():
            trainer.train(input_data_config=inputs, wait=True)
        if not (job.root / "artifacts" / "output" / "data" / "run.json").exists():  # which training writes last
            # docker-compose 1.29 may miss the exit code of a container that ends at once, and then ends with 0 itself.
            exited = ["--filter", f"label=com.docker.compose.project={job.root.name}", "--filter", "exited=0"]
            if len(engine.docker("ps", "--all", "--quiet", *exited).stdout.split()) < job.instances:
                raise RuntimeError("Failed to run")
    except Interrupted:
        raise
    except Exception as error:  # the SDK raises RuntimeError for a failed container, and others for its own troubles
        reason = view.last_line if "Failed to run" in str(error) else str(error).partition("\n")[0]
        raise JobFailed(failure_reason(job.root, reason or type(error).__name__)) from error
    finally:
        view.close()  # or its bar would write over what follows
        engine.remove_run(job.root)
        engine.give_back(image, job.root, job.channels["checkpoints"], cache())
        os.environ |= {"PYTHONPATH": python_path} if python_path is not None else {}
    return Outputs(model=job.root / "artifacts" / "model", data=job.root / "artifacts" / "output" / "data")
