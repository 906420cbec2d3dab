"""Train on SageMaker: `make train`, `make train DATA=s3://bucket/packed WAIT=1`, `make train RUN=<name>` to resume.

    python -m pipelines train --data photos --wait --set compute.instance_type=ml.g5.2xlarge

The same source, command and hyperparameters as `make train-local`, through SDK V3's `ModelTrainer`. The checkpoints of
a run have a prefix of their own in the bucket, so that spot interruptions and `RUN=` go on where the run stood.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import ROOT, SOURCE, project, runs, terminal
from pipelines.cloud import images, jobs, limits, prices, storage
from pipelines.cloud.account import Account, volume_key
from pipelines.config import Settings, load
from pipelines.local import data
from pipelines.local.job import LAUNCHER
from pipelines.terminal import UserError
from training.config import parse

NUMBER = "=([0-9.eE+-]+)"
METRICS = {
    "train:loss": "train_loss", "validation:loss": "val_loss", "validation:accuracy": "val_accuracy",
    "validation:f1": "val_f1", "validation:worst_recall": "val_worst_recall",
    "train:images_per_second": "images_per_second",
}  # fmt: skip
LIVE = "/opt/ml/output/tensorboard"  # what is written there SageMaker puts into the bucket, while the job runs


@dataclass(frozen=True)
class Request:
    """What a job trains: hyperparameters, S3 prefixes by channel, where its source and its checkpoints lie."""

    run: str
    hyperparameters: dict[str, Any]
    channels: dict[str, Any]
    source: str = str(SOURCE)
    checkpoints: Any = None


def train(account: Account, source: str | None, run: str | None, yes: bool, plan: bool = False) -> str:
    """Start a training job.

    Args:
        account: to work in.
        source: folder of raw images, or the S3 prefix of a packed data set; None: the configured one.
        run: a run that was stopped or failed, to resume with its own data and hyperparameters; None: a fresh one.
        yes: go on although it is over budget.
        plan: only say what would be created, and end.

    Returns:
        The job's name.

    Raises:
        UserError: when no job was started.
    """
    settings = account.settings
    compute, source = settings.compute, source or settings.data.source
    if not run:
        data.look(source)
    prices.stack(account, plan)
    request = _resumed(account, run) if run else None
    local = None if plan or request or source.startswith("s3://") else data.prepare(settings, source)
    name, image = run or runs.new_name(), images.uri(account, "training")
    hours = longest(settings)
    where = request.channels["train"] if request else local.relative_to(ROOT) if local else source
    warm = f" with {compute.keep_alive_minutes} minutes of warm pool" if compute.keep_alive_minutes else ""
    price = prices.hourly(account, "training", compute.instance_type)
    prices.afford(
        settings,
        f"run {name}: a training job in {prices.where(settings)} on {machines(settings)}, {hours:g} hours at most"
        f"{warm}, in {image}, on {where}",
        prices.cost(price, hours * compute.instances),
        yes,
        plan,
        price,
    )
    stage_image(account)
    if request is None:
        request = Request(name, settings.training.as_dict(), stage_data(account, source, local))
    return submit(account, request, image)


def machines(settings: Settings) -> str:
    """What a training job runs on, for plans."""
    compute = settings.compute
    wait = f"{compute.max_wait_hours:g} hours with waiting"
    spot = f" spot, cheaper than the price below, {wait}" if compute.spot else ""
    return f"{compute.instances} x {compute.instance_type}{spot}, {compute.volume_gb} GB each"


def longest(settings: Settings) -> float:
    """Hours that a training job can bill at most, its warm pool included."""
    return round(settings.compute.max_hours + settings.compute.keep_alive_minutes / 60, 2)


def stage_image(account: Account) -> None:
    """Make sure that SageMaker finds the image, and say so when nobody has tried the source."""
    if not runs.tried():
        print("warning: src/ was never trained on this machine as it is now; `make train-local` tries it for nothing")
    images.ensure(account, "training")


def stage_data(account: Account, source: str, local: Path | None) -> dict[str, str]:
    """Upload the packed data set `local`, or look at the one in S3 when there is none; returns the channels."""
    uri = storage.dataset(account, local) if local else storage.checked(account, source)
    weights = storage.pretrained(account)
    return {split: f"{uri}/{split}/" for split in storage.SPLITS} | ({"pretrained": weights} if weights else {})


def submit(account: Account, request: Request, image: str) -> str:
    """Create the training job; returns its name."""
    with jobs.starting(account, "Training", request.run):
        made = trainer(account, request, image)
        made.train(input_data_config=inputs(account.settings, request), wait=False, logs=False)
    return str(made._latest_training_job.training_job_name)


def trainer(account: Account, request: Request, image: str, session: Any = None) -> Any:
    """SDK V3's `ModelTrainer` for the cloud, from the settings; with the SDK's session where one is given."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training.configs import (
        CheckpointConfig,
        Compute,
        MetricDefinition,
        Networking,
        OutputDataConfig,
        RemoteDebugConfig,
        SourceCode,
        StoppingCondition,
        Tag,
        TensorBoardOutputConfig,
    )
    from sagemaker.train.model_trainer import ModelTrainer

    settings, stack, key = account.settings, account.stack(), account.kms_arn()
    compute = settings.compute
    optional: dict[str, Any] = {}
    if compute.keep_alive_minutes:
        optional["keep_alive_period_in_seconds"] = compute.keep_alive_minutes * 60
    if disk_key := volume_key(key, compute.instance_type):
        optional["volume_kms_key_id"] = disk_key
    times = {"max_runtime_in_seconds": round(compute.max_hours * 3600)}
    if compute.spot:
        times["max_wait_time_in_seconds"] = round(compute.max_wait_hours * 3600)
    for reason in limits.machine(settings, "compute", compute.instance_type):
        raise UserError(reason)
    made = ModelTrainer(
        sagemaker_session=session or Session(account.session, default_bucket=stack.bucket),
        role=stack.role,
        base_job_name=f"{project.job_prefix()}-{request.run}",
        input_s3_key_prefix="jobs",
        training_image=image,
        source_code=SourceCode(
            source_dir=request.source, command=f"exec python3 {LAUNCHER}",
            ignore_patterns=storage.private(Path(request.source)) if not request.source.startswith("s3:") else None,
        ),
        compute=Compute(
            instance_type=compute.instance_type, instance_count=compute.instances,
            volume_size_in_gb=compute.volume_gb, enable_managed_spot_training=compute.spot, **optional,
        ),
        stopping_condition=StoppingCondition(**times),
        networking=Networking(
            subnets=settings.aws.subnets or None, security_group_ids=settings.aws.security_groups or None,
            enable_network_isolation=compute.isolation,
            enable_inter_container_traffic_encryption=compute.encrypt_traffic,
        ),
        checkpoint_config=CheckpointConfig(
            s3_uri=request.checkpoints or f"s3://{stack.bucket}/checkpoints/{request.run}"
        ),
        output_data_config=OutputDataConfig(s3_output_path=f"s3://{stack.bucket}/jobs", kms_key_id=key),
        hyperparameters=request.hyperparameters,
        environment={"GIT_COMMIT": project.git_commit(), "PYTHONUNBUFFERED": "1", "TENSORBOARD_FOLDER": LIVE}
        | ({"NETWORK_ISOLATION": "1"} if compute.isolation else {}),
        tags=[Tag(key=tag["Key"], value=tag["Value"]) for tag in account.tags()],
    )  # fmt: skip
    made.with_tensorboard_output_config(
        TensorBoardOutputConfig(s3_output_path=f"s3://{stack.bucket}/jobs", local_path=LIVE)
    )
    made.with_metric_definitions([MetricDefinition(name=name, regex=key + NUMBER) for name, key in METRICS.items()])
    return made.with_remote_debug_config(RemoteDebugConfig(enable_remote_debug=True)) if compute.remote_debug else made


