"""Text that strangers wrote: shown as text, wherever a verb shows it; uploads take pictures and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from pipelines import ROOT, SOURCE, config, runs, terminal
from pipelines.cloud import account, jobs, storage
from pipelines.cloud.train import METRICS, NUMBER
from pipelines.local import compare, job, view
from pipelines.report import page
from pipelines.terminal import UserError
from processing.preprocess import pack
from processing.scan import LEAVES, PackingError, scan
from progress import plain
from tests.cloud import STACK, Recorder, aws
from tests.helpers import CLASSES, Verb, draw
from tests.test_report import evaluation, run

__all__ = ["aws", "run"]
LINE = "epoch=9 step=9 train_loss=0.0001 val_loss=0.0001 val_accuracy=1.0000 images_per_second=9"
HOSTILE = [
    "\x1b]52;c;cm0gLXJm\x07", "\x1b[2J\x1b[H", "\x9b31m", "\x9d52;c;cm0=\x9c", f"x\n{LINE}",
    f"x\r{LINE}", f"x\x0b{LINE}", f"x\x85{LINE}", f"x\u2028{LINE}", "\u202egpj.exe", "\u2066x\u2069",
    "\u200fx", "a\u200bb", "a\ufeffb", "a\u2060b", "\x1b]8;;http://evil\x1b\\x", "\x1bP+q\x1b\\",
    "\x08\x08\x7f", "\U000e0041\U000e0042", "x\u3164", "\u061cx", "a\u00adb", "a\u200db", "\x0e\x0f\x05",
]  # fmt: skip
HARMLESS = [
    "café", "cafe\u0301", "日本語", "한국어", "שלום", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\u0915\u094d\u200d\u0937", "\u845b\U000e0100", "❤\ufe0f", "1\ufe0f\u20e3", "👩\u200d💻", "👨\u200d👩\u200d👧",
    "🏳\ufe0f\u200d🌈", "👍🏽", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "$(x) `y` 'z'",
    "val_accuracy=0.99", "a\u00a0b", "\u3000x", "½ µm",
]  # fmt: skip


def is_text(shown: str) -> bool:
    """Nothing but characters that are seen, and line ends."""
    return not [sign for sign in shown if sign != "\n" and unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_obeys_is_spelt_out(text: str) -> None:
    assert is_text(plain(text))
    assert "\n" not in plain(text)
    assert plain(plain(text)) == plain(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_people_write_stays(text: str) -> None:
    assert plain(text) == text


def texts(count: int, highest: int = 0x110000) -> list[str]:
    """Random ones, of characters that are strange more often than chance has it."""
    random = np.random.default_rng(15)
    strange = "".join([*HOSTILE, *HARMLESS])
    signs = [[chr(random.integers(1, highest)) if random.random() < 0.5 else strange[random.integers(len(strange))]
              for _ in range(random.integers(1, 12))] for _ in range(count)]  # fmt: skip
    return ["".join(each) for each in signs]


def test_any_text_becomes_one_line() -> None:
    for text in texts(3000):
        shown = plain(text)
        assert len(shown.splitlines()) <= 1
        assert not [sign for sign in shown if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")]


@pytest.mark.parametrize("name", [*(text for text in HOSTILE), "\x01", "a\tb"])
def test_a_class_with_such_a_name_is_refused(tmp_path: Path, name: str) -> None:
    for label in ("good", name.replace("/", "")):
        (tmp_path / label).mkdir()
        draw(CLASSES[0], 1).save(tmp_path / label / "1.png")
    with pytest.raises(PackingError, match="has characters in its name that nobody sees or that change how text runs"):
        scan(tmp_path)


def test_a_class_with_a_name_that_people_write_is_packed(tmp_path: Path) -> None:
    names = sorted(name.replace("/", "") for name in HARMLESS)
    for place, label in enumerate(names):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(4):
            draw(CLASSES[0], 4 * place + number).save(tmp_path / "photos" / label / f"{number}.png")
    assert pack(tmp_path / "photos", tmp_path / "packed")["classes"] == sorted(
        {unicodedata.normalize("NFC", name) for name in names}
    )


def test_files_that_are_left_out_are_a_line_each(tmp_path: Path) -> None:
    for label in CLASSES[:2]:
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(4):
            draw(label, number).save(tmp_path / "photos" / label / f"{number}.png")
    for number, text in enumerate(HOSTILE):
        (tmp_path / "photos" / CLASSES[0] / f"{number}{text.replace('/', '')}.txt").touch()
    script = [sys.executable, str(SOURCE / "processing" / "preprocess.py")]
    words = ["--input", str(tmp_path / "photos"), "--output", str(tmp_path / "\x1b]52;out")]
    done = subprocess.run([*script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert is_text(done.stdout + done.stderr)
    (report,) = tmp_path.glob("*.report.txt")
    text = report.read_text(encoding="utf-8")
    assert len(text.splitlines()) == len(HOSTILE)
    assert is_text(text)


def test_a_run_of_a_stranger_is_described_and_compared_as_text(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "ARTIFACTS", run.parent)
    for text in HOSTILE:
        facts = json.loads((run / "run.json").read_text())
        facts |= dict.fromkeys(("run", "mode", "image", "data", "device", "git_commit"), text) | {"seconds": 1.0}
        facts["hyperparameters"] = {text: text}
        facts["versions"] = {text: text}
        (run / "run.json").write_text(json.dumps(facts))
        numbers = {
            "val_accuracy": 0.5,
            "val_loss": 1.0,
            "epochs": text,
            "train_images_per_second": 1.0,
            "world_size": 1,
        }
        (run / "metrics.json").write_text(json.dumps(numbers | {text: 1}))
        found = evaluation([text, "b", "c"])
        found["metrics"][text] = {"value": 1.0}
        (run / "evaluation.json").write_text(json.dumps(found))
        described = runs.describe(run)
        assert is_text(described)
        assert not [line for line in described.splitlines() if line.startswith("epoch=")]
        (run / "metrics.json").write_text(json.dumps(numbers | {"epochs": 1, text: 1}))
        monkeypatch.setattr(compare, "names", lambda *_: (run, run))
        monkeypatch.setattr(sys, "argv", ["compare"])
        assert compare.main() == 0
        printed = capsys.readouterr().out
        assert is_text(printed)
        assert not [line for line in printed.splitlines() if line.startswith("epoch=")]


def test_lines_of_a_log_are_text_and_none_fakes_an_epoch(tmp_path: Path) -> None:
    import io

    output = io.StringIO()
    shown = view.TrainingView(tmp_path / "job.log", containers=False, output=output)
    for text in HOSTILE:
        if "\n" not in text:
            shown.write(f"reading {text}\n")
    shown.close()
    assert is_text(output.getvalue())
    assert is_text((tmp_path / "job.log").read_text(encoding="utf-8"))
    assert not [line for line in output.getvalue().splitlines() if line.startswith("epoch=")]


@pytest.mark.parametrize("text", HOSTILE)
def test_reasons_of_aws_and_of_jobs_are_text(tmp_path: Path, text: str) -> None:
    from botocore.exceptions import ClientError

    assert is_text(account.failure({"FailureReason": text}))
    with (
        pytest.raises(UserError) as raised,
        account.explained("looking"),
    ):
        raise ClientError({"Error": {"Code": "Other", "Message": text}}, "Describe")
    assert is_text(str(raised.value))
    (tmp_path / "algo-1" / "output").mkdir(parents=True)
    (tmp_path / "algo-1" / "output" / "failure").write_bytes(f"error: {text}".encode())
    assert is_text(job.failure_reason(tmp_path, "x"))
    assert is_text(job.failure_reason(tmp_path / "none", text))


def test_lines_of_cloudwatch_are_text(aws: Recorder) -> None:
    import boto3

    logs, group = boto3.client("logs"), "/aws/sagemaker/TrainingJobs"
    logs.create_log_group(logGroupName=group)
    logs.create_log_stream(logGroupName=group, logStreamName="j/algo-2-1")
    now = int(time.time() * 1000)
    events = [{"timestamp": now + number, "message": text} for number, text in enumerate(HOSTILE)]
    logs.put_log_events(logGroupName=group, logStreamName="j/algo-2-1", logEvents=events)
    said: list[str] = []
    jobs._print_new_lines(account.Account(config.load((), {}), STACK), "Training", "j", {}, said.append)
    assert len(said) >= len(HOSTILE)
    assert all(is_text(line) and "\n" not in line and line.startswith("algo-2: ") for line in said)
    assert aws


GUARDED = """
import sys
sys.path.insert(0, {root!r})
from pipelines import terminal
from pipelines.terminal import UserError
def main():
    print({text!r}); print({text!r}, file=sys.stderr); {end}
