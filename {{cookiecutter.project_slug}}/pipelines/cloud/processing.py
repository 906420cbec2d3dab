"""Pack images on SageMaker, for folders that no laptop should pack: `make process DATA=s3://bucket/photos`.

    python -m pipelines process --data photos --wait

The cloud twin of `make data`: a Processing job runs the same `src/processing/preprocess.py` in the training image. A
local folder is uploaded first, once as long as its files stay the same. `make train DATA=<what it prints>` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines import SOURCE, project, runs, terminal
from pipelines.cloud import images, jobs, prices, storage
from pipelines.cloud.account import Account, volume_key
from pipelines.config import Settings, load
from pipelines.local import data

CODE, INPUT, OUTPUT = (f"/opt/ml/processing/{part}" for part in ("input/code", "input/raw", "output"))
LONGEST = 120  # hours of a Processing job


def process(account: Account, source: str | None, yes: bool, plan: bool = False) -> tuple[str, str]:
    """Start the job.

    Args:
        account: to work in.
        source: folder of raw images or an S3 prefix of one; None: the configured one.
        yes: go on although it is over budget.
        plan: only say what would be created, and end.

    Returns:
        The job's name, and where the packed data set will be.

    Raises:
        UserError: when no job was started.
    """
    settings = account.settings
    compute, source = settings.compute, source or settings.data.source
    data.look(source)
    stack = prices.stack(account, plan)
    local = None if plan or source.startswith("s3://") else data.raw(source)
    name, longest = f"{project.job_prefix()}-{runs.new_name()}", hours(settings)
    image, kind = images.uri(account, "training"), compute.process_instance_type
    target = f"s3://{stack.bucket}/data/{name}"
    price = prices.hourly(account, "processing", kind)
    job = f"{name}: a processing job in {prices.where(settings)} on 1 x {kind}, {longest:g} hours at most, in {image}, "
    prices.afford(settings, f"{job}packs {source} into {target}", prices.cost(price, longest), yes, plan, price)
    images.ensure(account, "training")
    uri = storage.raw(account, source, local)
    with jobs.starting(account, "Processing", name):
        from sagemaker.core.helper.session_helper import Session

        code = storage.upload(account, SOURCE, f"source/{project.source_hash()}")
        session = Session(account.session, default_bucket=stack.bucket)
        processor(account, image, "preprocess.py", session).run(
            inputs=inputs({"raw": (f"{uri}/", INPUT), "code": (f"{code}/", CODE)}),
            outputs=outputs("packed", target),
            arguments=packing(settings),
            job_name=name,
            wait=False,
            logs=False,
        )
    return name, f"{target}/images"


def hours(settings: Settings) -> float:
    """The longest that a Processing job may take."""
    return min(settings.compute.max_hours, LONGEST)


def packing(settings: Settings) -> list[str]:
    """What the packing script is told."""
    return ["--input", INPUT, "--output", f"{OUTPUT}/images", *data.options(settings)]


def processor(account: Account, image: str, script: str, session: Any, kind: Any = None) -> Any:
    """SDK V3's `Processor` for a script of `src/processing`, from the settings.

    Args:
        account: to work in.
        image: that it runs in.
        script: its name.
        session: the SDK's.
        kind: instance type; None: the configured one.
    """
    from sagemaker.core.network import NetworkConfig
    from sagemaker.core.processing import Processor

    settings, key = account.settings, account.kms_arn()
    compute = settings.compute
    return Processor(
        image_uri=image,
        role=account.stack().role,
        entrypoint=["python3", f"{CODE}/processing/{script}"],  # FrameworkProcessor finds no script in a sub-folder
        instance_count=1,
        instance_type=kind or compute.process_instance_type,
        volume_size_in_gb=compute.volume_gb,
        volume_kms_key=volume_key(key, compute.process_instance_type),
        output_kms_key=key,
        max_runtime_in_seconds=round(hours(settings) * 3600),
        sagemaker_session=session,
        tags=account.tags(),
        network_config=NetworkConfig(
            enable_network_isolation=compute.isolation,
            security_group_ids=settings.aws.security_groups or None,
            subnets=settings.aws.subnets or None,
        ),
    )


def inputs(places: Mapping[str, tuple[Any, str]]) -> list[Any]:
    """Inputs by name: where in S3, and the folder of the container that they are copied to."""
    from sagemaker.core.shapes import ProcessingInput, ProcessingS3Input

    copied = {"s3_data_type": "S3Prefix", "s3_input_mode": "File"}
    return [
        ProcessingInput(input_name=name, s3_input=ProcessingS3Input(s3_uri=uri, local_path=path, **copied))
        for name, (uri, path) in places.items()
    ]


def outputs(name: str, uri: Any) -> list[Any]:
    """The one output: what the script leaves in the container's folder for it, and where in S3 that goes."""
    from sagemaker.core.shapes import ProcessingOutput, ProcessingS3Output

    kept = ProcessingS3Output(s3_uri=uri, local_path=OUTPUT, s3_upload_mode="EndOfJob")
    return [ProcessingOutput(output_name=name, s3_output=kept)]


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Pack images on SageMaker.", settings=True)
    parser.add_data("folder of raw images, here or s3://...")
    parser.add_argument("--wait", variable="WAIT", action="store_true", help="follow the log; fails when the job does")
    parser.add_argument("--yes", variable="YES", action="store_true", help="go on although it is over budget")
    prices.add_plan(parser)
    options = parser.parse_args()
    account = Account(load(options.set))
    name, packed = process(account, options.data, options.yes, options.plan)
    print(f"started {name}. {jobs.after(account, 'Processing', name)}", flush=True)
    if options.wait:
        jobs.succeeded("Processing", jobs.follow(account, "Processing", name))
    train = terminal.command("train", DATA=packed)
    print(f"{'then' if not options.wait else 'done;'} train on it with `{train}`")
    return 0
