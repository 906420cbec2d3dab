"""Run a job in real containers through SDK V3's `ModelTrainer`, and clean up what its local mode leaves behind."""

from __future__ import annotations

import contextlib
import os

from pipelines import project
from pipelines.local import engine
from pipelines.local.job import LAUNCHER, Interrupted, Job, JobFailed, Outputs, failure_reason
from pipelines.local.view import TrainingView
from pipelines.terminal import log_to


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
        with contextlib.redirect_stdout(view):
            trainer.train(input_data_config=inputs, wait=True)
    except Interrupted:
        raise
    except Exception as error:  # the SDK raises RuntimeError for a failed container, and others for its own troubles
        reason = view.last_line if "Failed to run" in str(error) else str(error).partition("\n")[0]
        raise JobFailed(failure_reason(job.root, reason or type(error).__name__)) from error
    finally:
        view.close()  # or its bar would write over what follows
        engine.remove_run(job.root)
        engine.give_back(image, job.root, job.channels["checkpoints"])
        if python_path is not None:
            os.environ["PYTHONPATH"] = python_path
    return Outputs(model=job.root / "artifacts" / "model", data=job.root / "artifacts" / "output" / "data")
