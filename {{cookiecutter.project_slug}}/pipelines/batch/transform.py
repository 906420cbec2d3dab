"""Classify every image of a folder or an S3 prefix by batch transform: `make batch DATA=photos WAIT=1`.

    python -m pipelines batch --data s3://bucket/photos --run 20261121-093000-a1b2 --wait
    make batch JOB=<transform job>            # without DATA: fetch what a job wrote that nobody waited for

The cloud twin of `make batch-local`: `artifacts/batch/<job>.jsonl` has the same lines, in the order of the paths. AWS
counts a job as failed when one image is bad; the others' answers are there all the same. With DATA, JOB= names a
training job. The job's role reads the project's bucket only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines import project, runs, terminal
from pipelines.cloud import artifact, jobs, prices, storage
from pipelines.cloud import images as cloud_images
from pipelines.cloud.account import Account, explained, failure, unless_missing, volume_key
from pipelines.config import load
from pipelines.endpoint import expiry
from pipelines.endpoint import model as endpoint_model
from pipelines.local import data
from pipelines.terminal import UserError
from progress import plain, progress
from training.config import GPU_INSTANCE

MEGABYTE = 2**20
USUAL, MOST = 6, 100  # megabytes of a request; AWS: so many at most, and of all concurrent ones together
CONCURRENT = 16  # requests at once; the server merges what waits
COLUMNS = {"label": "labels", "prediction": "predictions", "probabilities": "probabilities"}  # of line and answer


def start(account: Account, options: Namespace) -> str:
    """Start the job; returns its name.

    Raises:
        UserError: when no job was started; nothing that costs is left then.
    """
    settings = account.settings
    chosen, hours = settings.endpoint, settings.compute.max_hours
    if GPU_INSTANCE.match(chosen.instance_type) and settings.images.serving == "project":
        raise UserError(f"endpoint.instance_type is {chosen.instance_type}, and batch transform's GPU machines have "
                        "driver 470 or 535, where PyPI's torch does not run; choose a type without a GPU")  # fmt: skip
    name, only_plan = f"{project.name()}-{runs.new_name()}", options.plan
    stack = prices.stack(account, only_plan)
    local = None if only_plan or options.data.startswith("s3://") else data.raw(options.data)
    sizes = {} if only_plan else _images(account, options.data, local)
    with tempfile.TemporaryDirectory(prefix="batch-") as folder:
        missing = artifact.Source("an artifact that is not there yet", Path(), [])
        model = prices.look(lambda: artifact.find(account, options, Path(folder)), missing, only_plan)
        image = cloud_images.uri(account, "serving")
        plan = (
            f"{name}: a transform job in {prices.where(settings)} on {chosen.instances} x {chosen.instance_type}, "
            f"{hours:g} hours at most, in {'the image of the package' if model.package else image}, classifies "
            f"{f'{len(sizes)} images of {options.data}' if sizes else options.data or 'images'} with {model.label}"
        )
        price = prices.hourly(account, "transform", chosen.instance_type)
        prices.afford(settings, plan, prices.cost(price, hours * chosen.instances), options.yes, only_plan, price)
        if not model.package:
            cloud_images.ensure(account, "serving")
        uri = model.uri or storage.artifact(account, model.archive)
    prefix = storage.raw(account, options.data, local)
    manifest, place = [{"prefix": f"{prefix}/"}, *sorted(sizes)], f"s3://{stack.bucket}/batch/{name}"
    try:
        # A transform job has no limit of its own.
        expiry.set_end(account, name, expiry.end_after(hours), "transform job")
        with explained("starting the transform job"):
            storage.put(account, f"{place}/images.manifest", json.dumps(manifest).encode())
            endpoint_model.create(account, name, image, uri, model.package)
            _create(account, name, place, max(USUAL, math.ceil(max(sizes.values()) / MEGABYTE)))
    except BaseException:
        with contextlib.suppress(UserError):  # the first reason counts; `make destroy` removes what may be left
            if jobs.describe(account, "Transform", name):
                print(f"{name} runs. {jobs.after(account, 'Transform', name)}", flush=True)
            else:
                _clean(account, name)
        raise
    return name


def _images(account: Account, source: str, local: Path | None) -> dict[str, int]:
    """The images of a folder or prefix with their bytes.

    Raises:
        UserError: when there is none, or one is too large.
    """
    from processing.scan import SUFFIXES

    files = storage.pictures(local).items() if local else storage.listed(account, source)
    sizes = {file: size for file, size in files if file.lower().endswith(SUFFIXES) and "/." not in f"/{file}"}
    if not sizes:
        raise UserError(f"{source} holds no image; DATA names a folder, or s3://bucket/prefix, that does")
    largest = max(sizes, key=lambda file: sizes[file])
    if sizes[largest] > MOST * MEGABYTE:
        raise UserError(f"{largest} has {sizes[largest]:,} bytes, and batch transform takes {MOST} MB; take it out")
    return sizes


def _create(account: Account, name: str, place: str, payload: int) -> None:
    """A manifest names the images: any other file would fail, and the whole job with it. One image is one request."""
    from sagemaker.core import resources, shapes

    chosen, key = account.settings.endpoint, account.kms_arn()
    disk_key = volume_key(key, chosen.instance_type)
    disk = {"volume_kms_key_id": disk_key} if disk_key else {}
    images = shapes.TransformS3DataSource(s3_data_type="ManifestFile", s3_uri=f"{place}/images.manifest")
    resources.TransformJob.create(
        transform_job_name=name, model_name=name, session=account.session, region=account.region,
        batch_strategy="SingleRecord", max_concurrent_transforms=min(CONCURRENT, MOST // payload),
        max_payload_in_mb=payload, environment={"INFERENCE_MAX_BYTES": str(payload * MEGABYTE)},
        transform_input=shapes.TransformInput(
            data_source=shapes.TransformDataSource(s3_data_source=images), content_type="application/x-image",
            split_type="None",
        ),
        transform_output=shapes.TransformOutput(
            s3_output_path=f"{place}/output", accept="application/json", assemble_with="None",
            **({"kms_key_id": key} if key else {}),
        ),
        transform_resources=shapes.TransformResources(
            instance_type=chosen.instance_type, instance_count=chosen.instances, **disk
        ),
        tags=[resources.Tag(key=tag["Key"], value=tag["Value"]) for tag in account.tags()],  # not shapes.Tag
    )  # fmt: skip


def _clean(account: Account, name: str) -> None:
    """Remove the job's model and the schedule that would stop it."""
    expiry.set_end(account, name, None)
    with explained(f"removing the model {name}"):
        unless_missing(account.client("sagemaker").delete_model, ModelName=name)


