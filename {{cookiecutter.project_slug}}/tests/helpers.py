"""What several tests need and is no fixture."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable

import numpy as np
from PIL import Image

Verb = Callable[..., subprocess.CompletedProcess[str]]
CLASSES = ("down", "left", "up")


def draw(label: str, number: int, size: int = 12) -> Image.Image:
    """A noisy picture whose bright edge tells its class."""
    random = np.random.default_rng([CLASSES.index(label), number])
    pixels = random.integers(0, 90, size=(size, size, 3), dtype=np.uint8)
    edge = {"down": np.s_[size // 2 :, :], "left": np.s_[:, : size // 2], "up": np.s_[: size // 2, :]}[label]
    pixels[edge] += 120
    return Image.fromarray(pixels)


def verb_environment() -> dict[str, str]:
    """The environment of a shell that has no AWS account and has never heard of this project."""
    strange = ("AWS_", "SAGEMAKER_", "SM_", "INFERENCE_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(strange)}


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def containers_and_networks() -> set[str]:
    """Identifiers of all containers and networks of the engine."""
    commands = (["docker", "ps", "--all", "--quiet"], ["docker", "network", "ls", "--quiet"])
    return {line for command in commands for line in subprocess.check_output(command, text=True).splitlines()}
