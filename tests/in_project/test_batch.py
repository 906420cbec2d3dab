"""A folder in, one JSON line an image out: whatever the folder holds, whenever it is stopped, and the same bytes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inference import batch, inference
from inference.export import checksums
from pipelines import SOURCE, runs
from tests.helpers import CLASSES, Verb, draw, verb_environment
from tests.test_inference import archive, artifact, classifier
from tests.test_serve_local import note

__all__ = ["archive", "artifact", "classifier"]  # fixtures
IMAGES = 200  # three whole batches and a part of one
SLOW = """
import os, time
_predict = predict_fn
def predict_fn(batch, classifier, context=None):
    time.sleep(float(os.environ.get("INFERENCE_SLOW", 0)))
    if any((image == 7).all() for image in batch):
        raise RuntimeError("out of luck")
    return _predict(batch, classifier, context)
"""
OWN = """
_decode = decode
def decode(data, *limits):
    if data.endswith(b"marker"):
        raise ImageError("the artifact's own code")
    return _decode(data, *limits)
"""


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`batch.main` listens for signals; the tests themselves go on as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def slow(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that can be told to take its time, has one image that it fails on, and an `imaging` of its own."""
    folder = tmp_path_factory.mktemp("slow")
    shutil.copytree(artifact, folder / "model")
    for name, text in (("inference.py", SLOW), ("imaging.py", OWN)):
        with (folder / "model" / "code" / name).open("a") as file:
            file.write(text)
    facts = json.loads((folder / "model" / "model.json").read_text())
    (folder / "model" / "model.json").write_text(json.dumps(facts | {"files": checksums(folder / "model")}))
    runs.pack(folder / "model", folder / "model.tar.gz")
    return folder / "model.tar.gz"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes in nested folders."""
    folder = tmp_path_factory.mktemp("photos") / "my photos"
    for number in range(IMAGES):
        path = folder / str(number % 7) / ("x" * (number % 2)) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(CLASSES[number % 3], number, 8 + number % 50).crop((0, 0, 8 + number % 50, 8)).save(path)
    return folder


def ask(artifact: Path, folder: Path, output: Path) -> int:
    return batch.main(["--artifact", str(artifact), "--output", str(output), str(folder)])


def start(artifact: Path, folder: Path, output: Path, **environment: str) -> subprocess.Popen[str]:
    words = ["--artifact", str(artifact), "--output", str(output), str(folder)]
    return subprocess.Popen(
        [sys.executable, str(SOURCE / "inference" / "batch.py"), *words], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=verb_environment() | environment,
    )  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def wait_for_lines(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(slow: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run that nothing disturbs writes."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    process = start(slow, photos, output)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, ""), errors
    assert printed.startswith(f"{IMAGES} images, 0 of them bad, ")
    assert len(output.read_bytes().splitlines()) == IMAGES
    return output.read_bytes()


@pytest.fixture
def interrupted(
    slow: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The output of a run that failed in its third batch."""
    output = tmp_path / "out.jsonl"
    real, calls = batch._ask, []

    def failing(*arguments: Any) -> list[dict[str, Any]]:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_ask", failing)
        assert ask(slow, photos, output) == 2
    assert capsys.readouterr().err.startswith(f"error: {output}.partial: No space left on device; mend that and")
    assert len(read(partial(output))) == 2 * batch.BATCH
    return output


def partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def test_answers_are_those_of_the_handlers_in_the_order_of_paths(
    archive: Path, classifier: inference.Classifier, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "not" / "there yet" / "out.jsonl"
    assert ask(archive, photos, output) == 0
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
    lines = read(output)
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert [line["file"] for line in lines] == names
    for first in range(0, IMAGES, batch.BATCH):
        chunk = lines[first : first + batch.BATCH]
        images = [inference.input_fn((photos / line["file"]).read_bytes(), "image/png")[0] for line in chunk]
        answer = inference.predict_fn(images, classifier)  # which cuts them itself
        for key, column in (("label", "labels"), ("prediction", "predictions"), ("probabilities", "probabilities")):
            assert [line[key] for line in chunk] == answer[column]
        assert [list(line) for line in chunk] == [["file", "label", "prediction", "probabilities"]] * len(chunk)
    printed = capsys.readouterr()
    assert f" -> {output}\n" in printed.out
    for label in CLASSES:
        assert f"{sum(line['label'] == label for line in lines):8}  {label}\n" in printed.out
    assert printed.err == ""


def test_bad_images_and_odd_names_are_lines_like_others(slow: Path, tmp_path: Path) -> None:
    folder = tmp_path / "-- odd"
    names = ["a b/ünï 🐈.PNG", "new\nline\u2028.png", "\u0001.png", os.fsdecode(b"\xff.png"), "z" * 200 + ".jpeg"]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw(CLASSES[number % 3], number).save(folder / name, "PNG")
    whole = (folder / names[0]).read_bytes()
    (folder / "marked.png").write_bytes(whole + b"marker")
    (folder / "truncated.png").write_bytes(whole[:-40])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "large.png").write_bytes(whole + b" " * 5000)
    Image.new("RGB", (300, 20)).save(folder / "pixels.png")
    Image.fromarray(np.full((12, 12, 3), 7, np.uint8)).save(folder / "unlucky.png")
    (folder / ".hidden.png").write_bytes(whole)
    (folder / "notes.txt").write_text("hello")
    (folder / "again").symlink_to(folder)  # a folder that holds itself
    output = folder / "out.jsonl"  # among the images
    for _ in range(2):  # what is there after the first does not disturb
        process = start(slow, folder, output, INFERENCE_MAX_BYTES="5000", INFERENCE_MAX_PIXELS="5000")
        printed, errors = process.communicate()
        assert process.returncode == 1, errors
        lines = {line["file"]: line for line in read(output)}
        bad = {name: line["error"] for name, line in lines.items() if "error" in line}
        assert list(lines) == sorted(lines)
        assert set(lines) == set(names) | set(bad)
        assert [lines[name]["label"] for name in names] == [CLASSES[number % 3] for number in range(len(names))]
        assert bad == {
            "empty.png": "0 bytes that are not a readable image (formats: JPEG, PNG, WEBP, BMP, TIFF)",
            "gone.png": "No such file or directory",
            "large.png": f"the file has {len(whole) + 5000} bytes, more than the limit of 5000",
            "marked.png": "the artifact's own code",
            "pixels.png": "the image has 300x20 pixels, more than the limit of 5000",
            "text.jpg": "5 bytes that are not a readable image (formats: JPEG, PNG, WEBP, BMP, TIFF); "
            "what was sent begins with b'hello'",
            "truncated.png": bad["truncated.png"],
            "unlucky.png": "the model has no answer: out of luck",
        }
        assert "damaged" in bad["truncated.png"]
        assert output.read_bytes().count(b"\n") == len(lines)
        assert "13 images, 8 of them bad" in printed
        assert "other files are left out, the first: 'notes.txt: not one of" in printed
        assert errors == (
            f"error: 8 of 13 images are bad, {output} says why: 'empty.png', 'gone.png', 'large.png', ...\n"
        )