def join(account: Account, name: str) -> int:
    """Write the lines of an ended job, and remove what only it needed; returns the verb's exit code.

    Raises:
        UserError: when there is no such job, it runs, or it answered nothing.
    """
    facts = jobs.describe(account, "Transform", name)
    where = facts.get("TransformInput", {}).get("DataSource", {}).get("S3DataSource", {})
    if where.get("S3DataType") != "ManifestFile" or not name.startswith(f"{project.name()}-"):
        raise UserError(f"{name} is no transform job that `make batch` started; to start one, name images: DATA=...")
    if facts["Status"] not in jobs.ENDED:
        raise UserError(f"{name} is {facts['Status']}; wait for it with `{terminal.command('logs', JOB=name)}`")
    first, *names = json.loads(storage.get(account, where["S3Uri"]))
    place = facts["TransformOutput"]["S3OutputPath"]
    there = {file.removesuffix(".out") for file, _ in storage.listed(account, place)}
    # AWS's documentation has the input's prefix in the outputs' names in one place, and not in another.
    prefix = max(("", first["prefix"].split("/", 3)[3]), key=lambda part: sum(part + file in there for file in names))
    _clean(account, name)
    if not any(prefix + file in there for file in names):
        jobs.succeeded("Transform", facts)
        raise UserError(f"{name} wrote no answer to {place}; `{terminal.command('logs', JOB=name)}` may say why")

    def line(file: str) -> dict[str, Any]:
        if prefix + file not in there:
            return {
                "file": file,
                "error": f"batch transform gave no answer; see `{terminal.command('logs', JOB=name)}`",
            }
        try:
            tick(1)
            answer = json.loads(storage.get(account, f"{place}/{prefix}{file}.out"))
            return {"file": file} | {key: answer[column][0] for key, column in COLUMNS.items()}
        except (ValueError, LookupError, TypeError) as error:
            return {"file": file, "error": f"what batch transform wrote is no answer: {error!r}"}

    output = runs.ARTIFACTS / "batch" / f"{name}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    with progress(len(names), "fetching", "answers") as tick, ThreadPoolExecutor(storage.THREADS) as pool:
        lines = list(pool.map(line, names))
    output.write_text("".join(f"{json.dumps(entry)}\n" for entry in lines), encoding="utf-8")
    labels = Counter(entry["label"] for entry in lines if "label" in entry)
    bad = len(lines) - labels.total()
    print(f"{len(names)} images, {bad} of them without an answer -> {os.path.relpath(output)}")
    print("  images  class")
    for label, count in sorted(labels.items()):
        print(f"{count:8}  {plain(label)}")
    if facts["Status"] != "Completed":
        print(f"{name} is {facts['Status']}: {failure(facts)}")
    return 1 if bad else 0


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Classify every image of a folder or an S3 prefix by batch transform.", settings=True)
    parser.add_argument("--data", variable="DATA", help="folder of images, here or s3://...")
    artifact.add_options(parser, "with --data, a training job; without, the transform job to fetch")
    parser.add_argument("--instances", variable="INSTANCE_COUNT", type=int, help="default: endpoint.instances")
    parser.add_argument("--wait", variable="WAIT", action="store_true", help="follow the log, then fetch the answers")
    parser.add_argument("--yes", variable="YES", action="store_true", help="go on although it is over budget")
    prices.add_plan(parser)
    options = parser.parse_args()
    account = Account(load(options.set, options={"endpoint.instances": options.instances}))
    if not options.data and not options.plan:
        if not options.job:
            raise UserError("DATA is missing; name images, such as make batch DATA=folder/of/images", 2)
        return join(account, options.job)
    name = start(account, options)
    print(f"started {name}. {jobs.after(account, 'Transform', name)}", flush=True)
    if not options.wait:
        print(f"then fetch the answers with `{terminal.command('batch', JOB=name)}`")
        return 0
    jobs.follow(account, "Transform", name)
    return join(account, name)
