"""Open an artifact that a stranger may have made: unpack `model.tar.gz`, check it, and only then import what is in it.

The archive is read here and not by tarfile's `extractall`, whose filters can be escaped where Python lacks their fixes,
and which reads headers of any size: plain files and folders only, and no more of them than an artifact has.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import stat
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, BinaryIO

LARGEST = 8 * 2**30  # bytes of an archive, and of all that is in it
FREE, RATIO = 16 * 2**20, 30  # bytes that any archive may become, and so many times its own; weights hardly shrink
ENTRIES, DEEPEST = 1000, 16  # files and folders, and how deep they are nested
EXTENDED = 8192  # bytes of a header that goes before another, with what has no room in that: a long name, times
CHUNK = 2**20
FACTS = 16 * 2**20  # bytes of model.json
PLAIN, FOLDER = (tarfile.REGTYPE, tarfile.AREGTYPE), tarfile.DIRTYPE


class ArtifactError(ValueError):
    """The artifact is missing, damaged or not one of this project; the message names it and the fix."""


@dataclass(frozen=True)
class Artifact:
    """An unpacked artifact: its folder, the content of `model.json`, its own handlers, and the loaded model."""

    folder: Path
    facts: dict[str, Any]
    handlers: ModuleType
    model: Any


@contextmanager
def open_artifact(path: Path) -> Iterator[Artifact]:
    """Unpack, verify and load an artifact for as long as the context lasts.

    The code inside the artifact is what runs, so the answer is the one that a server would give.

    Raises:
        ArtifactError: when it cannot be read, a file does not match its checksum, or it does not load.
    """
    with tempfile.TemporaryDirectory(prefix="artifact-") as temporary:
        folder = Path(temporary)
        unpack(path, folder)
        try:
            facts = verify(folder)
            handlers = _import(folder / "code" / "inference.py")
            model = handlers.model_fn(str(folder))
        except Exception as error:
            raise ArtifactError(f"{path} does not load: {error}") from error
        yield Artifact(folder, facts, handlers, model)


def unpack(path: Path, folder: Path) -> None:
    """Write the files of an archive into a new or empty folder.

    Raises:
        ArtifactError: when there is none, it is damaged, too large, or holds anything but plain files inside.
    """
    with _reading(path) as file:
        folder.mkdir(parents=True, exist_ok=True)
        for name, _, content in _members(path, file):
            target = folder / name
            (target.parent if content else target).mkdir(parents=True, exist_ok=True)
            if content:
                with target.open("xb") as written:
                    for piece in content:
                        written.write(piece)


def peek(path: Path, name: str) -> bytes:
    """The content of one small file of an archive, empty when there is none; what lies behind it is not read.

    Raises:
        ArtifactError: as `unpack` does.
    """
    with _reading(path) as file:
        for found, size, content in _members(path, file):
            if content and found == PurePosixPath(name):
                if size > FACTS:
                    raise ArtifactError(f"{path} holds {name} of {size:,} bytes, more than {FACTS:,}")
                return b"".join(content)
    return b""


def verify(folder: Path, of: str = "") -> dict[str, Any]:
    """Compare every file of an unpacked artifact with its checksum in `model.json`, whose content is given.

    No name in it is opened that is no file of the folder, and nothing of the artifact runs. A message says `of` which
    artifact a file is.

    Raises:
        ArtifactError: when a file is missing, changed, no plain file, or not named.
    """
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    kinds = {name: path.lstat() for name, path in found.items()}
    files = {name: facts.st_size for name, facts in kinds.items() if not stat.S_ISDIR(facts.st_mode)}
    for name in files:
        if not stat.S_ISREG(kinds[name].st_mode):
            raise ArtifactError(f"{name}{of} is no plain file")
    try:
        if files["model.json"] > FACTS:
            raise ValueError("it is too large")
        facts: dict[str, Any] = json.loads(found["model.json"].read_text(encoding="utf-8"))
        expected = {str(name): str(digest) for name, digest in facts["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"model.json{of} is missing or broken") from error
    for name, digest in expected.items():
        if name not in files or digest_of(found[name]) != digest:
            raise ArtifactError(f"{repr(name)[1:-1][:200]}{of} is missing or does not match its checksum")
    if more := sorted(files.keys() - expected.keys() - {"model.json"}):
        raise ArtifactError(f"{more[0]}{of} is not among the files that model.json names")
    return facts


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """An archive, opened; whatever is wrong with it becomes one sentence."""
    try:
        if not path.is_file():  # a device or a pipe would never end
            raise ArtifactError(f"there is no artifact at {path}; train one with `make train-local`")
        with path.open("rb") as file:
            yield file
    except ArtifactError:
        raise
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be unpacked: {error}") from error


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[PurePosixPath, int, Iterator[bytes] | None]]:
    """Name, size and content of every file, and without content every folder; all of them checked."""
    size = path.stat().st_size
    most = min(LARGEST, FREE + RATIO * size)
    stream, names = _Stream(_gunzip(path, file, most)), dict[str, tuple[PurePosixPath, bool]]()
    more: dict[str, str] = {}  # of headers that go before another
    for _ in range(3 * ENTRIES):
        block = stream.read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            stream.drain()  # to its end, where its checksum is
            return
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if entry.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            if not 0 <= entry.size <= EXTENDED:
                raise ArtifactError(f"{path} has a header of {entry.size:,} bytes, more than {EXTENDED:,}")
            more |= _extended(entry.type, stream.read(entry.size))
            stream.read(-entry.size % tarfile.BLOCKSIZE)
            continue
        name, length, more = more.get("path", entry.name), int(more.get("size", entry.size)), {}
        if length > most or len(names) >= ENTRIES:
            raise _too_large(path, most)
        known = _checked(path, name, entry.type, length, names)
        content = stream.take(length)
        yield known, length, None if entry.type == FOLDER else content
        for _ in content:  # what nobody took
            pass
        stream.read(-length % tarfile.BLOCKSIZE)
    raise _too_large(path, most)


def _too_large(path: Path, most: int) -> ArtifactError:
    return ArtifactError(
        f"{path} would become more than {most:,} bytes or {ENTRIES:,} files, which no artifact of its size does"
    )


def _checked(
    path: Path, text: str, kind: bytes, size: int, names: dict[str, tuple[PurePosixPath, bool]]
) -> PurePosixPath:
    """The name of a file or folder that may be written.

    Args:
        path: of the archive.
        text: the name as it stands there.
        kind: of entry.
        size: of its content.
        names: all so far, as a file system that ignores case would see them, with their spelling and whether they are
            folders.
    """
    name, folder = PurePosixPath(text), kind == FOLDER
    parts, shown = name.parts, repr(text[:200])
    plain = size == 0 if folder else kind in PLAIN and size >= 0 and parts
    inside = not name.is_absolute() and ".." not in parts and len(parts) <= DEEPEST
    if not (plain and inside and text.isprintable() and "\\" not in text):
        raise ArtifactError(f"{path} holds {shown}, which is not a plain file inside the archive")
    for depth in range(1, len(parts) + 1):
        own = PurePosixPath(*parts[:depth]), folder or depth < len(parts)
        known = names.setdefault(unicodedata.normalize("NFKC", str(own[0]).casefold()), own)
        if known != own or (known is not own and not own[1]):
            raise ArtifactError(f"{path} holds {shown} beside another entry of that name")
    return name


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """What a header says of the next one: its name in GNU's way, or records of POSIX: `<length> <key>=<value>`."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode()}
    found, start = {}, 0
    while kind == tarfile.XHDTYPE and start < len(data.rstrip(b"\0")):
        blank = data.index(b" ", start, start + 8)
        end = start + int(data[start:blank])
        key, equals, value = data[blank + 1 : end - 1].decode().partition("=")
        if not blank < end <= len(data) or not equals or key.startswith("GNU.") or key in ("linkpath", "hdrcharset"):
            raise ValueError(f"its header holds {data[start : start + 40]!r}")
        found[key] = value
        start = end
    if not (found.get("size", "0").isascii() and found.get("size", "0").isdigit()):
        raise ValueError(f"its header has the size {found['size'][:40]!r}")
    return {key: value for key, value in found.items() if key in ("path", "size")}