def inputs(settings: Settings, request: Request) -> list[Any]:
    """Channels; `InputData` would pin all of them to File."""
    from sagemaker.core.training.configs import Channel, DataSource, S3DataSource

    common = {"s3_data_type": "S3Prefix", "s3_data_distribution_type": "FullyReplicated"}
    return [
        Channel(
            channel_name=name,
            input_mode=settings.compute.input_mode if name in storage.SPLITS else "File",
            data_source=DataSource(s3_data_source=S3DataSource(s3_uri=uri, **common)),
        )
        for name, uri in request.channels.items()
    ]


def _resumed(account: Account, run: str) -> Request:
    """The data and hyperparameters of the newest job of a run, which must have ended without a result."""
    if not runs.NAME.fullmatch(run):
        raise UserError(f"RUN is {run!r}, which names no run; one looks like 20261121-093000-a1b2")
    job = jobs.newest(account, run)
    if job is None:
        raise UserError(f"there is no training job of run {run} in {account.region}; start a fresh one without RUN")
    facts = jobs.describe(account, "Training", job)
    if facts["Status"] == "Completed":
        pull = terminal.command("pull", JOB=job)
        raise UserError(f"run {run} is finished; fetch it with `{pull}`, or start a fresh one without RUN")
    if facts["Status"] not in jobs.ENDED:
        raise UserError(f"run {run} is {facts['Status']} already; see `{terminal.command('logs', JOB=job)}`")
    channels = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
        for channel in facts["InputDataConfig"]
        if channel["ChannelName"] not in ("code", "sm_drivers")  # the SDK's: the source of now is used
    }
    return Request(run, parse(facts["HyperParameters"]).as_dict(), channels)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Train on SageMaker.", settings=True)
    parser.add_data("folder of raw images, or s3://... of a packed data set")
    parser.add_argument(
        "--run", variable="RUN", help="name of a run that was stopped or failed, to resume (default: a fresh run)"
    )
    parser.add_argument("--instances", variable="INSTANCE_COUNT", type=int, help="default: compute.instances")
    parser.add_argument("--wait", variable="WAIT", action="store_true", help="follow the log; fails when the job does")
    parser.add_argument("--yes", variable="YES", action="store_true", help="go on although it is over budget")
    prices.add_plan(parser)
    options = parser.parse_args()
    if options.run and (options.data or any(override.startswith("training.") for override in options.set)):
        raise UserError(f"run {options.run} resumes with what it was started with; leave the other options out")
    account = Account(load(options.set, options={"compute.instances": options.instances}))
    job = train(account, options.data, options.run, options.yes, options.plan)
    print(f"started {job}. {jobs.after(account, 'Training', job)}", flush=True)
    if options.wait:
        jobs.succeeded("Training", jobs.follow(account, "Training", job))
        print(f"done; fetch it with `{terminal.command('pull', JOB=job)}`")
    return 0
