"""Validate every answer before a file exists. A refused answer: one sentence, exit code 1, nothing left behind."""

from __future__ import annotations

import json
import keyword
import re
import sys

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")
REGIONS = (
    "af-south-1 ap-east-1 ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-south-1 ap-south-2 ap-southeast-1 "
    "ap-southeast-2 ap-southeast-3 ap-southeast-4 ap-southeast-5 ap-southeast-7 ca-central-1 ca-west-1 cn-north-1 "
    "cn-northwest-1 eu-central-1 eu-central-2 eu-north-1 eu-south-1 eu-south-2 eu-west-1 eu-west-2 eu-west-3 "
    "il-central-1 me-central-1 me-south-1 mx-central-1 sa-east-1 us-east-1 us-east-2 us-gov-east-1 us-gov-west-1 "
    "us-west-1 us-west-2"
).split()
TAKEN = (
    "boto3 botocore build configs cookiecutter data inference imaging mlflow mypy numpy pil pillow pipelines "
    "processing pydantic pytest ruff safetensors sagemaker sklearn src tests torch torchvision tqdm training yaml"
).split()
TEXTS = {"project_name": 60, "description": 200, "author": 100}


def problem() -> str | None:
    """Return what is wrong with the first bad answer, or None."""
    for name, longest in TEXTS.items():
        text = ANSWERS[name]
        if not len(text.strip()) > 0 or len(text) > longest or not text.isprintable():
            return f"{name} is {text!r}; it must be one printable line of 1 to {longest} characters"
    slug = ANSWERS["project_slug"]
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", slug) or len(slug) > 30:
        return (
            f"project_slug is {slug!r}; it must be 1 to 30 lower-case letters, digits and single underscores, "
            "with a letter first and no underscore last"
        )
    if keyword.iskeyword(slug) or slug in sys.stdlib_module_names or slug in TAKEN:
        return f"project_slug is {slug!r}, a name that Python or a dependency uses; choose another one"
    if ANSWERS["aws_region"] not in REGIONS:
        return f"aws_region is {ANSWERS['aws_region']!r}; it must be one of {', '.join(REGIONS)}"
    return None


if __name__ == "__main__":
    found = problem()
    if found:
        sys.exit(f"error: {found}")
