"""Compare captured requests with an artifact's baseline: do images or predictions look different from those back then?

    python src/processing/monitor.py --artifact model.tar.gz --data folder-of-captured-requests --output folder

Reads what an endpoint's data capture writes, files of JSON lines, and takes requests apart by the code that serves
them. The report has four distributions (predicted classes, confidence, brightness, contrast), each with its population
stability index (PSI, the sum of (q - p) ln(q / p) over bins) against the baseline. Customary limits are 0.1 and 0.25
(Siddiqi, Credit Risk Scorecards, 2006) whatever the number of images; but without any change, PSI / (1/n + 1/m) of n
images against m is chi-square distributed with one degree of freedom less than there are bins (Yurdakul, Statistical
Properties of Population Stability Index, 2018). So there is drift only above the given limit and above that
distribution's quantile; and with fewer images than --minimum there is no verdict. Requests of one burst resemble each
other and no statistic here knows that: choose a period in which many clients ask.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

import imaging
import payload
from inference.artifact import ArtifactError, unpack
from progress import plain

SHARE = 0.05  # of the baseline: bins with less are taken together
CHANCE = 1e-4  # of a false alarm by one distribution in one comparison, at most
NAMESPACE = "ModelDrift"  # of the metrics
NOT_ENOUGH = "not enough images"


class Skipped(ValueError):
    """A captured request that is not compared; the message is the reason that the report counts."""


@dataclass
class Sample:
    """What was captured."""

    labels: Counter[str] = field(default_factory=Counter)
    values: dict[str, list[float]] = field(default_factory=lambda: {"confidence": [], "brightness": [], "contrast": []})
    requests: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def collect(folder: Path, facts: dict[str, Any], start: datetime | None, end: datetime | None) -> Sample:
    """Read every file below a folder; a line that cannot be used is counted by its reason.

    Args:
        folder: of captured requests.
        facts: the content of the artifact's `model.json`.
        start, end: of the period, by when the model answered; None: all.
    """
    sample = Sample()
    for path in (path for path in sorted(folder.rglob("*.jsonl")) if _near(path, start, end)):
        with path.open("rb") as lines:
            for line in filter(bytes.strip, lines):
                sample.requests += 1
                try:
                    _take(sample, line, facts, start, end)
                except Skipped as reason:
                    sample.skipped[str(reason)] += 1
    return sample


def _near(path: Path, start: datetime | None, end: datetime | None) -> bool:
    """Whether a file's folder, .../yyyy/mm/dd/hh, is of the period or of the hours beside it; others are not read."""
    hour = "".join(path.parts[-5:-1])
    if start is None or end is None or not re.fullmatch(r".*\d{10}", hour):
        return True
    when, beside = datetime.strptime(hour[-10:], "%Y%m%d%H").replace(tzinfo=UTC), timedelta(hours=1)
    return start - beside <= when <= end + beside


