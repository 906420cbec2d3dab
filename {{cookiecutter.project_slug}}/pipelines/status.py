"""What the project has in AWS, since when, and what it costs an hour: `make status`.

python -m pipelines.status
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines import aws, console, engine, inventory, registry
from pipelines.config import Settings, load
from pipelines.console import UserError
from pipelines.inventory import Item

GB = 1e9


def table(items: Sequence[Item]) -> list[str]:
    """A line for each, and what all cost together."""
    ends = {item.of: item for item in items if item.kind == "end schedule"}
    lines = []
    for item in items:
        cost = "price unknown" if item.usd is None else f"{item.usd:.3f} USD/h" if item.bills else ""
        note = ""
        if item.kind == "endpoint":
            end = ends.get(item.name)
            note = f"until {end.detail} UTC" if end else "NO END: nothing deletes it; `make destroy`"
        lines.append("  ".join(
            [f"{item.kind:15}", f"{item.name:40}", f"{item.since.astimezone(UTC):%Y-%m-%d %H:%M}",
             f"{_age(item.since):>7}", f"{cost:>13}", item.detail, note]
        ).rstrip())  # fmt: skip
    return [*lines, total(items)]


def total(items: Iterable[Item]) -> str:
    """What all cost together."""
    costs = [item.usd for item in items if item.bills]
    unknown = costs.count(None)
    known = sum(cost for cost in costs if cost is not None)
    more = f" and {unknown} of unknown price" if unknown else ""
    return f"in all at most {known:.3f} USD an hour{more}, storage and requests apart"


def _age(since: datetime) -> str:
    hours = (datetime.now(UTC) - since.astimezone(UTC)).total_seconds() / 3600
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"


def stored(settings: Settings) -> list[str]:
    """The stack, and how much is in its bucket and its repository."""
    try:
        stack = aws.stack(settings)
    except UserError as error:
        return [str(error)]
    lines = [f"stack {engine.project_name()}: there"]
    parts: list[tuple[str, Callable[[], str]]] = [
        (f"bucket {stack.bucket}", lambda: _bucket(settings, stack.bucket)),
        (f"repository {stack.repository}", lambda: _images(settings, stack.repository)),
        (f"registry {registry.group()}", lambda: _packages(settings)),
    ]
    for name, measure in parts:
        try:
            with aws.explained("looking"):
                lines.append(f"{name}: {measure()}")
        except UserError as error:
            lines.append(f"{name}: {error}")
    return lines


def _bucket(settings: Settings, bucket: str) -> str:
    """S3 measures once a day; listing everything would take long and cost requests."""
    dimensions = [{"Name": "BucketName", "Value": bucket}, {"Name": "StorageType", "Value": "StandardStorage"}]
    metric = {"Namespace": "AWS/S3", "MetricName": "BucketSizeBytes", "Dimensions": dimensions}
    query: list[dict[str, Any]] = [{"Id": "size", "MetricStat": {"Metric": metric, "Period": 86400, "Stat": "Average"}}]
    now = datetime.now(UTC)
    results = aws.pages(
        aws.client(settings, "cloudwatch"), "get_metric_data", "MetricDataResults", MetricDataQueries=query,
        StartTime=now - timedelta(days=3), EndTime=now, ScanBy="TimestampDescending",
    )  # fmt: skip
    values = [value for result in results for value in result["Values"]]
    return f"{values[0] / GB:.1f} GB yesterday" if values else "S3 has not measured its size yet"


def _images(settings: Settings, repository: str) -> str:
    ecr, name = aws.client(settings, "ecr"), repository.partition("/")[2]
    sizes = [
        image["imageSizeInBytes"] for image in aws.pages(ecr, "describe_images", "imageDetails", repositoryName=name)
    ]
    return f"{len(sizes)} images, {sum(sizes) / GB:.1f} GB"


def _packages(settings: Settings) -> str:
    best = registry.champion(settings)
    return f"{len(registry.summaries(settings))} packages, the champion is {best or 'none yet'}"


def main() -> int:
    """Command line; see the module's docstring."""
    settings = load(console.parser("What the project has in AWS and what it costs.", settings=True).parse_args().set)
    print(f"{engine.project_name()} in {settings.aws.region}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC")
    print("\n".join([*table(inventory.everything(settings)), *stored(settings)]))
    return 0


if __name__ == "__main__":
    console.run_verb(main)
