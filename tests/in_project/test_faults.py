"""Kills, truncated files, full disks and broken losses, injected for real into jobs as the launcher starts them.

A job that was disturbed and goes on must end with the same bytes as one that never was.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipelines import SOURCE
from tests.helpers import verb_environment
from training.checkpoint import WRITER

SHORT = {"epochs": 4, "batch_size": 8, "precision": "fp32", "checkpoint_minutes": 0.0, "model": "cnn"}
SHORT |= {"deterministic": True}  # or the memory order of tensors is chosen by timing
STEPS = 5  # an epoch
STEP = "            progress.step += 1\n"  # the line of the loop before which faults come


@dataclass
class Job:
    """A training job on this machine: its source, which a test may break, its data, and all that it writes."""

    source: Path
    packed: Path
    root: Path
    ranks: int

    def start(self, **hyperparameters: Any) -> subprocess.Popen[str]:
        for name in ("model", "output", "checkpoints"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        environment = verb_environment() | {
            "SM_CHANNEL_TRAIN": str(self.packed / "train"),
            "SM_CHANNEL_VALIDATION": str(self.packed / "validation"),
            "SM_CHANNEL_CHECKPOINTS": str(self.root / "checkpoints"),
            "SM_MODEL_DIR": str(self.root / "model"),
            "SM_OUTPUT_DATA_DIR": str(self.root / "output"),
            "SM_OUTPUT_FAILURE": str(self.root / "failure"),
            "PROCESSES_PER_HOST": str(self.ranks),
            "SM_HPS": json.dumps(SHORT | hyperparameters),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "training/launch.py"], cwd=self.source, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, **hyperparameters: Any) -> tuple[int, str]:
        """Exit code and log."""
        started = self.start(**hyperparameters)
        text, _ = started.communicate(timeout=150)
        return started.returncode, text

    def weights(self) -> bytes:
        return (self.root / "model" / "model.safetensors").read_bytes()

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.root / "checkpoints").iterdir())

    def failure(self) -> str:
        return (self.root / "failure").read_text()

    def inject(self, module: str, before: str, code: str) -> None:
        """Put code before a line of a module; `once()` is true the first time only, over all processes of the job."""
        path = self.source / "training" / module
        text = path.read_text()
        assert text.count(before) == 1
        indent = before[: len(before) - len(before.lstrip())]
        marker = self.root / "happened"
        once = f"\n\ndef once():\n    import os\n    try:\n        os.mkdir({str(marker)!r})\n        return True\n"
        once += "    except FileExistsError:\n        return False\n"
        lines = "".join(f"{indent}{line}\n" for line in code.splitlines())
        path.write_text(text.replace(before, lines + before) + once)


def make(tmp_path: Path, packed: Path, ranks: int, name: str = "job") -> Job:
    source = tmp_path / f"{name}-src"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    watch = source / "training" / "watch.py"
    watch.write_text(watch.read_text().replace("MEETING_SECONDS = 1.0", "MEETING_SECONDS = 0.0"))  # meet at every step
    (tmp_path / name).mkdir()
    return Job(source, packed, tmp_path / name, ranks)


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Job]:
    """Jobs that nobody disturbed, on one rank and on two."""
    jobs = {}
    for ranks in (1, 2):
        jobs[ranks] = make(tmp_path_factory.mktemp("undisturbed"), packed, ranks)
        code, text = jobs[ranks].run()
        assert code == 0, text
    return jobs


@pytest.fixture(params=[1, 2], ids=["one_rank", "two_ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def job(tmp_path: Path, packed: Path, ranks: int) -> Job:
    return make(tmp_path, packed, ranks)


KILL = """import os
if progress.step == 12 and world.rank == world.size - 1 and once():
    os.kill(os.getpid(), 9)"""
# Checkpoints are written beside training; on a busy machine the newest one may not be whole yet when a kill comes.
WHOLE = f"[each.join() for each in __import__('threading').enumerate() if each.name == {WRITER!r}]"


def test_1_a_killed_rank_is_restarted_and_the_run_ends_with_the_same_bytes(
    job: Job, undisturbed: dict[int, Job]
) -> None:
    job.inject("loop.py", STEP, KILL)
    code, text = job.run(max_restarts=1)
    assert code == 0, text
    assert "resumed after epoch " in text
    assert job.weights() == undisturbed[job.ranks].weights()


def test_1_a_killed_rank_ends_the_job_within_seconds(tmp_path: Path, packed: Path, undisturbed: dict[int, Job]) -> None:
    job = make(tmp_path, packed, 2)
    job.inject("loop.py", STEP, KILL)
    started = time.monotonic()
    code, _ = job.run()
    assert code not in (0, 143)
    assert time.monotonic() - started < 60
    assert not (job.root / "model" / "model.json").exists()
    code, text = job.run()
    assert code == 0, text
    assert job.weights() == undisturbed[2].weights()


def test_2_sigterm_saves_and_exits_with_143(job: Job, undisturbed: dict[int, Job]) -> None:
    job.inject("loop.py", STEP, "if progress.step == 7 and once(): print('at step 7', flush=True); time.sleep(2)")
    started = job.start()
    assert started.stdout is not None
    for line in started.stdout:
        if "at step 7" in line:
            break
    begun = time.monotonic()
    started.send_signal(signal.SIGTERM)
    text = started.communicate(timeout=60)[0]
    assert started.returncode == 143, text
    assert time.monotonic() - begun < 30
    assert "stopped by SIGTERM" in text
    assert not (job.root / "model" / "model.json").exists()
    assert not (job.root / "failure").exists()
    assert "step-000000008" in job.checkpoints()
    code, text = job.run()
    assert code == 0, text
    assert "resumed after epoch 1 of 4 and 3 steps" in text
    assert job.weights() == undisturbed[job.ranks].weights()


def test_2_a_stop_that_one_rank_gets_stops_all(tmp_path: Path, packed: Path, undisturbed: dict[int, Job]) -> None:
    job = make(tmp_path, packed, 2)
    stop = "import os\nif progress.step == 7 and world.rank == 1 and once(): os.kill(os.getpid(), 15)"
    job.inject("loop.py", STEP, stop)
    assert job.run()[0] == 143
    code, text = job.run()
    assert code == 0, text
    assert job.weights() == undisturbed[2].weights()


def test_3_sigterm_during_a_save(job: Job, undisturbed: dict[int, Job]) -> None:
    pause = "import time\nif step >= 7 and once(): os.kill(os.getpid(), 15); time.sleep(2)"
    job.inject("checkpoint.py", "        digest = hashlib", pause)
    code, text = job.run()
    assert code == 143, text
    assert len(job.checkpoints()) == 2
    code, text = job.run()
    assert code == 0, text
    assert job.weights() == undisturbed[job.ranks].weights()


def test_4_a_kill_during_a_save_leaves_litter_that_the_next_start_removes(
    job: Job, undisturbed: dict[int, Job]
) -> None:
    job.inject("checkpoint.py", "        digest = hashlib", "if step >= 7 and once(): os.kill(os.getpid(), 9)")
    code, _ = job.run()
    assert code not in (0, 143)
    assert any(name.endswith(".tmp") for name in job.checkpoints())
    code, text = job.run()
    assert code == 0, text
    assert "resumed after" in text
    assert not any(name.endswith(".tmp") for name in job.checkpoints())
    assert job.weights() == undisturbed[job.ranks].weights()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
def test_5_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, packed: Path, undisturbed: dict[int, Job], damage: Any
) -> None:
    job = make(tmp_path, packed, 2 if damage is flip else 1)
    job.inject("loop.py", STEP, f"{WHOLE}\n{KILL}")
    assert job.run()[0] != 0
    folders = [job.root / "checkpoints" / name for name in job.checkpoints() if name.startswith("step-")]
    for older in folders[:-2]:  # the kill may have come before it was dropped
        shutil.rmtree(older)
    folders = folders[-2:]
    for name in ("state.safetensors.sagemaker-uploaded", ".sagemaker-uploading"):  # SageMaker's own files
        (folders[1] / name).touch()
    damage(folders[1] / "state.safetensors")
    shutil.copytree(job.root / "checkpoints", tmp_path / "spare")
    code, text = job.run()
    assert code == 0, text
    assert f"checkpoint {folders[1].name} is damaged" in text
    assert job.weights() == undisturbed[job.ranks].weights()
    shutil.rmtree(job.root / "checkpoints")
    shutil.move(tmp_path / "spare", job.root / "checkpoints")
    damage(folders[0] / "state.safetensors")
    code, text = job.run()
    assert code != 0
    assert "none of the 2 checkpoints in" in job.failure()
    assert "start a new run" in job.failure()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints and a bit, not for three."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_6_a_full_disk_costs_the_checkpoint_and_not_the_run(
    job: Job, undisturbed: dict[int, Job], small_disk: Path
) -> None:
    (job.root / "checkpoints").symlink_to(small_disk)
    ballast = f"place = Path({str(small_disk)!r})\n"
    ballast += "if step >= 6 and once(): (place / 'ballast').write_bytes(bytes(shutil.disk_usage(place).free - 50_000))"
    job.inject("checkpoint.py", "        for litter in", ballast)
    code, text = job.run()
    assert code == 0, text
    assert "NOT WRITTEN" in text
    assert "No space left on device" in text
    assert job.weights() == undisturbed[job.ranks].weights()
    kept = [path for path in small_disk.iterdir() if path.is_dir()]
    assert kept
    for path in kept:
        assert path.name.startswith("step-")
        assert load_file(path / "state.safetensors")


def test_7_a_loss_that_is_not_finite_stops_all_ranks_before_the_step(job: Job, packed: Path) -> None:
    """On one rank of all; what a checkpoint holds is from before."""
    bad = "if progress.step == 12 and world.rank == world.size - 1: losses = losses * float('inf')"
    job.inject("loop.py", "                    guard.scale(losses", bad)
    code, text = job.run()
    assert code != 0
    names = json.loads((packed / "train" / "dataset.json").read_text())["rows"]["train"]
    assert "the loss is not finite at step 13, on 8 images that begin with" in job.failure()
    assert any(name in job.failure() for name in names)
    assert "Traceback" not in job.failure()
    newest = [name for name in job.checkpoints() if name.startswith("step-")][-1]
    assert int(newest[-9:]) <= 12
    tensors = load_file(job.root / "checkpoints" / newest / "state.safetensors")
    assert all(bool(value.isfinite().all()) for value in tensors.values())
    assert not (job.root / "model" / "model.json").exists()
    assert text


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_13_another_number_of_ranks_goes_on_at_the_same_position_and_says_so(
    tmp_path: Path, packed: Path, first: int, second: int
) -> None:
    job = make(tmp_path, packed, first)
    job.inject("loop.py", STEP, "import os\nif progress.step == 7 and once(): os.kill(os.getpid(), 15)")
    assert job.run()[0] == 143
    job.ranks = second
    code, text = job.run()
    assert code == 0, text
    assert "resumed after epoch 1 of 4 and 3 steps" in text
    assert f"resumed with {second} instead of {first} processes: at the same position, but not bit for bit" in text
    assert json.loads((job.root / "output" / "metrics.json").read_text())["steps"] == 4 * STEPS


def test_19_a_missing_channel_is_a_usage_error(job: Job) -> None:
    job.packed = job.root / "nowhere"
    code, _ = job.run()
    assert code == (2 if job.ranks == 1 else 1)
    assert "is no packed data set" in job.failure()


def both_there(job: Job) -> str:
    """Lines to inject at which two ranks meet: a peer may be gone before the other one is there."""
    return (f"Path({str(job.root)!r}, f'there-{{world.rank}}').touch()\n"
            f"while len([*Path({str(job.root)!r}).glob('there-*')]) < 2: pass\n")  # fmt: skip


@pytest.mark.parametrize("first", [0, 1])
def test_the_rank_that_explains_is_heard_whichever_fails_first(tmp_path: Path, packed: Path, first: int) -> None:
    """A rank whose peer is gone sees a broken connection; that is not why the job failed."""
    job = make(tmp_path, packed, 2)
    failed = job.root / "failure"
    job.inject(
        "train.py",
        "    settled = config.resolve(",
        f"{both_there(job)}"
        f"while world.rank != {first} and not Path({str(failed)!r}).exists(): pass\n"
        "raise data.DataError('explained') if world.rank else RuntimeError('connection reset')",
    )
    assert job.run()[0] == 1
    assert job.failure() == "error: explained"


def test_a_failure_is_no_stop_though_torchrun_ends_the_other_rank_by_a_signal(tmp_path: Path, packed: Path) -> None:
    """As it also does when somebody asks for a stop; here nobody did."""
    job = make(tmp_path, packed, 2)
    job.inject(
        "train.py",
        "    settled = config.resolve(",
        f"{both_there(job)}if world.rank: raise data.DataError('explained')\nimport time\ntime.sleep(100)",
    )
    code, text = job.run()
    assert code == 1
    assert "stopped by SIGTERM before the first step" in text  # the other rank
    assert job.failure() == "error: explained"


def test_22_a_used_container_gives_the_same_artifact(tmp_path: Path, packed: Path, undisturbed: dict[int, Job]) -> None:
    job = make(tmp_path, packed, 1)
    job.run(epochs=1, seed=5)
    shutil.rmtree(job.root / "checkpoints")
    code, text = job.run()
    assert code == 0, text
    for path in sorted((undisturbed[1].root / "model").rglob("*")):
        if path.is_file() and path.name != "model.json":  # that holds seconds
            assert (
                job.root / "model" / path.relative_to(undisturbed[1].root / "model")
            ).read_bytes() == path.read_bytes()


def test_24_a_finished_job_that_is_started_again_trains_no_more(job: Job, undisturbed: dict[int, Job]) -> None:
    for _ in range(2):
        code, text = job.run()
        assert code == 0, text
    assert "resumed after epoch 4 of 4 and 0 steps" in text
    assert "\nepoch=" not in text
    assert json.loads((job.root / "output" / "metrics.json").read_text())["epochs"] == 4
    assert job.weights() == undisturbed[job.ranks].weights()


def test_a_hung_peer_is_found_by_a_timeout(tmp_path: Path, packed: Path) -> None:
    job = make(tmp_path, packed, 2)
    launcher = job.source / "training" / "launch.py"
    launcher.write_text(launcher.read_text().replace("GRACE = 110", "GRACE = 3"))
    job.inject("loop.py", STEP, "if progress.step == 7 and world.rank == 1: time.sleep(1000)")
    started = time.monotonic()
    code, text = job.run(peer_timeout_seconds=4)
    assert code not in (0, 143), text
    assert time.monotonic() - started < 60
    assert "imed out" in job.failure() or "timeout" in job.failure().lower()


def test_deterministic_runs_are_equal(tmp_path: Path, packed: Path) -> None:
    jobs = [make(tmp_path, packed, 1, name) for name in ("first", "second")]
    for each in jobs:
        code, text = each.run(deterministic=True, precision="auto")
        assert code == 0, text
    assert jobs[0].weights() == jobs[1].weights()


def container_of(project: Path) -> list[str]:
    """Names of the containers of the run in this copy of the project."""
    names = [path.name for path in (project / ".cache" / "local").iterdir()]
    listed = subprocess.check_output(["docker", "ps", "--format", "{{.Names}}"], text=True).split()
    return sorted(name for name in listed if any(name.startswith(run) for run in names))


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.container
def test_a_spot_interruption_of_a_container_is_honoured(project: Path, nothing_left: str, hosts: int) -> None:
    """`docker stop`, as SageMaker does: a checkpoint, exit code 143, no artifact; and the run can go on."""
    words = ["--mode", "container", "--instances", str(hosts), "--set", "training.epochs=400", "--verbose"]
    started = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "train-local", *words], cwd=project, env=verb_environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert started.stdout is not None
    text = ""
    for line in started.stdout:
        text += line
        if "epoch=3 " in line:
            break
    names = container_of(project)
    assert len(names) == hosts, text
    waiting = subprocess.Popen(["docker", "wait", *names], stdout=subprocess.PIPE, text=True)
    begun = time.monotonic()
    subprocess.run(["docker", "stop", "-t", "60", names[-1]], check=True, capture_output=True)
    codes = waiting.communicate(timeout=60)[0].split()
    text += started.communicate(timeout=60)[0]
    assert started.returncode == 1
    assert time.monotonic() - begun < 45
    assert codes == ["143"] * hosts, text
    run = next((project / ".cache" / "checkpoints").iterdir()).name
    assert f"resume it with RUN={run}" in text
    assert not (project / "artifacts").exists()
    assert list((project / ".cache" / "checkpoints" / run).glob("step-*"))
    request = project / ".cache" / "checkpoints" / run / "request.json"
    assert json.loads(request.read_text())["hyperparameters"]["epochs"] == 400
    assert nothing_left
