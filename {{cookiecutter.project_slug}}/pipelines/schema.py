"""The sections and keys of `configs/infrastructure.yaml`, and what their values may be; sections.py has more for AWS.

What a smaller scope's file does not have has a default here: the value that a larger scope's file begins with.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from training.config import Hyperparameters

IMAGE = r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$"


class Section(BaseModel):
    """Settings that cannot change and refuse unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Images(Section):
    """Which image trains and serves, and how it is built."""

    training: str = Field(pattern=IMAGE)
    serving: str = Field(pattern=IMAGE)
    base: str = Field(pattern=IMAGE)
    torch: str = Field(pattern=r"^[a-z]+[0-9.]*$")
    packages: Literal["auto"] | list[str]
    build_options: list[str]


class Compute(Section):
    """What jobs run on."""

    local_mode: Literal["auto", "container", "process"]
    local_instances: int = Field(ge=1, le=8)


class Data(Section):
    """What is trained on."""

    source: str = Field(min_length=1)
    seed: int = Field(ge=0)
    unreadable: float = Field(ge=0, le=1)
    megapixels: float = Field(gt=0, le=10_000)
    keep_contradicting: bool = False
    pretrained: str = Field(min_length=1)


class Settings(Section):
    """All of `configs/`: `training` is training.yaml, the other sections are those of infrastructure.yaml."""

    training: Hyperparameters
    images: Images
    compute: Compute
    data: Data