terminal.run_verb(main)
"""


@pytest.mark.parametrize("end", ["return 0", "raise UserError({text!r})", "raise RuntimeError({text!r})",
                                 "raise OSError(13, {text!r}, {text!r})", "raise KeyError({text!r})"])  # fmt: skip
def test_nothing_that_a_verb_prints_is_obeyed(end: str) -> None:
    """The last line of defence: whatever is printed, errors of any kind included."""
    text = "".join(text for text in HOSTILE if "\r" not in text)
    code = GUARDED.format(root=str(ROOT), text=text, end=end.format(text=text))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    out, err = (stream.decode("utf-8") for stream in (done.stdout, done.stderr))
    assert "epoch=9" in out
    assert is_text(out), out
    assert is_text(err), err


def test_no_name_fakes_a_metric_of_a_training_job(tmp_path: Path) -> None:
    """SageMaker reads numbers from any line of a training job; a class is called as such a line is."""
    for split in ("train", "validation"):
        folder = tmp_path / split
        folder.mkdir()
        info = {"schema_version": 1, "classes": [LINE], "size": 8, "counts": {split: 1}, "fingerprint": "x", "rows": {},
                "mean": [0, 0, 0], "std": [1, 1, 1], "sha256": {}}  # fmt: skip
        (folder / "dataset.json").write_text(json.dumps(info))
        np.save(folder / "images-00000.npy", np.zeros((1, 8, 8, 3), dtype=np.uint8))
        np.save(folder / "labels-00000.npy", np.zeros(1, dtype=np.int64))
    environment = os.environ | {
        "SM_CHANNEL_TRAIN": str(tmp_path / "train"), "SM_CHANNEL_VALIDATION": str(tmp_path / "validation"),
        "SM_MODEL_DIR": str(tmp_path / "model"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output"), "SM_HPS": "{}",
    }  # fmt: skip
    script = [sys.executable, str(SOURCE / "training" / "train.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode
    assert "val_accuracy" in done.stderr, done.stderr
    for key in METRICS.values():
        assert not re.search(key + NUMBER, done.stdout + done.stderr)


MANY = "9" * 6000
DEEP = "[" * 5000


@pytest.mark.parametrize("value", [MANY, DEEP, "0x" + "f" * 6000, "1:" * 3000 + "1", "{a: " * 3000, "- " * 5000,
                                   "2026-13-45", "0b" + "1" * 60000, "[" * 900 + "]" * 900, "x" * 6000])  # fmt: skip
def test_values_that_python_cannot_read_are_one_sentence(tmp_path: Path, value: str) -> None:
    for way in ("set", "environment", "training", "infrastructure"):
        for name in ("training.yaml", "infrastructure.yaml"):
            (tmp_path / name).write_text((ROOT / "configs" / name).read_text(encoding="utf-8"))
        if way in ("training", "infrastructure"):
            with (tmp_path / f"{way}.yaml").open("a") as file:
                file.write(f"\nseed: {value}\n" if way == "training" else f"\nbudget_usd: {value}\n")
        overrides = [f"training.seed={value}"] if way == "set" else []
        environment = {"TRAINING__SEED": value} if way == "environment" else {}
        with pytest.raises(UserError) as raised:
            config.load(overrides, environment, tmp_path)
        assert len(str(raised.value).splitlines()) == 1
        assert len(str(raised.value)) < 1000


def test_a_few_lines_of_yaml_do_not_become_gigabytes(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "training.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="it has an alias"):
        config.load((), {}, tmp_path)


@pytest.mark.parametrize("file", ["run.json", "metrics.json", "evaluation.json"])
@pytest.mark.parametrize("content", [f'{{"images": {MANY}}}', f'{{"a": {"[" * 100_000}', "[]", "\xff", '{"data": 7}',
                                     '{"val_accuracy": "x"}', f'{{"seconds": 1{"0" * 400}}}'])  # fmt: skip
def test_a_run_that_python_cannot_read_is_one_sentence(run: Path, file: str, content: str) -> None:
    (run / "evaluation.json").write_text(json.dumps(evaluation(["a", "b"])))
    (run / file).write_bytes(content.encode("latin-1"))
    for verb in (runs.describe, page.write):
        said = ""
        try:
            verb(run)
        except UserError as error:
            said = str(error)
        assert len(said.splitlines()) <= 1
        assert len(said) < 1000


@pytest.mark.parametrize("content", [f'{{"images": {MANY}}}', f'{{"a": {"[" * 100_000}', "[]", "\xff"], ids=range(4))
def test_a_file_of_a_run_that_python_cannot_read_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"run.json cannot be read: "):
        runs.read(tmp_path / "run.json")


def test_a_printed_command_gives_a_shell_exactly_the_value() -> None:
    """In every shell that is here; the command shows nothing that a terminal obeys, but for line ends at its end."""
    values = [*HOSTILE, *HARMLESS, "\n", "x\n\n", "-n", "!x", *texts(150)]
    values = [value for value in values if not any("\ud800" <= sign <= "\udfff" for sign in value)]
    shells = [shell for shell in ("sh", "bash", "zsh") if shutil.which(shell)]
    lines = [terminal.quoted(value) for value in values]
    assert all(plain(line.rstrip("'\n")) == line.rstrip("'\n") for line in lines)
    for shell in shells:
        script = "\n".join(f"printf '%s\\0' {line}" for line in lines)
        done = subprocess.run([shell, "-c", script], capture_output=True)
        assert not done.stderr
        assert done.stdout.decode().split("\0")[:-1] == values


def test_a_value_that_is_no_text_comes_back_too() -> None:
    name = os.fsdecode(b"\xff\xfe caf\xc3\xa9")
    done = subprocess.run(["sh", "-c", f"printf %s {terminal.quoted(name)}"], capture_output=True)
    assert done.stdout == b"\xff\xfe caf\xc3\xa9"
    assert shlex.quote("x") == terminal.quoted("x")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, and what lies beside them on a person's disk."""
    photos = tmp_path / "photos"
    for label in CLASSES[:2]:
        (photos / label).mkdir(parents=True)
        for number in range(4):
            draw(label, number).save(photos / label / f"{number}.png")
    secret = tmp_path / "secret"
    secret.mkdir()
    draw(CLASSES[0], 9).save(secret / "passport.png")
    (secret / "id_rsa").write_text("KEY")
    for name in (
        ".env",
        ".git/config",
        ".aws/credentials",
        "notes.txt",
        "down/.hidden.png",
        "down/id_rsa",
        "script.py",
    ):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_text("SECRET")
    label = CLASSES[0]
    (photos / label / "link.png").symlink_to(secret / "passport.png")
    (photos / label / "key.png").symlink_to(secret / "id_rsa")
    (photos / label / "relative.png").symlink_to("../../secret/passport.png")
    (photos / label / "album").symlink_to(secret)
    (photos / label / "gone.png").symlink_to(tmp_path / "nothing.png")
    (photos / "third").symlink_to(secret)
    (photos / label / "inside.png").symlink_to(f"../{CLASSES[1]}/0.png")
    (photos / label / "chain.png").symlink_to("link.png")
    (photos / label / "up").symlink_to("..")
    return photos


