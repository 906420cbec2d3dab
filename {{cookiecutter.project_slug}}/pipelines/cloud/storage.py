"""Data in the project's bucket: uploaded once a content, and continued where an interrupted upload stood."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.cloud import account as aws
from pipelines.config import Settings
from pipelines.local import data
from pipelines.terminal import UserError
from progress import progress

THREADS = 8
SPLITS = ("train", "validation")  # what a training job is given of a data set
DONE = ".complete"  # beside the folder's prefix: everything is there


def upload(settings: Settings, folder: Path, bucket: str, prefix: str) -> str:
    """Upload the files of a folder that the bucket does not have yet, and a marker when all are there.

    Args:
        settings: region and key.
        folder: local files.
        bucket: of the stack.
        prefix: in the bucket, which must name the content: what is there is never replaced by other content.

    Returns:
        The folder's URI, without a slash at its end.
    """
    s3, uri, encryption = aws.client(settings, "s3"), f"s3://{bucket}/{prefix}", aws.encryption(settings)
    with aws.explained(f"uploading {folder} to {uri} (do it again to continue)"):
        if s3.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}{DONE}")["KeyCount"]:
            print(f"{uri} is there already", flush=True)
            return uri
        listed = aws.pages(s3, "list_objects_v2", "Contents", Bucket=bucket, Prefix=f"{prefix}/")
        there = {item["Key"]: item["Size"] for item in listed}
        files = {f"{prefix}/{name}": size for name, size in below(folder)}
        todo = sorted(name for name, size in files.items() if there.get(name) != size)
        print(f"uploading {len(todo)} of {len(files)} files to {uri}", flush=True)

        with progress(sum(files[name] for name in todo), "uploading", "B") as tick, ThreadPoolExecutor(THREADS) as pool:

            def put(name: str) -> None:
                path = str(folder / name.removeprefix(f"{prefix}/"))
                s3.upload_file(path, bucket, name, ExtraArgs=encryption, Callback=tick)

            list(pool.map(put, todo))
        s3.put_object(Bucket=bucket, Key=f"{prefix}{DONE}", Body=b"", **encryption)
    return uri


def raw(settings: Settings, stack: aws.Stack, source: str, local: Path | None) -> str:
    """Upload the raw images `local`, once as long as its files stay the same; without it `source` is in S3."""
    if local is None:
        return source.rstrip("/")
    return upload(settings, local, stack.bucket, f"raw/{data.state(local, [])}")


def dataset(settings: Settings, stack: aws.Stack, folder: Path) -> str:
    """Upload a packed data set; returns its URI."""
    info = json.loads((folder / "train" / "dataset.json").read_text(encoding="utf-8"))
    return upload(settings, folder, stack.bucket, f"data/{info['fingerprint']}")


def pretrained(settings: Settings, stack: aws.Stack) -> str | None:
    """Upload the weights of `data.pretrained`; returns the prefix that holds them, None when there are none."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = data.weights(settings, Path(temporary, "pretrained"))
        if folder is None:
            return None
        return upload(settings, folder, stack.bucket, f"pretrained/{_digest(next(folder.iterdir()))}") + "/"


def below(folder: Path) -> Iterator[tuple[str, int]]:
    """Relative path and size of every file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def listed(settings: Settings, uri: str) -> Iterator[tuple[str, int]]:
    """Name, without the prefix, and size of every object below an S3 prefix."""
    bucket, prefix = aws.place(f"{uri.rstrip('/')}/").values()
    with aws.explained(f"listing {uri}"):
        s3 = aws.client(settings, "s3")
        for item in aws.pages(s3, "list_objects_v2", "Contents", Bucket=bucket, Prefix=prefix):
            yield item["Key"].removeprefix(prefix), item["Size"]


def get(settings: Settings, uri: str) -> bytes:
    """The content of an object."""
    with aws.explained(f"reading {uri}"):
        return bytes(aws.client(settings, "s3").get_object(**aws.place(uri))["Body"].read())


def download(settings: Settings, uri: str, file: Path) -> None:
    """Fetch an object into a file, which appears when it is whole."""
    s3, place = aws.client(settings, "s3"), aws.place(uri)
    with aws.explained(f"downloading {uri}"):
        size = s3.head_object(**place)["ContentLength"]
        with progress(size, f"downloading {file.name}", "B") as tick:
            s3.download_file(**place, Filename=str(file), Callback=tick)


def put(settings: Settings, uri: str, content: bytes) -> None:
    """Write an object, encrypted as the settings say."""
    with aws.explained(f"writing {uri}"):
        aws.client(settings, "s3").put_object(**aws.place(uri), Body=content, **aws.encryption(settings))


def artifact(settings: Settings, stack: aws.Stack, archive: Path) -> str:
    """Upload an artifact, once a content; returns its URI."""
    uri, s3 = f"s3://{stack.bucket}/models/{_digest(archive)}/model.tar.gz", aws.client(settings, "s3")
    with aws.explained(f"uploading {archive} to {uri}"):
        there = aws.unless_missing(s3.head_object, **aws.place(uri)) or {}
        if there.get("ContentLength") != archive.stat().st_size:
            with progress(archive.stat().st_size, f"uploading {archive.name}", "B") as tick:
                s3.upload_file(str(archive), **aws.place(uri), ExtraArgs=aws.encryption(settings), Callback=tick)
    return uri


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def checked(settings: Settings, source: str) -> str:
    """The URI of a packed data set in S3, without a slash at its end.

    Raises:
        UserError: when this user may look there and finds none.
    """
    from botocore.exceptions import ClientError

    uri = source.rstrip("/")
    for split in SPLITS:
        file = f"{uri}/{split}/dataset.json"
        with aws.explained(f"looking for {file}"):
            try:
                found = aws.unless_missing(aws.client(settings, "s3").head_object, **aws.place(file))
            except ClientError as error:
                if error.response["Error"]["Code"] != "403":  # the job's role may read what this user may not
                    raise
            else:
                if found is None:
                    raise UserError(f"{uri} holds no packed data set: there is no {split}/dataset.json")
    return uri
