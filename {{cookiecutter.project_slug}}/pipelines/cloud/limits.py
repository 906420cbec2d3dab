"""What AWS would refuse or could not run, known from the settings alone; verbs refuse it, `make doctor` says all of it.

NVIDIA's drivers, as AWS's documents had them in November 2026 (docs/aws.md has the table):
https://docs.aws.amazon.com/sagemaker/latest/dg/inference-gpu-drivers.html, and API_ProductionVariant.html of its API
reference (InferenceAmiVersion). For training AWS names none. What CUDA needs:
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html. What PyTorch builds:
https://github.com/pytorch/pytorch/issues/178665 and 190385.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.config import Settings
from pipelines.environment import locked_versions
from pipelines.local import images
from training.config import GPU_INSTANCE

# Asked for by name: the machines of g4dn, g5 and p4d would have driver 470, on which no torch of today runs.
GPU_MACHINE, GPU_DRIVER = "al2023-ami-sagemaker-inference-gpu-4-1", 580
NEEDS = {"12": 525, "13": 580}  # CUDA's major version: NVIDIA's oldest driver
NEWEST = {"cu126": (2, 14), "cu128": (2, 11)}  # builds that PyTorch gave up: the last release that has them
ARM = re.compile(r"ml\.(p6e|[a-z]+\d+g)")  # Graviton, and Grace beside NVIDIA's GB200
SOONEST = 0.5  # hours until an endpoint's end


def endpoint(settings: Settings) -> Iterator[str]:
    """Why AWS could not serve as `endpoint` says."""
    chosen, serverless = settings.endpoint, settings.endpoint.type == "serverless"
    refused = {  # https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints.html; a key of KMS is taken
        "endpoint.capture_percent": chosen.capture_percent > 0,
        "aws.subnets": bool(settings.aws.subnets),
        "compute.isolation": settings.compute.isolation,
    }
    for setting in (key for key, value in refused.items() if serverless and value):
        yield f"AWS's serverless endpoints have no {setting}; unset it, or choose TYPE=realtime"
    if 0 < chosen.ttl_hours < SOONEST:
        yield (f"endpoint.ttl_hours is {chosen.ttl_hours:g}, before the endpoint may be in service; give "
               f"{SOONEST} or more, or 0: never")  # fmt: skip
    if not serverless:
        yield from machine(settings, "endpoint", chosen.instance_type)


def machine(settings: Settings, use: str, kind: str) -> Iterator[str]:
    """Why a type of instance could not run the project's image; `use` is the section of the settings that names it."""
    target: images.Target = "training" if use == "compute" else "serving"
    if getattr(settings.images, target) != "project":
        return
    named, build = f"{use}.instance_type is {kind}", images.torch_build(settings, gpu=True)
    if ARM.match(kind):
        yield f"{named}, whose processors are ARM, and the project's images are built for amd64; choose another type"
    elif kind.startswith("ml.p2.") or (use == "endpoint" and kind.startswith("ml.p3")):
        yield f"{named}, whose GPUs or driver (470) are too old for torch; choose ml.g4dn, ml.g5 or newer"
    elif GPU_INSTANCE.match(kind) and build and not build.startswith("cu"):
        yield f"{named} and images.torch is {build}, which uses no NVIDIA GPU; set it to auto, or choose another type"
    elif kind.startswith("ml.p3") and build not in ("", "cu126"):
        yield f"{named}, for whose V100 torch's build {build} has no code; set images.torch to cu126"


def driver(settings: Settings, use: str, kind: str) -> str:
    """What is known of a GPU machine's driver and torch's build, for a type that `machine` has no objection to."""
    build = images.torch_build(settings, gpu=True)
    oldest = NEEDS.get(build[2:4], 0)
    needs = f"torch's build {build} runs from NVIDIA's driver {oldest} on" if oldest else "torch's build is your own"
    if use == "endpoint":
        return f"{kind} for the endpoint has NVIDIA's driver {GPU_DRIVER}; {needs}"
    return f"AWS does not say which driver {kind} has in training; {needs}, and a job on an older one ends at once"


def doubts(settings: Settings) -> Iterator[str]:
    """What AWS's documents leave open: it is asked for all the same."""
    if settings.endpoint.type == "async" and settings.endpoint.capture_percent:
        # https://docs.aws.amazon.com/sagemaker/latest/dg/model-monitor-data-capture.html; the API takes both
        yield ("AWS describes endpoint.capture_percent for real-time endpoints only; requests and answers of an async "
               "one lie below async/ in the bucket in any case")  # fmt: skip


def locked(settings: Settings) -> str:
    """Why the torch of `uv.lock` cannot have the build that GPU machines get; or nothing."""
    build = images.torch_build(settings, gpu=True)
    pinned = re.match(r"(\d+)\.(\d+)", locked_versions(images.LOCK).get("torch", ""))
    if pinned is None or build not in NEWEST or (int(pinned[1]), int(pinned[2])) <= NEWEST[build]:
        return ""
    last = ".".join(map(str, NEWEST[build]))
    return (f"uv.lock has torch {pinned[1]}.{pinned[2]}, whose build {build} was never made (the last was {last}), so "
            "GPU images get PyPI's, for CUDA 13")  # fmt: skip
