"""Register an artifact with its metrics, model card, report and baseline, for approval: `make register RUN=<name>`.

    python -m pipelines register --run 20261121-093000-a1b2
    make register JOB=<training job>    ARTIFACT=<file>                # instead of the newest run or RUN=

It needs the metrics on the test split, `evaluation.json` beside the artifact: `make evaluate`. An artifact that is
registered already is found, not registered again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

from pipelines import runs, terminal
from pipelines.cloud import artifact, images, packages, prices, pull, storage
from pipelines.cloud.account import Account
from pipelines.cloud.packages import Package
from pipelines.config import load
from pipelines.registry import package
from pipelines.registry.package import Evidence
from pipelines.terminal import UserError

ATTACHED = ("evaluation.json", "run.json", "report.html")  # beside an artifact; the last two where they are there


def evidence(archive: Path, folder: Path) -> Evidence:
    """Check an artifact and what lies beside it, and gather the files to attach in an empty folder.

    Raises:
        UserError: when it is damaged, or has no evaluation of its own.
    """
    run = archive.resolve().parent.name
    with tempfile.TemporaryDirectory(prefix="register-") as unpacked:
        artifact.checked(archive, Path(unpacked))
        for name in ("model.json", "baseline.json"):
            shutil.copyfile(Path(unpacked, name), folder / name)
    for name in ATTACHED:
        if archive.with_name(name).is_file():
            shutil.copyfile(archive.with_name(name), folder / name)
    if not (folder / "evaluation.json").is_file():
        raise UserError(
            f"{archive} was not evaluated, and a package needs its metrics; do so: "
            f"`{terminal.command('evaluate', RUN=run)}`"
        )
    read = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    model, tested = read["model.json"], read["evaluation.json"]
    if tested.get("model_dataset_fingerprint") != model["dataset_fingerprint"]:
        raise UserError(f"evaluation.json beside {archive} is of another model; evaluate this one: `make evaluate`")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    facts = read.get("run.json", {})
    name = re.sub(r"[^\w.:/=+@ -]", "-", facts.get("run", run))  # what AWS allows in metadata
    return Evidence(files["model.json"], name, model, facts, tested, files)


def register(account: Account, options: Namespace) -> Package:
    """Register the artifact that the options name, once.

    Raises:
        UserError: when it cannot be registered.
    """
    artifact.only_one(options)
    if options.job:
        archive = pull.pull(account, options.job) / "model.tar.gz"
    else:
        archive = options.artifact or runs.find(options.run) / "model.tar.gz"
    with tempfile.TemporaryDirectory(prefix="register-") as temporary:
        found = evidence(archive, Path(temporary))
        known = packages.newest(account, identity=found.identity)
        if known:
            print(f"{archive} is registered already: {known} is {known.status}")
            return known
        image, place = images.uri(account, "serving"), packages.group()
        plan = f"registers {found.run} in the model package group {place} in {account.region}, with {image}"
        prices.afford(account.settings, plan, 0.0, yes=False)
        images.ensure(account, "serving")
        uri = found.facts.get("model_uri") or storage.artifact(account, archive)
        digest = hashlib.sha256(json.dumps(found.files, sort_keys=True).encode()).hexdigest()
        attached = storage.upload(account, Path(temporary), f"registry/{digest}")
        stored = storage.identity(account, uri)
        return package.register(account, package.description(found, image, uri, attached, stored))


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Register an artifact for approval.", settings=True)
    parser.add_argument("--run", variable="RUN", help="name of a run (default: the newest)")
    parser.add_argument("--job", variable="JOB", help="a training job, which is pulled first")
    parser.add_argument(
        "--artifact", variable="ARTIFACT", type=Path, help="a model.tar.gz, with its evaluation.json beside it"
    )
    options = parser.parse_args()
    made = register(Account(load(options.set)), options)
    print(f"{made}: {made.status}\nnext:\n  {terminal.command('approve', PACKAGE=made.version)}")
    print("  make deploy PACKAGE=champion")
    return 0
