"""Data in the project's bucket: uploaded once a content, and continued where an interrupted upload stood."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from inference.artifact import digest_of
from pipelines.cloud.account import Account, explained, pages, place, unless_missing
from pipelines.local import data
from pipelines.terminal import UserError
from progress import plain, progress, several

THREADS = 8
LISTED = 20  # links that are named when they are left out
SPLITS = ("train", "validation")  # what a training job is given of a data set
IDENTITY = ("artifact_etag", "artifact_version")  # what a package says of the object that it was registered with
# Before a folder's prefix: everything is there. It must not begin as that does: a channel is all that begins so.
DONE = "complete/"


def upload(account: Account, folder: Path, prefix: str, sizes: Mapping[str, int] | None = None) -> str:
    """Upload the files of a folder that the bucket does not have yet, and a marker when all are there.

    Args:
        account: to work in.
        folder: local files.
        prefix: in the stack's bucket, which must name the content: what is there is never replaced by other content.
        sizes: of the files by name; None: all that `below` gives.

    Returns:
        The folder's URI, without a slash at its end.
    """
    s3, bucket, encryption = account.client("s3"), account.stack().bucket, account.encryption()
    uri = f"s3://{bucket}/{prefix}"
    with explained(f"uploading {folder} to {uri} (do it again to continue)"):
        if s3.list_objects_v2(Bucket=bucket, Prefix=f"{DONE}{prefix}")["KeyCount"]:
            print(f"{uri} is there already", flush=True)
            return uri
        listed = pages(s3, "list_objects_v2", "Contents", Bucket=bucket, Prefix=f"{prefix}/")
        there = {item["Key"]: item["Size"] for item in listed}
        files = {f"{prefix}/{name}": size for name, size in (below(folder) if sizes is None else sizes.items())}
        todo = sorted(name for name, size in files.items() if there.get(name) != size)
        print(f"uploading {len(todo)} of {several(len(files), 'file')} to {uri}", flush=True)

        with progress(sum(files[name] for name in todo), "uploading", "B") as tick, ThreadPoolExecutor(THREADS) as pool:

            def put(name: str) -> None:
                path = str(folder / name.removeprefix(f"{prefix}/"))
                s3.upload_file(path, bucket, name, ExtraArgs=encryption, Callback=tick)

            list(pool.map(put, todo))
        s3.put_object(Bucket=bucket, Key=f"{DONE}{prefix}", Body=b"", **encryption)
    return uri


def raw(account: Account, source: str, local: Path | None) -> str:
    """Upload the pictures of `local`, once as long as its files stay the same; without it `source` is in S3."""
    if local is None:
        return source.rstrip("/")
    return upload(account, local, f"raw/{data.state(local, ['pictures'])}", pictures(local))


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
        return upload(account, folder, f"pretrained/{digest_of(next(folder.iterdir()))}") + "/"


def pictures(folder: Path) -> dict[str, int]:
    """Relative paths and sizes of the pictures below a folder, and of nothing else; says what is left out."""
    from processing.scan import LEAVES, images

    left_out: list[str] = []
    found = {name: (folder / name).stat().st_size for name in images(folder, "", left_out) if (folder / name).exists()}
    leaving = [line for line in left_out if line.endswith(LEAVES)]
    for line in leaving[:LISTED]:
        print(f"left out: {plain(line)}", flush=True)
    if others := len(left_out) - min(len(leaving), LISTED):
        print(f"left out: {others} {'more ' if leaving else ''}files that are no pictures, or links", flush=True)
    return found


def below(folder: Path) -> Iterator[tuple[str, int]]:
    """Relative path and size of every file below a folder but those that `private` names."""
    never = private(folder)
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(fnmatch.fnmatchcase(part, pattern) for part in name.parts for pattern in never):
            yield name.as_posix(), path.stat().st_size


def private(folder: Path) -> list[str]:
    """Patterns of the names below a folder that no upload takes: hidden ones, caches, links that lead out of it."""
    from processing.scan import leaves

    links = [path.name for path in folder.rglob("*") if path.is_symlink() and leaves(path, folder.resolve())]
    for name in links:
        print(f"left out: {plain(name)}, a link that leads out of {plain(folder.name)}/", flush=True)
    return [".*", "__pycache__", *map(glob.escape, links)]


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


def identity(account: Account, uri: str) -> dict[str, str]:
    """What tells an object from any that is put in its place: its ETag and, in a bucket with versions, its version."""
    with explained(f"looking up {uri}"):
        found = unless_missing(account.client("s3").head_object, **place(uri)) or {}
    known = found.get("ETag", "").strip('"'), found.get("VersionId", "null")
    return {key: value for key, value in zip(IDENTITY, known, strict=True) if value not in ("", "null")}


def written(account: Account, uri: str) -> datetime:
    """When an object was written."""
    with explained(f"looking up {uri}"):
        last: datetime = account.client("s3").head_object(**place(uri))["LastModified"]
        return last


def download(account: Account, uri: str, file: Path, version: str | None = None) -> None:
    """Fetch an object, or a version of it, into a file, which appears when it is whole."""
    s3, where = account.client("s3"), place(uri)
    more = {"VersionId": version} if version else {}
    with explained(f"downloading {uri}"):
        size = s3.head_object(**where, **more)["ContentLength"]
        with progress(size, f"downloading {file.name}", "B") as tick:
            s3.download_file(**where, Filename=str(file), Callback=tick, **({"ExtraArgs": more} if more else {}))


def put(account: Account, uri: str, content: bytes) -> None:
    """Write an object, encrypted as the settings say."""
    with explained(f"writing {uri}"):
        account.client("s3").put_object(**place(uri), Body=content, **account.encryption())


def artifact(account: Account, archive: Path) -> str:
    """Upload an artifact, once a content; returns its URI.

    What lies there already is read: that it has the right name and size proves nothing.
    """
    digest, s3 = digest_of(archive), account.client("s3")
    uri = f"s3://{account.stack().bucket}/models/{digest}/model.tar.gz"
    with explained(f"uploading {archive} to {uri}"):
        there = unless_missing(s3.head_object, **place(uri)) or {}
        if not there:
            # In one request, which can say that it replaces nothing: the bucket takes no other below models/.
            print(f"uploading {archive.name} ({archive.stat().st_size / 1e6:.0f} MB)", flush=True)
            with archive.open("rb") as body:
                there = _put_new(s3, Body=body, **place(uri), **account.encryption())
        if there and _digest(account, uri) != digest:
            raise UserError(f"{uri} is not the artifact that its name says: find out who put it there, remove it, and "
                            "do it again")  # fmt: skip
    return uri


def _put_new(s3: Any, **request: Any) -> bool:
    """Write an object; whether there is one already: another's, or ours of which the answer was lost."""
    from botocore.exceptions import ClientError

    try:
        s3.put_object(IfNoneMatch="*", **request)
    except ClientError as error:
        if error.response["Error"]["Code"] != "PreconditionFailed":
            raise
        return True
    return False


def _digest(account: Account, uri: str) -> str:
    """The SHA-256 of an object."""
    digest = hashlib.sha256()
    for piece in account.client("s3").get_object(**place(uri))["Body"].iter_chunks(2**20):
        digest.update(piece)
    return digest.hexdigest()


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
