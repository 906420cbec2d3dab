"""The checked artifact that RUN=, JOB=, PACKAGE= or ARTIFACT= names, for the verbs that use one in the cloud."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.artifact import ArtifactError, digest_of, unpack, verify
from pipelines import runs, terminal
from pipelines.cloud import packages, storage
from pipelines.cloud.account import Account, explained
from pipelines.terminal import UserError

RESTORE = "put the approved one back, or register and approve what is there now"


@dataclass(frozen=True)
class Source:
    """A checked artifact.

    Attributes:
        label: what a person calls it.
        archive: here, perhaps in a temporary folder.
        samples: its golden samples.
        uri: where it lies in S3 already.
        package: the model package that it is of.
    """

    label: str
    archive: Path
    samples: list[dict[str, Any]]
    uri: str | None = None
    package: str | None = None


def add_options(parser: terminal.Parser, job: str = "a training job whose artifact is taken") -> None:
    """The options that name an artifact."""
    parser.add_argument("--run", variable="RUN", help="name of a run (default: the newest)")
    parser.add_argument("--job", variable="JOB", help=job)
    parser.add_argument(
        "--package", variable="PACKAGE", help="an approved model package: champion, a version, or an ARN"
    )
    parser.add_argument("--artifact", variable="ARTIFACT", type=Path, help="a model.tar.gz")


def only_one(options: Namespace) -> None:
    """Refuse options that name more than one artifact."""
    given = [word.upper() for word in ("run", "job", "package", "artifact") if getattr(options, word, None)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} name an artifact each; give one")


def find(account: Account, options: Namespace, folder: Path) -> Source:
    """The artifact that the options name, checked; what lies in S3 only is downloaded into a folder.

    Raises:
        UserError: when there is none, it is damaged, its job failed, or its package is not approved.
    """
    only_one(options)
    uri = arn = package = None
    if options.job:
        with explained(f"looking up the training job {options.job}"):
            facts = account.client("sagemaker").describe_training_job(TrainingJobName=options.job)
        if facts["TrainingJobStatus"] != "Completed":
            raise UserError(f"{options.job} is {facts['TrainingJobStatus']}; only a completed job has an artifact")
        label, uri = f"job {options.job}", facts["ModelArtifacts"]["S3ModelArtifacts"]
    elif options.package:
        package = packages.find(account, options.package)
        if package.status != "Approved":
            approve = terminal.command("approve", PACKAGE=options.package)
            raise UserError(f"{package} is {package.status}; approve it with `{approve}`")
        label, uri, arn = f"package {package}", package.uri, package.arn
    elif options.artifact:
        label, archive = str(options.artifact), options.artifact
    else:
        archive = runs.find(options.run) / "model.tar.gz"
        label = f"run {archive.parent.name}"
    if uri:
        archive = folder / "model.tar.gz"
        storage.download(account, uri, archive, _recorded(account, package) if package else None)
    samples = checked(archive, folder / "unpacked")
    approved = package.metadata.get("artifact") if package else None
    if approved and digest_of(folder / "unpacked" / "model.json") != approved:
        raise UserError(f"{uri} holds another artifact than the one that {package} was registered with; {RESTORE}")
    return Source(label, archive, samples, uri, arn)


def _recorded(account: Account, package: packages.Package) -> str | None:
    """The version of a package's artifact that is to be read; nothing where the bucket has no versions.

    Raises:
        UserError: when the object is another one than at its registration.
    """
    now = storage.identity(account, package.uri)
    for key in storage.IDENTITY:
        if package.metadata.get(key, now.get(key)) != now.get(key):
            raise UserError(f"{package.uri} was written again after {package} was registered: {key} was "
                            f"{package.metadata[key]} and is {now.get(key, 'none')}; {RESTORE}")  # fmt: skip
    if "artifact" not in package.metadata:
        print(f"{package} does not say which artifact it was registered with, so what lies at {package.uri} is taken")
    return now.get("artifact_version")


def checked(archive: Path, folder: Path) -> list[dict[str, Any]]:
    """The golden samples of an artifact whose files match their checksums."""
    try:
        unpack(archive, folder)
        if not (folder / "model.json").is_file():
            raise ValueError("it holds no model.json")
        verify(folder, of=f" in {archive}")
        samples: list[dict[str, Any]] = json.loads((folder / "golden.json").read_text(encoding="utf-8"))["samples"]
    except ArtifactError as error:
        raise UserError(str(error)) from error
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{archive} is no artifact of this project: {error}") from error
    return samples
