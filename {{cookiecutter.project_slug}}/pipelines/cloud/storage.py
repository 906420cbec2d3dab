"""Data in the project's bucket: uploaded once a content, and continued where an interrupted upload stood."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.cloud.account import Account, explained, pages, place, unless_missing
from pipelines.local import data
from pipelines.terminal import UserError
from progress import progress

THREADS = 8
SPLITS = ("train", "validation")  # what a training job is given of a data set
DONE = ".complete"  # beside the folder's prefix: everything is there


def upload(account: Account, folder: Path, prefix: str) -> str:
    """Upload the files of a folder that the bucket does not have yet, and a marker when all are there.

    Args:
        account: to work in.
        folder: local files.
        prefix: in the stack's bucket, which must name the content: what is there is never replaced by other content.

    Returns:
        The folder's URI, without a slash at its end.
    """
    s3, bucket, encryption = account.client("s3"), account.stack().bucket, account.encryption()
    uri = f"s3://{bucket}/{prefix}"
    with explained(f"uploading {folder} to {uri} (do it again to continue)"):
        if s3.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}{DONE}")["KeyCount"]:
            print(f"{uri} is there already", flush=True)
            return uri
        listed = pages(s3, "list_objects_v2", "Contents", Bucket=bucket, Prefix=f"{prefix}/")
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


def raw(account: Account, source: str, local: Path | None) -> str:
    """Upload the raw images `local`, once as long as its files stay the same; without it `source` is in S3."""
    if local is None:
        return source.rstrip("/")
    return upload(account, local, f"raw/{data.state(local, [])}")


def dataset(account: Account, folder: Path) -> str:
    """Upload a packed data set; returns its URI."""
    info = json.loads((folder / "train" / "dataset.json").read_text(encoding="utf-8"))
    return upload(account, folder, f"data/{info['fingerprint']}")


def pretrained(account: Account) -> str | None:
    """Upload the weights of `data.pretrained`; returns the prefix that holds them, None when there are none."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = data.weights(account.settings, Path(temporary, "pretrained"))
        if folder is None:
            return None
        return upload(account, folder, f"pretrained/{_digest(next(folder.iterdir()))}") + "/"


def below(folder: Path) -> Iterator[tuple[str, int]]:
    """Relative path and size of every file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def listed(account: Account, uri: str) -> Iterator[tuple[str, int]]:
    """Name, without the prefix, and size of every object below an S3 prefix."""
    bucket, prefix = place(f"{uri.rstrip('/')}/").values()
    with explained(f"listing {uri}"):
        for item in pages(account.client("s3"), "list_objects_v2", "Contents", Bucket=bucket, Prefix=prefix):
            yield item["Key"].removeprefix(prefix), item["Size"]


def get(account: Account, uri: str) -> bytes:
    """The content of an object."""
    with explained(f"reading {uri}"):
        return bytes(account.client("s3").get_object(**place(uri))["Body"].read())


def download(account: Account, uri: str, file: Path) -> None:
    """Fetch an object into a file, which appears when it is whole."""
    s3, where = account.client("s3"), place(uri)
    with explained(f"downloading {uri}"):
        size = s3.head_object(**where)["ContentLength"]
        with progress(size, f"downloading {file.name}", "B") as tick:
            s3.download_file(**where, Filename=str(file), Callback=tick)


def put(account: Account, uri: str, content: bytes) -> None:
    """Write an object, encrypted as the settings say."""
    with explained(f"writing {uri}"):
        account.client("s3").put_object(**place(uri), Body=content, **account.encryption())


def artifact(account: Account, archive: Path) -> str:
    """Upload an artifact, once a content; returns its URI."""
    uri, s3 = f"s3://{account.stack().bucket}/models/{_digest(archive)}/model.tar.gz", account.client("s3")
    with explained(f"uploading {archive} to {uri}"):
        there = unless_missing(s3.head_object, **place(uri)) or {}
        size = archive.stat().st_size
        if there.get("ContentLength", size) != size:
            raise UserError(f"{uri} has {there['ContentLength']} bytes, and {archive}, whose name it is, has {size}; "
                            "find out who put it there, remove it, and do it again")  # fmt: skip
        if not there:
            # In one request, which can say that it replaces nothing: the bucket takes no other below models/.
            print(f"uploading {archive.name} ({size / 1e6:.0f} MB)", flush=True)
            with archive.open("rb") as body:
                s3.put_object(**place(uri), Body=body, IfNoneMatch="*", **account.encryption())
    return uri


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def checked(account: Account, source: str) -> str:
    """The URI of a packed data set in S3, without a slash at its end.

    Raises:
        UserError: when this user may look there and finds none.
    """
    from botocore.exceptions import ClientError

    uri = source.rstrip("/")
    for split in SPLITS:
        file = f"{uri}/{split}/dataset.json"
        with explained(f"looking for {file}"):
            try:
                found = unless_missing(account.client("s3").head_object, **place(file))
            except ClientError as error:
                if error.response["Error"]["Code"] != "403":  # the job's role may read what this user may not
                    raise
            else:
                if found is None:
                    raise UserError(f"{uri} holds no packed data set: there is no {split}/dataset.json")
    return uri
