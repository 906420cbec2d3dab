"""The report: valid, self-contained, escaped and true to evaluation.json; two runs side by side."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import tempfile
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import runs
from pipelines.local import compare
from pipelines.report import page
from pipelines.terminal import UserError
from processing.evaluate import MISTAKES, PIXELS, calibration, metrics, mistakes, per_class
from tests.helpers import Verb
from tests.test_training_local import NO_ENGINE, SHORT, read

HOSTILE = ("<script>alert(1)</script>", "a\"b'c & d", "</title></style><h1>", "\u202eesrever", "tab\there\x00",
           "b\udcff", "{7*7} &lt; &#x3c;", "javascript:alert(1)")  # fmt: skip
VOID = {"meta", "img", "br"}
NAME = "20261121-093000-a1b2"


class Page(HTMLParser):
    """Checks that every element is closed where it must be; keeps elements, attributes, and text by element."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
            self.texts.append((tag, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def of(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags and text.strip()]


def evaluation(classes: list[str], images: int = 300) -> dict[str, Any]:
    """As `evaluate` writes it, of a model that is often wrong."""
    random = np.random.default_rng(len(classes))
    truth = random.integers(0, len(classes), images)
    scores = random.random((images, len(classes))) ** 4
    scores[np.arange(images), truth] += random.random(images) * 2
    scores /= scores.sum(1, keepdims=True)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (truth, scores.argmax(1)), 1)
    pixels = random.integers(0, 255, (images, 8, 8, 3)).astype(np.uint8)
    reliability = calibration(truth, scores)
    error = {"expected_calibration_error": {"value": reliability["expected_calibration_error"]}}
    sources = [f"{classes[label]}/{row}<b>.png" for row, label in enumerate(truth)]
    return {
        "metrics": metrics(truth, scores, confusion) | error,
        "classes": classes,
        "per_class": per_class(classes, confusion),
        "confusion": confusion.tolist(),
        "calibration": reliability,
        "mistakes": mistakes(truth, scores, classes, sources, [pixels]),
        "images": images,
        "dataset_fingerprint": "f00d",
        "model_dataset_fingerprint": "f00d",
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with everything but an evaluation."""
    folder = tmp_path / NAME
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.json").write_text(json.dumps({"architecture": "cnn", "classes": ["x"], "image_size": 8}))
    runs.pack(folder / "model", folder / "model.tar.gz")
    facts = {
        "run": NAME,
        "git_commit": "c0ffee-dirty",
        "dataset_fingerprint": "f00d",
        "data": "data/<i>",
        "seconds": 9.5,
    }
    (folder / "run.json").write_text(json.dumps(facts | {"hyperparameters": {"epochs": 2}, "versions": {"torch": "9"}}))
    (folder / "metrics.json").write_text(json.dumps({"val_accuracy": 0.75, "val_loss": 0.5, "epochs": 2}))
    epochs = [{"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 2 / epoch, "val_accuracy": 0.5,
               "images_per_second": 7} for epoch in (1, 2)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in epochs))
    return folder


def rendered(folder: Path, found: dict[str, Any] | None = None) -> tuple[str, Page]:
    if found:
        (folder / "evaluation.json").write_text(json.dumps(found))
    document = page.write(folder).read_text(encoding="utf-8")
    return document, Page(document)


@pytest.mark.parametrize("count", [2, 8, 21, 120])
def test_page_is_whole_self_contained_and_escaped(run: Path, count: int) -> None:
    classes = [*HOSTILE, *(f"class {number}" for number in range(count))][:count]
    found = evaluation(classes)
    document, parsed = rendered(run, found)
    names = {name for name, _ in parsed.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "a", "base"}
    assert [name for name, _ in parsed.elements].count("h1") == 1
    for name, attributes in parsed.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "srcset", "xlink:href")]
        assert name != "img" or (attributes["src"] or "").startswith("data:image/jpeg;base64,")
    assert document.count("<meta http-equiv") == 1
    policy = next(attributes["content"] for name, attributes in parsed.elements if "http-equiv" in attributes)
    assert set((policy or "").split("; ")) == {"default-src 'none'", "style-src 'unsafe-inline'", "img-src data:",
                                               "form-action 'none'", "base-uri 'none'"}  # fmt: skip
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r'src="data:[^"]*"', "", document))
    assert not page.clean("\x00\x1f\udcff\ufffe").strip("\\x0123456789abcdef")
    heads = [head.partition(" ")[2] for head in parsed.of("th")]
    for label in classes:
        shown = page.clean(label)
        assert shown in heads
        assert "\t" not in shown
    assert parsed.of("bdi")[0] == page.clean(found["mistakes"][0]["true"])
    assert len([1 for name, _ in parsed.elements if name == "img"]) == len(found["mistakes"])
    assert count == 2 or len(found["mistakes"]) == MISTAKES
    assert ("table" in names, document.count('class="cells"')) == (True, int(count > page.TABLE_CLASSES))


def test_numbers_are_those_of_the_evaluation(run: Path) -> None:
    found = evaluation(["a", "b", "c"], 50)
    document, parsed = rendered(run, found)
    cells = parsed.of("td")
    counts = [int(cell) for cell in cells if cell.isdigit()]
    for row in found["per_class"]:
        for name in ("precision", "recall", "f1"):
            assert f"{row[name]:.3f}" in cells
        assert row["images"] in counts
    assert {count for row in found["confusion"] for count in row if count} <= set(counts)
    accuracy, error = (found["metrics"][name] for name in ("accuracy", "expected_calibration_error"))
    numbers = parsed.of("dd")
    assert numbers[0] == f"{accuracy['value']:.4f}"
    assert f"{error['value']:.4f}" in numbers
    assert "0.7500" in numbers
    interval = f"95 %: {accuracy['ci_low']:.4f} to {accuracy['ci_high']:.4f}"
    assert f"{interval}; majority class: {found['metrics']['majority']['value']:.4f}" in parsed.of("small")
    bars = [attributes for name, attributes in parsed.elements if name == "rect"]
    assert len(bars) == len(found["calibration"]["bins"])
    assert "1 process, an unknown device" in cells
    for value in ("f00d", "c0ffee, with changes that are in no commit", "data/<i>", "cnn, 1 class", "50"):
        assert value in cells
    assert document.count("<polyline") == 4
    assert not parsed.of("p")[0].startswith("Not evaluated")


def test_a_model_that_is_no_better_than_a_guess_and_losses_that_differ_are_explained(run: Path) -> None:
    facts, found = json.loads((run / "run.json").read_text()), evaluation(["a", "b"])
    _, parsed = rendered(run, found)
    assert not [text for text in parsed.of("p") if "harder task" in text or "not clearly above" in text]
    settings = {"label_smoothing": 0.1, "mixup": 0.0, "augment": "trivial", "class_weights": "none"}
    warning = "The accuracy of 0.5 is not clearly above <b>."
    (run / "run.json").write_text(json.dumps(facts | {"hyperparameters": settings, "warning": warning}))
    (run / "metrics.json").write_text(json.dumps({"val_accuracy": 0.5, "majority": 0.5425, "epoch": 7}))
    _, parsed = rendered(run, found | {"warning": warning})
    assert {f"Validation: {warning}", f"Test: {warning}"} <= set(parsed.of("p"))
    assert [text for text in parsed.of("p") if "a harder task (label_smoothing 0.1, augment trivial) than" in text]
    assert "majority class: 0.5425" in parsed.of("small")
    assert "7" in parsed.of("td")


def test_what_is_missing_or_damaged_is_said(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"git_commit": None, "instances": 2, "device": "CPU (arm64)"}))
    (run / "metrics.json").write_text(json.dumps({"world_size": 4}))
    _, parsed = rendered(run)
    assert "none: the project had no commit when this run began" in parsed.of("td")
    assert "2 instances, 4 processes, CPU (arm64)" in parsed.of("td")
    assert parsed.of("p") == ["Not evaluated on the test split yet: `make evaluate` adds it to this page."]
    (run / "metrics.json").unlink()
    (run / "metrics.jsonl").write_text('{"epoch": 1, "train_loss": NaN, "val_loss": 3.5}\n{"epoch": 2, "train_')
    (run / "model.tar.gz").write_bytes(b"\x1f\x8b123")
    _, parsed = rendered(run, {"metrics": {"accuracy": {"value": 1.0}}})
    said = parsed.of("p")
    for words in ("metrics.json is missing", "damaged line: '{\"epoch\": 2", "model.tar.gz cannot be read",
                  "another version of this project: evaluate again", "No finite value of accuracy"):  # fmt: skip
        assert any(words in text for text in said), words
    assert "validation 3.5000" in parsed.of("span")
    (run / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run.json cannot be read: it holds no JSON object"):
        page.write(run)
    before = (run / page.NAME).read_bytes()
    assert page.attach(run).startswith("no report: ")  # a run that trained well stays good
    assert (run / page.NAME).read_bytes() == before


MARKUP = "<img src=x onerror=alert(1)> \"' onload='x' --v:1;} {{ 7 * 7 }}"


def test_a_run_of_a_stranger_stays_text(run: Path) -> None:
    """Markup wherever a file of a run can hold text: names, keys, and fields that should be numbers."""
    found = evaluation([f"{MARKUP}a", f"{MARKUP}b", "c"])
    found["images"] = MARKUP
    found["per_class"][0]["images"] = MARKUP
    found["metrics"][MARKUP] = {"value": MARKUP}
    found["mistakes"][0] |= {"source": None, "row": MARKUP, "jpeg": f'"{MARKUP}'}
    found["mistakes"][1]["source"] = MARKUP
    model = {"architecture": MARKUP, "classes": [MARKUP], "image_size": MARKUP}
    (run / "model" / "model.json").write_text(json.dumps(model))
    runs.pack(run / "model", run / "model.tar.gz")
    names = ("run", "git_commit", "data", "dataset_fingerprint", "seconds", "device", "mode", "image", "job",
             "instances", "billed_seconds")  # fmt: skip
    facts = dict.fromkeys(names, MARKUP)
    keys = {"hyperparameters": {MARKUP: MARKUP}, "versions": {MARKUP: MARKUP}, MARKUP: MARKUP}
    (run / "run.json").write_text(json.dumps(facts | keys))
    numbers = dict.fromkeys(("val_accuracy", "val_loss", "epochs", "steps", "world_size", MARKUP), MARKUP)
    (run / "metrics.json").write_text(json.dumps(numbers))
    (run / "metrics.jsonl").write_text(
        json.dumps(dict.fromkeys(("epoch", "train_loss", MARKUP), MARKUP)) + f"\n{MARKUP}"
    )
    document, parsed = rendered(run, found)
    pictures = [attributes for name, attributes in parsed.elements if name == "img"]
    assert len(pictures) == len(found["mistakes"])
    assert all(set(attributes) == {"alt", "src"} for attributes in pictures)
    assert not {name for name, _ in parsed.elements} & {"script", "iframe", "object", "link"}
    for name, attributes in parsed.elements:
        assert re.fullmatch(r"--v:[01]\.\d{3}", attributes.get("style") or "--v:0.000"), name
        assert not [key for key in attributes if key.startswith("on")]
    assert "<img src=x" not in document
    said = "\n".join(text for _, text in parsed.texts)
    assert f"predicted class across; {MARKUP} images." in said
    assert f"row {MARKUP}" in parsed.of("bdi")
    assert MARKUP in parsed.of("td")
    assert MARKUP in parsed.of("th")


@pytest.mark.parametrize(
    ("field", "value"),
    [("confusion", [[MARKUP]]),
     ("per_class", [{"f1": MARKUP}]),
     ("calibration", {"expected_calibration_error": MARKUP, "bins": []}),
     ("mistakes", [{"source": None}]),
     ("classes", [])],
)  # fmt: skip
def test_a_damaged_evaluation_is_said_and_the_rest_is_shown(run: Path, field: str, value: Any) -> None:
    document, parsed = rendered(run, evaluation(["a", "b"]) | {field: value})
    said = next(text for text in parsed.of("p") if "does not hold what an evaluation writes" in text)
    assert said.endswith(": evaluate again.")
    assert "<img src=x" not in document
    assert "Learning curves" in parsed.of("h2")
    assert "Confusion matrix" not in parsed.of("h2")


def test_a_run_that_no_page_can_show_is_refused_in_a_sentence(run: Path) -> None:
    (run / "metrics.json").write_text('{"seconds": "<b>"}')
    with pytest.raises(UserError, match=r"do not hold what a run writes \(TypeError.*; train again"):
        page.write(run)


class Beacon(ThreadingHTTPServer):
    """Whatever a page asks for is noted."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        beacon = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                beacon.asked.append(self.path)
                self.send_response(204)
                self.end_headers()

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


def attacks(port: int) -> list[str]:
    """Markup that shows itself when a browser takes it for such: it asks, navigates, or changes the title."""
    url = f"http://127.0.0.1:{port}"
    return [
        f"<script>document.title='owned';fetch('{url}/script')</script>",
        f"<img src={url}/img onerror=\"document.title='owned'\">", f"<svg onload=\"location='{url}/svg'\">",
        f"<iframe src={url}/frame srcdoc='<script>top.document.title=1</script>'></iframe>",
        f"<link rel=stylesheet href={url}/css>",
        f"<style>@import '{url}/import'; body {{ background: url({url}/bg) }}</style>", f"<base href={url}/base/>",
        f"<form id=f action={url}/form><input name=q autofocus onfocus=f.submit()></form>",
        f"<object data={url}/object></object><embed src={url}/embed>",
        f"<video src={url}/video autoplay poster={url}/poster>",
        f"</title></style></script><a href={url} ping={url}/ping>x</a>", f"\"><img src={url}/quote>",
        f"'><img src={url}/single>", f"--v:1;background:url({url}/style)", f"{{{{ 7*7 }}}}{{% include '{url}' %}}",
        f"<input autofocus onfocus=location='{url}/f'>",
        f"<link rel=prefetch href={url}/prefetch><link rel=dns-prefetch href={url}>", "<plaintext>", "<!--",
        "]]><script>",
    ]  # fmt: skip


def seen(document: Path) -> str:
    """The page as Chromium has it after two seconds."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium")
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--timeout=20000",
        "--dump-dom",
    ]
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *words, f"--user-data-dir={profile}", document.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def test_a_browser_takes_a_run_of_a_stranger_for_text(run: Path) -> None:
    """In a real browser: nothing is fetched, nowhere is gone to, no script runs, whatever a field holds."""
    with Beacon() as beacon:
        thread = threading.Thread(target=beacon.serve_forever)
        thread.start()
        try:
            refresh = f"<meta http-equiv=refresh content='0;url=http://127.0.0.1:{beacon.server_port}/refresh'>"
            texts = [*attacks(beacon.server_port), refresh]
            found = evaluation([f"{text}{number}" for number, text in enumerate(texts)])
            found["images"] = "".join(texts)
            for number, each in enumerate(found["mistakes"]):
                text = texts[number % len(texts)]
                each |= {"source": None, "row": text} if number % 2 else {"source": text}
                each["jpeg"] = f'"{text}' if number % 3 else each["jpeg"]
            found["per_class"][0]["images"] = "".join(texts)
            facts = dict.fromkeys(("run", "git_commit", "data", "device", "mode", "image", "job"), "".join(texts))
            keys = {"hyperparameters": dict(zip(texts, texts, strict=True)), "versions": dict.fromkeys(texts, refresh)}
            (run / "run.json").write_text(json.dumps(facts | keys))
            (run / "evaluation.json").write_text(json.dumps(found))
            dumped = seen(page.write(run))
            assert "Most confident mistakes" in dumped  # it is still this page, whole
            assert "Hyperparameters" in dumped
            assert "<title>owned" not in dumped
            assert beacon.asked == []
            # Were a value not escaped one day, the policy stops all but a refresh: that is no fetch of the page's.
            whole = (run / page.NAME).read_text(encoding="utf-8")
            raw = "".join(attacks(beacon.server_port))
            (run / page.NAME).write_text(whole.replace("<h1>", f"{raw}<h1>", 1), encoding="utf-8")
            assert "<title>owned" not in seen(run / page.NAME)
            assert beacon.asked == []
            (run / page.NAME).write_text(whole.replace("<h1>", f"{refresh}<h1>", 1), encoding="utf-8")
            seen(run / page.NAME)
            assert beacon.asked == ["/refresh"]  # the test would see it
        finally:
            beacon.shutdown()
            thread.join()


def test_calibration_by_hand() -> None:
    truth = np.array([0, 0, 1, 1])
    scores = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    found = calibration(truth, scores)
    assert found["expected_calibration_error"] == pytest.approx(3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.4)
    assert [(each["images"], each["confidence"], each["accuracy"]) for each in found["bins"]] == [
        (1, pytest.approx(0.6), 1.0),
        (3, pytest.approx(0.9), pytest.approx(2 / 3)),
    ]
    assert [each["low"] < each["confidence"] <= each["high"] for each in found["bins"]] == [True, True]


def test_mistakes_are_the_surest_with_their_own_pictures() -> None:
    shades = np.arange(10, 250, 40, dtype=np.uint8)
    pixels = np.broadcast_to(shades[:, None, None, None], (6, 200, 200, 3))
    truth, called = np.array([0, 1, 0, 1, 0, 1]), np.array([0.6, 0.9, 0.2, 0.85, 0.05, 0.3])  # probability of class 0
    scores = np.stack([called, 1 - called], 1)
    found = mistakes(truth, scores, ["a", "b"], [f"{row}.png" for row in range(6)], [pixels[:3], pixels[3:]])
    assert [each["row"] for each in found] == [4, 1, 3, 2]
    assert [(each["true"], each["predicted"]) for each in found] == [("a", "b"), ("b", "a"), ("b", "a"), ("a", "b")]
    assert found[0]["probability_of_true"] == pytest.approx(0.05)
    for each in found:
        assert each["source"] == f"{each['row']}.png"
        picture = Image.open(io.BytesIO(base64.b64decode(each["jpeg"])))
        assert picture.size == (PIXELS, PIXELS)
        assert np.asarray(picture).mean() == pytest.approx(int(shades[each["row"]]), abs=2)
    noise = np.random.default_rng(0).integers(0, 255, (64, 200, 200, 3)).astype(np.uint8)
    many = mistakes(np.ones(64, dtype=np.int64), np.tile([0.9, 0.1], (64, 1)), ["a", "b"], [], [noise])
    assert len(json.dumps(many)) < 600_000
    assert {each["source"] for each in many} == {None}


def test_the_difference_of_two_runs(run: Path) -> None:
    """Newcombe's own example: 56 of 70 and 48 of 80 differ by 0.2, with 0.0524 to 0.3339 (method 10)."""
    other = run.with_name("20261121-093000-ffff")
    shutil.copytree(run, other)
    for folder, right, images in ((run, 48, 80), (other, 56, 70)):
        found = evaluation(["a", "b"])
        truth, scores = np.zeros(images, dtype=np.int64), np.tile([0.9, 0.1], (images, 1))
        found["metrics"] |= metrics(truth, scores, np.array([[right, images - right], [0, 0]]))
        (folder / "evaluation.json").write_text(json.dumps(found))
    a, b = page.read(run), page.read(other)
    assert compare.verdict(a, b) == (
        "test accuracy +0.2000 (95 % interval +0.0524 to +0.3339): more than chance explains"
    )
    assert "not more than chance" in compare.verdict(a, a)
    assert compare.differences(a, a) == []
    b.run["hyperparameters"]["epochs"] = 3
    assert compare.differences(a, b) == [("epochs", "2", "3", "")]
    rows = {row[0]: row[1:] for row in compare.metrics(a, b)}
    assert rows["test accuracy"] == ("0.6000 (0.4905 to 0.7004)", "0.8000 (0.6918 to 0.8770)", "+0.2000")
    assert rows["val_loss"] == ("0.5000", "0.5000", "")
    b.evaluation["dataset_fingerprint"] = "beef"
    assert "of different data sets" in compare.verdict(a, b)
    (other / "evaluation.json").unlink()
    assert "20261121-093000-a1b2 is not evaluated" in compare.verdict(page.read(other), page.read(other))


def test_verbs(verb: Verb, project: Path, raw: Path) -> None:
    """Training leaves a report, `report` evaluates first, and what cannot be evaluated is still reported."""
    source = project / "photos"
    shutil.copytree(raw, source)
    (source / "up").rename(source / "<img src=x onerror=alert(1)> & co")
    alone = verb("compare")
    assert (alone.returncode, "there is no finished run yet" in alone.stderr) == (1, True)
    words = ("--mode", "process", "--data", str(source), *SHORT)
    trained = verb("train-local", *words, **NO_ENGINE)
    assert trained.returncode == 0, trained.stderr
    folder = (project / "artifacts" / "latest").resolve()
    assert f"report: artifacts/{folder.name}/report.html" in trained.stdout.splitlines()
    assert "make evaluate" in (folder / page.NAME).read_text(encoding="utf-8")
    assert "there is no run before" in verb("compare").stderr
    reported = verb("report")
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.splitlines()[-1] == f"report: artifacts/{folder.name}/report.html"
    found, document = read(folder / "evaluation.json"), (folder / page.NAME).read_text(encoding="utf-8")
    assert f"<dd>{found['metrics']['accuracy']['value']:.4f}<small>" in document
    Page(document)
    assert [each["source"].split("/")[0] for each in found["mistakes"]] == [each["true"] for each in found["mistakes"]]
    assert verb("train-local", *words, **NO_ENGINE).returncode == 0
    compared = verb("compare", "--a", folder.name)
    assert compared.returncode == 0, compared.stderr
    assert "differences: none" in compared.stdout
    assert "is not evaluated; `make evaluate RUN=<name>` does it" in " ".join(compared.stdout.split())
    shutil.rmtree(project / "data")
    rest = verb("report")
    assert rest.returncode == 0, rest.stderr
    assert "the report has no part on the test split: data/" in rest.stdout
