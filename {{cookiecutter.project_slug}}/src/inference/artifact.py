"""Open an artifact: unpack `model.tar.gz` safely, and import the handlers inside it, which check and load the rest."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any


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
            handlers = _import(folder / "code" / "inference.py")
            model = handlers.model_fn(str(folder))  # checks every file first
            facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        except Exception as error:
            raise ArtifactError(f"{path} does not load: {error}") from error
        yield Artifact(folder, facts, handlers, model)


def unpack(path: Path, folder: Path) -> None:
    """Extract the archive's regular files; anything that points outside or is no plain file is refused."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise ArtifactError(f"{path} holds {member.name!r}, which is not a plain file inside the archive")
                source = archive.extractfile(member)
                if source is not None:
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.read())
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no artifact at {path}; train one with `make train-local`") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ArtifactError(f"{path} cannot be unpacked: {error}") from error


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