class _Stream:
    """Pieces of bytes, read by the length that is asked for."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def take(self, size: int) -> Iterator[bytes]:
        """So many bytes, in pieces."""
        while size:
            piece = self._rest or next(self._pieces, None)
            if piece is None:
                raise EOFError("it ends too early")
            self._rest = piece[size:]
            size -= min(size, len(piece))
            yield piece[: len(piece) - len(self._rest)]

    def read(self, size: int) -> bytes:
        """So many bytes."""
        if len(self._rest) < size:
            return b"".join(self.take(size))
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def drain(self) -> None:
        """Read to the end."""
        for _ in self._pieces:
            pass


def _gunzip(path: Path, file: BinaryIO, most: int) -> Iterator[bytes]:
    """What a .gz file holds, in pieces of at most CHUNK, up to a number of bytes."""
    rest, left = file.read(CHUNK), most
    for _ in range(ENTRIES):  # one stream, or several behind one another
        inflate = zlib.decompressobj(wbits=31)
        while not inflate.eof:
            piece = inflate.decompress(rest, CHUNK)
            if not (piece or rest or inflate.eof):
                raise EOFError("it ends too early")
            left -= len(piece)
            if left < 0:
                raise _too_large(path, most)
            yield piece
            if not inflate.eof:
                rest = inflate.unconsumed_tail or file.read(CHUNK)
        rest = inflate.unused_data.lstrip(b"\0")
        while not rest and (more := file.read(CHUNK)):
            rest = more.lstrip(b"\0")
        if not rest:
            return
    raise _too_large(path, most)


def _import(path: Path) -> ModuleType:
    """Import the artifact's `inference.py`, which finds its own `imaging` and `model` beside itself."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location("artifact_inference", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))