def test_links_that_leave_the_folder_are_listed_and_left_out(folder: Path) -> None:
    items, left_out = scan(folder)
    label = CLASSES[0]
    assert {item.path for item in items} >= {f"{label}/inside.png", f"{label}/0.png"}
    leaving = {line.partition(":")[0] for line in left_out if line.endswith(LEAVES)}
    assert leaving >= {
        f"{label}/{name}" for name in ("link.png", "key.png", "relative.png", "album", "gone.png", "chain.png")
    }
    assert "third" in leaving
    for item in items:
        assert (folder / item.path).resolve().is_relative_to(folder.resolve())


def test_pictures_are_uploaded_and_nothing_else(
    aws: Recorder, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import boto3

    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=STACK.bucket)
    used = account.Account(config.load((), {}), STACK)
    storage.raw(used, str(folder), folder)
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=STACK.bucket)["Contents"]]
    names = sorted(key.split("/", 2)[2] for key in keys if not key.startswith(storage.DONE))
    assert names == sorted([*(f"{label}/{number}.png" for label in CLASSES[:2] for number in range(4)),
                            f"{CLASSES[0]}/inside.png"])  # fmt: skip
    printed = capsys.readouterr().out
    for name in ("link.png", "album", "third", "chain.png"):
        assert re.search(rf"left out: .*{name}: {LEAVES}", printed), printed
    assert aws


