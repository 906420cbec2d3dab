"""What SageMaker does with S3: channels by literal prefix or manifest, folders that are kept there, archives."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from rehearsal.operations import Account

THREADS = 8


class Failed(Exception):  # noqa: N818  a job's end
    """Why a job failed, as FailureReason has it."""


def split(uri: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def listed(account: Account, role: str, uri: str) -> Iterator[tuple[str, str]]:
    """Key and name below the prefix, of every object whose key begins as the URI says: that is all a prefix means.

    Raises:
        Failed: when there is none, or the role may not look.
    """
    bucket, prefix = split(uri)
    found = False
    try:
        for page in account.client("s3", role).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                key, rest, found = entry["Key"], entry["Key"][len(prefix) :], True
                inside = not prefix or prefix.endswith("/") or rest.startswith("/")
                name = rest.removeprefix("/") if inside else prefix.rpartition("/")[2] + rest
                if name and not name.endswith("/"):
                    yield key, name
    except ClientError as error:
        raise Failed(f"ClientError: Data download failed: {error.response['Error']['Message']}") from error
    if not found:
        raise Failed(
            f'ClientError: Data download failed: No S3 objects found under S3 URL "{uri}" given in input data source. '
            f"Please ensure that the bucket exists in the selected region ({account.region}), that objects exist under "
            f'that S3 prefix, and that the role "{role}" has "s3:ListBucket" permissions on bucket "{bucket}".'
        )


def objects(account: Account, role: str, source: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Bucket, key and name of each object of an S3DataSource: a prefix, or what a manifest names."""
    uri = source["S3Uri"]
    if source.get("S3DataType", "S3Prefix") == "S3Prefix":
        return [(split(uri)[0], key, name) for key, name in listed(account, role, uri)]
    if source["S3DataType"] != "ManifestFile":
        raise Failed(f"ClientError: the rehearsal plays no {source['S3DataType']}")
    bucket, key = split(uri)
    try:
        first, *names = json.loads(account.client("s3", role).get_object(Bucket=bucket, Key=key)["Body"].read())
        base, prefix = split(first["prefix"])
    except (ClientError, ValueError, KeyError, TypeError) as error:
        raise Failed(f"ClientError: Data download failed: {uri} cannot be read as a manifest: {error!r}") from error
    return [(base, f"{prefix}{name}", name) for name in names]


def download(
    account: Account, role: str, source: dict[str, Any], folder: Path, share: tuple[int, int] = (0, 1),
    compression: str = "None",
) -> None:  # fmt: skip
    """Put a data source's objects into a folder, as File mode does.

    Args:
        account: to look in.
        role: whose rights count.
        source: the S3DataSource.
        folder: that gets the files.
        share: of how many hosts this is which, where objects are divided.
        compression: of the objects, `Gzip` or `None`.
    """
    client, (host, hosts) = account.client("s3", role), share
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(place: tuple[str, str, str]) -> None:
        bucket, key, name = place
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            shutil.copyfileobj(client.get_object(Bucket=bucket, Key=key)["Body"], file, 1 << 20)
        if compression == "Gzip":
            with gzip.open(path) as packed, path.with_suffix("").open("wb") as file:
                shutil.copyfileobj(packed, file)
            path.unlink()

    divided = source.get("S3DataDistributionType") == "ShardedByS3Key"
    chosen = objects(account, role, source)[host::hosts] if divided else objects(account, role, source)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fetch, chosen))
    except ClientError as error:
        raise Failed(f"ClientError: Data download failed: {error.response['Error']['Message']}") from error


class Mirror:
    """A folder whose files are put into S3 again and again, each when it has changed."""

    def __init__(self, account: Account, role: str, folder: Path, uri: str, key: str | None = None) -> None:
        self._account, self._role, self._folder, self._uri = account, role, folder, uri.rstrip("/")
        self._sent: dict[Path, tuple[int, int]] = {}
        self._extra = encryption(key)

    def restore(self) -> None:
        """Fetch what lies there, if anything does."""
        with contextlib.suppress(Failed):
            download(self._account, self._role, {"S3Uri": f"{self._uri}/"}, self._folder)
        self._sent = {path: _stamp(path) for path in self._folder.rglob("*") if path.is_file()}

    def send(self) -> None:
        """Put what has changed since the last time."""
        client, (bucket, prefix) = self._account.client("s3", self._role), split(self._uri)
        for path in sorted(self._folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # written under another name, and renamed meanwhile
                if path.is_file() and not path.is_symlink() and (stamp := _stamp(path)) != self._sent.get(path):
                    name = str(path.relative_to(self._folder))
                    key = f"{prefix}/{name}" if prefix else name
                    with tempfile.TemporaryFile() as copy:  # it may be written to while it is sent
                        with path.open("rb") as file:
                            shutil.copyfileobj(file, copy, 1 << 20)
                        copy.seek(0)
                        client.upload_fileobj(copy, bucket, key, ExtraArgs=self._extra)
                    self._sent[path] = stamp


def send(mirrors: Iterable[Mirror]) -> None:
    """Put into S3 what has changed in folders."""
    for mirror in mirrors:
        mirror.send()


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size


def encryption(key: str | None) -> dict[str, str]:
    """What a request that writes an object says of a key."""
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}


def pack(account: Account, role: str, folders: list[Path], uri: str, key: str | None, packed: bool = True) -> str:
    """Put the files of folders into S3, the first folder's where several have one: as a .tar.gz, or as they are."""
    bucket, target = split(uri)
    if not packed:
        plain = uri.removesuffix(".tar.gz")
        for folder in reversed(folders):
            Mirror(account, role, folder, plain, key).send()
        return f"{plain}/"
    names = {str(path.relative_to(folder)): path for folder in reversed(folders) for path in sorted(folder.rglob("*"))}
    archive = folders[0].parent / "packed.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name in sorted(names):
            tar.add(names[name], name, recursive=False)
    account.client("s3", role).upload_file(str(archive), bucket, target, ExtraArgs=encryption(key))
    archive.unlink()
    return uri
