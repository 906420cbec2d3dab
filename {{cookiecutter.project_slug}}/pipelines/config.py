"""A typed, frozen view of `configs/*.yaml`.

Precedence, lowest first: the files, environment variables such as `IMAGES__BASE`, options `--set images.base=...`.
Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines import ROOT, schema
from pipelines.terminal import UserError
from progress import plain
from training.config import ConfigurationError, Hyperparameters, nearest, parse, shown

try:
    from pipelines.sections import Settings  # type: ignore[import-not-found,unused-ignore]
except ModuleNotFoundError:  # in the scope `local`
    from pipelines.schema import Settings  # type: ignore[assignment,unused-ignore]

__all__ = ["Settings", "load"]

FOLDERS = {"aws": "cloud"}  # of a section that is not called as its part
UNREADABLE = (ValueError, OverflowError, RecursionError)  # numbers, dates and brackets that Python does not take


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: for PyYAML `1e-3` would be text; and no aliases, of which a few lines grow to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, such as *name; write the value out")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
    folder: Path = ROOT / "configs",
    options: Mapping[str, Any] | None = None,
) -> Settings:
    """Read and check the settings.

    Args:
        overrides: `section.key=value`, values in YAML.
        environment: variables named `SECTION__KEY` override the files.
        folder: where training.yaml and infrastructure.yaml lie.
        options: values by `section.key`, of a verb's own options; None: not given.

    Raises:
        UserError: naming the key, the value and the nearest valid name.
    """
    document = {"training": _read(folder / "training.yaml"), **_read(folder / "infrastructure.yaml")}
    known = {section: _keys(section, document.get(section)) for section in Settings.model_fields
             if section in (*document, *sections())}  # fmt: skip
    for section in known:
        document.setdefault(section, {})  # what is there needs its settings
    for name, value in environment.items():
        section, separator, key = name.partition("__")
        if separator and section.lower() in known and name == name.upper():
            _override(document, known, f"{section.lower()}.{key.lower()}", value, f"environment variable {name}")
    given = [f"{path}={value}" for path, value in (options or {}).items() if value is not None]
    for override in (*overrides, *given):
        path, separator, value = override.partition("=")
        if not separator:
            raise UserError(f"--set {shown(override)} has no value; write --set section.key=value")
        _override(document, known, path.strip(), value, f"--set {override}")
    try:
        document["training"] = parse(document["training"])  # the same checks as in the container
        return Settings.model_validate(document)
    except ConfigurationError as error:
        raise UserError(f"configs: training.{error}") from None
    except ValidationError as error:
        raise UserError(_explain(error, known)) from None


def sections() -> list[str]:
    """The sections that this project has: those of AWS where it has the part of `pipelines/` that they are for."""
    folders = {name: ROOT / "pipelines" / FOLDERS.get(name, name) for name in Settings.model_fields}
    return [name for name, folder in folders.items() if name in schema.Settings.model_fields or folder.is_dir()]


def meant(text: str) -> str:
    """The setting that `epochs=3`, `--epochs 3` or the like names, as `training.epochs=3`; nothing where it is none."""
    name, value = [*re.split(r"[=\s]+", text.strip().lstrip("-"), maxsplit=2), ""][:2]
    sections_of = {key: section for section in (*sections(), "training") for key in _keys(section)}
    close = difflib.get_close_matches(name.rpartition(".")[2].lower().replace("-", "_"), sections_of, 1, 0.8)
    said = value if re.fullmatch(r"[\w.:/+-]+", value, re.ASCII) else "..."
    return f"{sections_of[close[0]]}.{close[0]}={said}" if close else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        document = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise UserError(f"{path} is not valid YAML: {plain(' '.join(str(error).split()))}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold keys and values, not {type(document).__name__}")
    return document


def _parsed(text: str) -> Any:
    """What YAML says, when it is something that a message can show."""
    found = yaml.load(text, _Loader)  # noqa: S506  (a safe loader)
    str(found)  # fails for numbers that Python reads and does not write, such as 0xfff...
    return found


def _override(document: dict[str, Any], known: dict[str, list[str]], path: str, text: str, origin: str) -> None:
    section, separator, key = path.partition(".")
    origin = plain(origin if len(origin) <= 200 else f"{origin[:160]}... ({len(origin)} characters)")
    if not separator or section not in known:
        near = f"did you mean {meant(f'{path}={text}')}?" if not separator and meant(path) else nearest(section, known)
        raise UserError(f"{origin}: unknown section {shown(section)}; {near}")
    try:
        value = _parsed(text)
    except yaml.YAMLError:
        value = text
    except UNREADABLE as error:
        raise UserError(f"{origin} cannot be read: {str(error).partition(';')[0]}") from None
    if key not in known[section]:
        raise UserError(f"{origin}: unknown key {shown(key)} in {section}; {nearest(key, known[section])}")
    if not isinstance(document.get(section), dict):
        document[section] = {}
    document[section][key] = value


def _keys(section: str, given: Any = None) -> list[str]:
    """Those of a section; beside the values of a file only those that its scope has."""
    if section == "training":
        return [option.name for option in fields(Hyperparameters)]
    kind = Settings.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, BaseModel)
    options = kind.model_fields.items()
    return [name for name, option in options if option.is_required() or not isinstance(given, dict) or name in given]


def _explain(error: ValidationError, known: dict[str, list[str]]) -> str:
    """The first problem as one sentence."""
    problem = min(error.errors(), key=lambda item: item["type"] == "missing")  # a misspelt key explains a missing one
    nested = problem["loc"][:2] == ("tuning", "ranges")  # by name
    where = ".".join(str(part) for part in problem["loc"][:2])
    section, key = str(problem["loc"][0]), str(problem["loc"][-1])
    if problem["type"] == "extra_forbidden" and not nested:
        near = nearest(key, known[section] if len(problem["loc"]) > 1 else known)
        return f"configs: unknown key {where} (value {shown(problem['input'])}); {near}"
    if problem["type"] == "missing" and not (nested and problem["loc"][2:]):
        return f"configs: {where} is missing; add it, or take the file of the template"
    depth = 3 if nested else 2
    reasons = [item["msg"] for item in error.errors() if item["loc"][:depth] == problem["loc"][:depth]]
    if nested:
        name = ".".join(str(part) for part in problem["loc"][2:] if part not in ("range", "list"))
        reasons = [f"{name} {reasons[0]}".strip()]
    return f"configs: {where} is {shown(problem['input'])}: {' or '.join(dict.fromkeys(reasons))}"