def _take(sample: Sample, line: bytes, facts: dict[str, Any], start: datetime | None, end: datetime | None) -> None:
    try:
        record = json.loads(line)
        when = datetime.fromisoformat(record["eventMetadata"]["inferenceTime"])
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        given, answer = (record["captureData"][part] for part in ("endpointInput", "endpointOutput"))
        kind, body, text = str(given["observedContentType"]), _data(given), _data(answer)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Skipped("damaged, or input or output is missing") from error
    if (start and when < start) or (end and when >= end):
        raise Skipped("outside of the period")
    try:
        found = json.loads(text)
        labels, rows = found["labels"], found["probabilities"]
        confidence, known = [float(max(row)) for row in rows], set(labels) <= set(facts["classes"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Skipped("not answered with predictions") from error
    if not known:
        raise Skipped("answered by a model with other classes")
    try:
        statistics = imaging.image_statistics(_pixels(payload.read(body, kind), facts))
    except ValueError as error:  # a request that another version's limits let through
        raise Skipped("not readable as images") from error
    if not len(labels) == len(rows) == len(statistics["brightness"]):
        raise Skipped("with another number of images than of predictions")
    sample.labels.update(labels)
    for name, values in {"confidence": confidence, **statistics}.items():
        sample.values[name] += values


def _data(part: dict[str, str]) -> bytes:
    return base64.b64decode(part["data"], validate=True) if part["encoding"] == "BASE64" else part["data"].encode()


def _pixels(batch: payload.Batch, facts: dict[str, Any]) -> NDArray[Any]:
    """As the model saw them; numbers that came normalised are turned back."""
    if isinstance(batch, list):
        size, deep = facts["image_size"], facts["preprocessing"].get("deep", imaging.DEEP)
        return np.stack([imaging.fit(image, size, deep) for image in batch])
    mean, std = (np.reshape(facts["preprocessing"][name], (3, 1, 1)) for name in ("mean", "std"))
    return batch * std + mean


def compare(baseline: dict[str, Any], sample: Sample, limit: float) -> dict[str, dict[str, Any]]:
    """PSI and limit of each distribution, with the counts of both sides."""
    classes = baseline["predictions"]
    pairs = {"predictions": (list(classes.values()), [sample.labels[name] for name in classes])}
    for name, values in sample.values.items():
        pairs[name] = baseline[name]["counts"], imaging.counted(values, baseline[name]["edges"])
    result = {}
    for name, (before, now) in pairs.items():
        value, bins = psi(before, now)
        chance = quantile(max(bins - 1, 1), 1 - CHANCE) * (1 / max(sum(before), 1) + 1 / max(sum(now), 1))
        bound = max(limit, chance)
        result[name] = {"psi": value, "limit": bound, "drift": value > bound, "baseline": before, "now": now}
    return result


def psi(before: Sequence[int], now: Sequence[int]) -> tuple[float, int]:
    """Population stability index of two histograms, and the number of bins that neighbours were merged into.

    A bin of the baseline that holds less than SHARE is merged with its neighbours of that sort, never with a full one:
    what a full one loses must be seen. Half an image more in each bin keeps empty ones finite.
    """
    merged: list[list[float]] = []
    enough = SHARE * sum(before)
    for first, second in zip(before, now, strict=True):
        if merged and max(merged[-1][0], first) < enough:
            merged[-1] = [merged[-1][0] + first, merged[-1][1] + second]
        else:
            merged.append([first, second])
    shares = np.array(merged) + 0.5
    p, q = (shares / shares.sum(axis=0)).T
    return float(((q - p) * np.log(q / p)).sum()), len(merged)


def quantile(degrees: int, probability: float) -> float:
    """Of the chi-square distribution, by the approximation of Wilson and Hilferty (1931)."""
    part = 2 / (9 * degrees)
    return float(degrees * (1 - part + NormalDist().inv_cdf(probability) * part**0.5) ** 3)


def metrics(report: dict[str, Any]) -> str:
    """A line in CloudWatch's embedded metric format: where it reaches CloudWatch's logs, it becomes metrics.

    `Drift` and those named after a distribution are a PSI divided by its limit: more than 1 is drift.
    """
    values = {"Images": report["images"], "Skipped": sum(report["skipped"].values())}
    if report["verdict"] != NOT_ENOUGH:
        ratios = {name.capitalize(): found["psi"] / found["limit"] for name, found in report["measures"].items()}
        values |= {"Drift": max(ratios.values()), **ratios}
    directive = {
        "Namespace": NAMESPACE,
        "Dimensions": [["EndpointName"]],
        "Metrics": [{"Name": name} for name in values],
    }
    about = {"Timestamp": int(1000 * time.time()), "CloudWatchMetrics": [directive]}
    return json.dumps({"_aws": about, "EndpointName": report["endpoint"], **values})


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compare captured requests with the baseline of an artifact.")
    parser.add_argument("--artifact", type=Path, required=True, help="model.tar.gz")
    parser.add_argument("--data", type=Path, required=True, help="folder of captured requests, with folders in it")
    parser.add_argument("--output", type=Path, required=True, help="folder for the report")
    parser.add_argument("--limit", type=float, default=0.2, help="of a PSI; more is drift")
    parser.add_argument("--minimum", type=int, default=200, help="images; with fewer there is no verdict")
    parser.add_argument("--endpoint", default="", help="whose metrics to print")
    parser.add_argument("--end", type=datetime.fromisoformat, help="of the period, cut to the hour (default: no end)")
    parser.add_argument("--hours", type=int, default=1, help="of the period, with --end")
    options = parser.parse_args(arguments)
    end = options.end and options.end.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    start = end and end - timedelta(hours=options.hours)
    try:
        with tempfile.TemporaryDirectory(prefix="monitor-") as temporary:
            unpack(options.artifact, Path(temporary))
            baseline, facts = (json.loads(Path(temporary, f"{name}.json").read_text("utf-8"))
                               for name in ("baseline", "model"))  # fmt: skip
        if not options.data.is_dir():
            raise ArtifactError(f"{options.data} is no folder; name one that holds captured requests (*.jsonl)")
        sample = collect(options.data, facts, start, end)
    except (ArtifactError, OSError, ValueError) as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    measures, images = compare(baseline, sample, options.limit), sum(sample.labels.values())
    drifted = any(found["drift"] for found in measures.values())
    report = {
        "schema_version": 1,
        "verdict": NOT_ENOUGH if images < options.minimum else "drift" if drifted else "no drift",
        "endpoint": options.endpoint,
        "start": start and start.isoformat(),
        "end": end and end.isoformat(),
        "requests": sample.requests,
        "images": images,
        "minimum": options.minimum,
        "skipped": dict(sample.skipped),
        "measures": measures,
    }
    file = options.output / (f"report-{end:%Y%m%dT%H}.json" if end else "report.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for name, found in measures.items():
        print(f"{name:12} PSI {found['psi']:7.3f}  limit {found['limit']:.3f}{'  DRIFT' if found['drift'] else ''}")
    for reason, count in sample.skipped.items():
        print(f"skipped {count} of {sample.requests} requests: {plain(reason)}")
    print(
        f"{report['verdict']}: {images} images against {baseline['images']} of the baseline (minimum {options.minimum})"
    )
    if options.endpoint:
        print(metrics(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