def test_nothing_but_bad_images(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(batch.BATCH + 2):
        (tmp_path / "in" / f"{number:03}.png").write_text("hello")
    assert ask(archive, tmp_path / "in", tmp_path / "out.jsonl") == 1
    assert all("5 bytes that are not" in line["error"] for line in read(tmp_path / "out.jsonl"))
    assert f"{batch.BATCH + 2} of {batch.BATCH + 2} images are bad" in capsys.readouterr().err


def test_images_and_folders_that_vanish(
    archive: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out.jsonl"
    shutil.copytree(photos, folder)
    real = batch._resume

    def first_one(*arguments: Any) -> Any:
        (folder / "0" / "0.png").unlink()
        return real(*arguments)

    def all_of_it(*arguments: Any) -> Any:
        folder.rename(tmp_path / "elsewhere")
        folder.mkdir()  # a mount point without its disk
        return real(*arguments)

    monkeypatch.setattr(batch, "_resume", first_one)
    assert ask(archive, folder, output) == 1
    assert [line["file"] for line in read(output) if "error" in line] == ["0/0.png"]
    assert len(read(output)) == IMAGES
    monkeypatch.setattr(batch, "_resume", all_of_it)
    assert ask(archive, folder, tmp_path / "other.jsonl") == 2
    assert "is another folder than at the start; is a disk gone?" in capsys.readouterr().err
    assert partial(tmp_path / "other.jsonl").read_bytes() == b""


def test_a_kill_loses_nothing(slow: Path, photos: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for _ in range(2):
        process = start(slow, photos, output, INFERENCE_SLOW="0.5")
        size = partial(output).stat().st_size if partial(output).exists() else 0
        while not partial(output).exists() or partial(output).stat().st_size == size:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert not output.exists()
    kept = partial(output).read_bytes()
    assert whole.startswith(kept)
    assert kept.count(b"\n") == 2 * batch.BATCH
    process = start(slow, photos, output)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert f"going on after {2 * batch.BATCH} of {IMAGES} images\n{IMAGES} images, 0 of them bad" in printed
    assert output.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("keep", "added", "kept"),
    [
        (0, b"", 128),
        (0, b'{"file": "5/1', 128),
        (0, b"\0" * 4096, 128),
        (0, b'{"file": "another"}\n' * 64, 128),
        (1, b"", 64),  # all but the line's end
        (30, b"", 64),
        (1, b"\xff\n", 64),
        (1, b"\n[1]\n", 128),
    ],
)
def test_a_torn_end_is_cut(
    interrupted: Path, slow: Path, photos: Path, whole: bytes, keep: int, added: bytes, kept: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = partial(interrupted).read_bytes()
    partial(interrupted).write_bytes(text[: len(text) - keep] + added)
    assert ask(slow, photos, interrupted) == 0
    assert f"going on after {kept} of {IMAGES} images\n" in capsys.readouterr().out
    assert interrupted.read_bytes() == whole


def test_all_lines_were_written_but_the_file_not_named(
    interrupted: Path, slow: Path, photos: Path, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    partial(interrupted).write_bytes(whole)
    assert ask(slow, photos, interrupted) == 0
    assert "going on after 200 of 200 images\n200 images, 0 of them bad" in capsys.readouterr().out
    assert interrupted.read_bytes() == whole


@pytest.mark.parametrize("change", ["artifact", "list of files", "folder", "origin"])
def test_what_belongs_to_something_else_is_not_kept(
    interrupted: Path, slow: Path, archive: Path, photos: Path, whole: bytes, change: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, side = tmp_path / "photos", interrupted.with_name("out.jsonl.partial.json")
    if change == "folder":
        shutil.copytree(photos, folder)  # with the times of change
    elif change == "origin":
        side.write_text("[]")
    elif change == "list of files":
        os.utime(photos / "0" / "0.png")
    asked = archive if change == "artifact" else slow
    assert ask(asked, folder if folder.exists() else photos, interrupted) == 0
    printed = capsys.readouterr().out
    assert f"starting afresh: {partial(interrupted)} is of another artifact, folder or list of files\n" in printed
    assert "going on" not in printed
    assert len(read(interrupted)) == IMAGES
    assert (interrupted.read_bytes() == whole) or change == "artifact"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_verb_finishes_its_batch_when_it_is_told_to_stop(
    verb: Verb, project: Path, slow: Path, photos: Path, whole: bytes, number: signal.Signals
) -> None:
    missing = verb("batch-local")
    assert (missing.returncode, missing.stderr) == (
        2,
        "error: DATA is missing; name a folder of images, such as make batch-local DATA=folder/of/images\n",
    )
    name = "20261121-000000-abcd"
    (project / "artifacts" / name).mkdir(parents=True)
    shutil.copy(slow, project / "artifacts" / name)
    note(project, slow)
    (project / "artifacts" / "latest").symlink_to(name)
    output = project / "artifacts" / name / "batch" / "my photos.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "batch-local", "--data", str(photos)], cwd=project, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=verb_environment() | {"INFERENCE_SLOW": "1"},
    )  # fmt: skip
    wait_for_lines(partial(output), process)
    os.killpg(process.pid, number)  # as a terminal does
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    done = len(read(partial(output)))
    assert done in (64, 128)
    assert f"stopped by {number.name} after {done} of {IMAGES} images; give the same command to go on\n" in errors
    again = verb("batch-local", "--data", str(photos), "--run", name)
    assert (again.returncode, again.stderr) == (0, "")
    assert f"going on after {done} of" in again.stdout
    assert f" -> artifacts/{name}/batch/my photos.jsonl" in again.stdout
    assert output.read_bytes() == whole


def test_a_full_disk_is_one_sentence_and_can_go_on(slow: Path, photos: Path, whole: bytes, tmp_path: Path) -> None:
    place = tmp_path / "mount"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    try:
        process = start(slow, photos, place / "out.jsonl")
        _, errors = process.communicate()
        assert process.returncode == 2
        assert errors == (
            f"error: {place}/out.jsonl.partial: No space left on device; mend that and give the same command to go on\n"
        )
        subprocess.run(["mount", "-o", "remount,size=1m", str(place)], check=True)
        process = start(slow, photos, place / "out.jsonl")
        assert "going on after 64 of 200 images" in process.communicate()[0]
        assert (place / "out.jsonl").read_bytes() == whole
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_what_cannot_be_done_is_one_sentence(
    archive: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    output = tmp_path / "out.jsonl"
    for model, folder, target, words in (
        (archive, tmp_path / "empty", output, "holds no image; name a folder that does, with .jpg"),
        (archive, tmp_path / "nothing", output, "nothing: No such file or directory"),
        (archive, archive, output, "model.tar.gz cannot be listed: Not a directory"),
        (archive, photos, tmp_path, "cannot be the output; name a file such as"),
        (archive, photos, photos / "0" / "0.png", "cannot be the output; name a file such as"),
        (archive, photos, tmp_path / "empty" / "notes.txt" / "out.jsonl", "notes.txt: "),
        (tmp_path / "model.tar.gz", photos, output, "there is no artifact at"),
    ):
        assert ask(model, folder, target) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert words in errors
        assert errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
    with partial(output).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert ask(archive, photos, output) == 2
    assert f"error: another process writes {partial(output)}; wait for it" in capsys.readouterr().err


def test_few_images_are_in_memory_whatever_their_number() -> None:
    loaded, lock, most = 0, threading.Lock(), 0

    def load(name: str) -> int:
        nonlocal loaded
        with lock:
            loaded += 1
        return int(name)

    for taken, value in enumerate(batch.ahead(load, [str(number) for number in range(2000)])):
        if taken % 500 == 0:
            time.sleep(0.1)  # time to run away
        most = max(most, loaded - taken)
        assert value == taken
    assert batch.BATCH < most <= batch.AHEAD
    stopped = batch.ahead(lambda _: time.sleep(0.05), ["x"] * 1000)
    next(stopped)
    before = time.monotonic()
    stopped.close()
    assert time.monotonic() - before < 2  # those that wait are not loaded any more: 127 of them are seconds