def test_source_goes_without_secrets_and_links_that_leave(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for name in ("a.py", "training/b.py", ".env", "training/.netrc", "__pycache__/a.pyc", ".git/config"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    (tmp_path / "outside.py").write_text("SECRET")
    (source / "o[u]t.py").symlink_to(tmp_path / "outside.py")
    (source / "in.py").symlink_to("a.py")
    assert sorted(name for name, _ in storage.below(source)) == ["a.py", "in.py", "training/b.py"]
    shutil.copytree(source, tmp_path / "staged", ignore=shutil.ignore_patterns(*storage.private(source)))  # as the SDK
    assert sorted(p.name for p in (tmp_path / "staged").rglob("*.py")) == ["a.py", "b.py", "in.py"]
    assert not list((tmp_path / "staged").rglob(".*"))


def test_predict_and_evaluate_show_names_as_text(verb: Verb, project: Path, raw: Path) -> None:
    """With an artifact whose class names are hostile: packing refuses them, a stranger's artifact has them."""
    from tests.test_training_local import NO_ENGINE, SHORT

    trained = verb("train-local", "--mode", "process", "--data", str(raw), *SHORT, **NO_ENGINE)
    assert trained.returncode == 0, trained.stderr
    folder = (project / "artifacts" / "latest").resolve()
    with tarfile.open(folder / "model.tar.gz") as tar:
        tar.extractall(folder / "model", filter="data")
    facts = json.loads((folder / "model" / "model.json").read_text())
    golden = (folder / "model" / "golden.json").read_text()
    for number, name in enumerate(facts["classes"]):
        facts["classes"][number] = f"{number}{''.join(HOSTILE)}"
        golden = golden.replace(json.dumps(name), json.dumps(facts["classes"][number]))
    (folder / "model" / "golden.json").write_text(golden)
    facts["files"]["golden.json"] = hashlib.sha256(golden.encode()).hexdigest()
    (folder / "model" / "model.json").write_text(json.dumps(facts))
    runs.pack(folder / "model", folder / "model.tar.gz")
    for file in (project / "data").glob("*/*/dataset.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": facts["classes"]}))
    picture = project / f"a{''.join(HOSTILE[:1])}.png"
    draw(CLASSES[0], 3).save(picture)
    for words in (("predict", "--image", str(picture), "--image", f"{picture}.gone"), ("evaluate",), ("report",)):
        done = verb(*words, "--trust")
        assert is_text(done.stdout + done.stderr), words
        assert words != ("evaluate",) or done.returncode == 0, done.stderr
        assert words == ("report",) or "x1b]52;c;" in done.stdout, done.stdout + done.stderr
        assert not [line for line in done.stdout.splitlines() if line.startswith("epoch=")]
