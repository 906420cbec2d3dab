"""Models of all kinds, from their name to an answer: own ones, options, published weights, temperatures, rehearsals."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import http.server
import json
import math
import re
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import model as model_module
from inference import inference
from inference.export import GOLDEN_SAMPLES, rehearse, write_artifact
from model import ModelError, build_model
from processing.evaluate import calibration
from tests.helpers import Verb
from training import pretrained
from training import train as script
from training.calibrate import temperature
from training.config import ConfigurationError, Hyperparameters, parse, resolve
from training.data import Split
from training.distributed import World
from training.loop import fit

NET = """
import torch
from torch import nn


class MyNet(nn.Module):
    def __init__(self, num_classes, image_size, width=8):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.body(images).amax((2, 3)))
"""


def split(size: int, images: int = 8, classes: int = 3) -> Split:
    info = {"classes": [f"c{number}" for number in range(classes)], "size": size, "mean": [0.5] * 3, "std": [0.2] * 3,
            "fingerprint": "f"}  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    return Split([pixels], np.arange(images) % classes, info)


def rehearsed(name: str, size: int, alone: bool = False, **options: Any) -> None:
    settled = resolve(Hyperparameters(model=name, model_options=options), size, 8)
    rehearse(build_model(name, 3, size, options), settled, split(size), alone)


@pytest.mark.parametrize(
    ("name", "size", "alone", "sentence"),
    [
        ("alexnet", 48, False, r"model 'alexnet': cannot be trained and served with 48x48 images: .*too small"),
        ("squeezenet1_1", 8, False, r"model 'squeezenet1_1': cannot be trained and served with 8x8 images"),
        ("resnet18", 16, True, r"needs more than one image a process at a time; set a larger batch_size"),
        ("inception_v3", 64, False, r"cannot be trained and served with 64x64 images"),
        ("densenet121", 8, False, r"cannot be trained and served with 8x8 images"),
    ],
)
def test_what_cannot_be_trained_is_said_before_training(name: str, size: int, alone: bool, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        rehearsed(name, size, alone)


def test_a_model_that_trains_with_another_answer_than_it_serves_is_said_before_training() -> None:
    model = build_model("cnn", 3, 8)
    model.register_forward_hook(lambda module, _, answer: (answer, answer) if module.training else answer)
    with pytest.raises(ModelError, match=r"cannot be trained and served with 8x8 images: .*tuple"):
        rehearse(model, resolve(Hyperparameters(model="cnn"), 8, 8), split(8), False)


def test_a_model_without_a_finite_answer_is_said_before_training() -> None:
    model = build_model("cnn", 3, 8)
    next(model.parameters()).data.fill_(math.nan)
    with pytest.raises(ModelError, match="no finite answer"):
        rehearse(model, resolve(Hyperparameters(model="cnn"), 8, 8), split(8), False)


def test_layers_with_versions_keep_them(tmp_path: Path) -> None:
    """A file of tensors has none, and MNASNet refuses to load without its own: an artifact, weights and checkpoints."""
    settled = resolve(Hyperparameters(model="mnasnet0_5", epochs=1, batch_size=4), 32, 8)
    model, data, world = build_model("mnasnet0_5", 3, 32), split(32), World(0, 1, torch.device("cpu"))
    rehearse(model, settled, data, False)
    pretrained.load_weights(model, model.state_dict())
    (tmp_path / "checkpoints").mkdir()
    for _ in range(2):  # the second one is resumed at its end
        fit(model, data, data, settled, world, tmp_path / "checkpoints")


def test_a_rehearsal_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = build_model("cnn", 3, 8)
    before = copy.deepcopy(model.state_dict())
    rehearse(model, resolve(Hyperparameters(model="cnn"), 8, 8), split(8), False)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"nope": 1}, r"model 'resnet18' with model_options \{'nope': 1\} cannot be built for 32x32 images: .*nope"),
        ({"num_classes": 3}, r"model_options \{'num_classes': 3\} cannot be built"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        build_model("resnet18", 3, 32, options)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("my_net.MyNet", r"unknown model 'my_net.MyNet': there is no file .*my_net.py; or add a line to MODELS"),
        ("resnet19", r"unknown model 'resnet19'; did you mean resnet18"),
    ],
)
def test_unknown_models_are_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        build_model(name, 3, 32)


class TwoMore(nn.Module):
    """Answers for more classes than there are."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.net = build_model("cnn", num_classes + 2, image_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.net(images)
        return answer


def test_answers_for_other_classes_are_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_module.MODELS, "two_more", TwoMore)
    with pytest.raises(ModelError, match=r"it answers with shape \(5,\), and there are 3 classes"):
        rehearsed("two_more", 8)


def test_options_come_as_json() -> None:
    assert parse({"model_options": '{"width": 32, "deep": [1]}'}).model_options == {"width": 32, "deep": [1]}
    for text in ("[1]", "width", "{'a': 1}"):
        with pytest.raises(ConfigurationError, match=r"model_options is .*; it must be a JSON object"):
            parse({"model_options": text})
    with pytest.raises(ConfigurationError, match="no single quote"):
        parse({"model_options": {"a": "'; touch x"}})


def test_a_model_of_ones_own_takes_one_file_and_travels(verb: Verb, project: Path) -> None:
    """And so does what it imports from files beside it."""
    (project / "src" / "my_net.py").write_text("from blocks import WIDTH\n" + NET.replace("width=8", "width=WIDTH"))
    (project / "src" / "blocks.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                                               "WIDTH = 8\n\n\n@dataclass\nclass Size:\n    width: int\n")  # fmt: skip
    words = ("--set", "training.model=my_net.MyNet", "--set", 'training.model_options={"width": 12}')
    done = verb("train-local", "--mode", "process", "--set", "training.epochs=2", *words)
    assert done.returncode == 0, done.stderr
    with tarfile.open(project / "artifacts" / "latest" / "model.tar.gz") as archive:
        names = [name.removeprefix("./") for name in archive.getnames()]
        assert {"code/my_net.py", "code/blocks.py"} <= set(names)
        archive.extractall(project.parent / "model", filter="data")
    assert json.loads((project.parent / "model" / "model.json").read_text())["model_options"] == {"width": 12}
    for name in ("my_net.py", "blocks.py"):
        (project / "src" / name).unlink()  # the artifact has its own
    done = verb("predict", "--image", str(next((project / "data" / "raw").rglob("*.png"))))
    assert done.returncode == 0, done.stderr


def test_every_squeezenet_can_say_no_to_every_class() -> None:
    model = build_model("squeezenet1_1", 5, 64).eval()
    with torch.inference_mode():
        assert float(model(torch.randn(8, 3, 64, 64)).min()) < 0


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, t: float) -> float:
    return float(functional.cross_entropy(logits.double() / t, labels))


@pytest.mark.parametrize("right", [0.7, 1.0, 2.0, 5.0])
def test_the_temperature_is_the_one_with_the_lowest_cross_entropy(right: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4000, 6, generator=generator)
    labels = torch.multinomial((logits / right).softmax(1), 1, generator=generator)[:, 0]
    found = temperature(logits, labels)
    assert found == pytest.approx(right, rel=0.1)
    best = min(cross_entropy(logits, labels, found * factor) for factor in (0.95, 0.97, 1.03, 1.05))
    assert cross_entropy(logits, labels, found) <= best
    scores = (logits / found).softmax(1).numpy()
    assert calibration(labels.numpy(), scores)["expected_calibration_error"] < 0.03


@pytest.mark.parametrize("images", [1, 20, 2000])
def test_no_mistake_on_a_few_images_is_no_certainty(images: int) -> None:
    labels = torch.arange(images) % 4
    logits = 3.0 * functional.one_hot(labels, 4)
    surest = float((logits / temperature(logits, labels)).softmax(1).max())
    assert 0.5 < surest < 1 - 0.3 / (images + 2)


def test_a_model_that_knows_nothing_is_not_sure() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = 5 * torch.randn(500, 3, generator=generator), torch.randint(3, (500,), generator=generator)
    assert float((logits / temperature(logits, labels)).softmax(1).max()) < 0.7


def test_the_main_rank_asks_for_a_few_images_while_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what a run does once it is trained, only what all ranks share in grows with the validation split."""
    model, data, asked = build_model("cnn", 3, 8), split(8, 600), list[int]()
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: asked.append(len(inputs[0])) if type(module) is type(model) else None
    )
    settled = resolve(Hyperparameters(model="cnn", epochs=1, batch_size=64, compile=False), 8, 600)

    def write(*given: Any) -> None:
        asked.clear()
        write_artifact(*given)

    monkeypatch.setattr(script, "write_artifact", write)
    folders = script.Folders(tmp_path, tmp_path, tmp_path / "model", tmp_path / "output", None, None)
    try:
        script.train(settled, folders, data, data, World(0, 1, torch.device("cpu")))
    finally:
        hook.remove()
    assert 0 < sum(asked) <= 3 * GOLDEN_SAMPLES
    assert json.loads((tmp_path / "model" / "baseline.json").read_text())["images"] == 600


def test_an_older_artifact_has_no_temperature(tmp_path: Path) -> None:
    model = build_model("cnn", 3, 8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    facts = {"architecture": "cnn", "classes": ["a", "b", "c"], "image_size": 8,
             "preprocessing": {"mean": [0.5] * 3, "std": [0.2] * 3}}  # fmt: skip
    images = list(split(8).pixels(np.arange(4)))
    plain, warm = inference.load(tmp_path, facts), inference.load(tmp_path, facts | {"temperature": 4.0})
    first, second = inference.classify(images, plain), inference.classify(images, warm)
    assert first["predictions"] == second["predictions"]
    assert np.max(second["probabilities"]) < np.max(first["probabilities"])


class Weights(http.server.BaseHTTPRequestHandler):
    """Serves `body` as the class attribute `how` says."""

    body, how, asked = b"", "whole", 0

    def do_GET(self) -> None:
        type(self).asked += 1
        if self.how == "hung":
            time.sleep(3)
            return
        self.send_response(404 if self.how == "missing" else 200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for at in range(0, len(self.body) // (2 if self.how == "cut" else 1), 1000):
                self.wfile.write(self.body[at : at + 1000])
                self.wfile.flush()
                if self.how == "slow":
                    time.sleep(0.05)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Weights]]:
    """A server with published weights of a small network, and an empty cache."""
    save_file(build_model("cnn", 10, 8).state_dict(), tmp_path / "w.safetensors")

    class Here(Weights):
        body, how, asked = (tmp_path / "w.safetensors").read_bytes(), "whole", 0

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = tmp_path / "cache" / "w.safetensors"
    monkeypatch.setattr(pretrained, "published", lambda _: (f"http://127.0.0.1:{server.server_port}/w", place))
    monkeypatch.setattr(pretrained, "SECONDS", 0.5)
    monkeypatch.delenv("NETWORK_ISOLATION", raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield Here
    server.shutdown()
    server.server_close()


def test_published_weights_are_downloaded_once(published: type[Weights]) -> None:
    first, second = build_model("cnn", 10, 8), build_model("cnn", 10, 8)
    used = pretrained.initialise(first, "cnn", "auto", None)
    assert used
    assert used["name"] == "w.safetensors"
    assert len(used["sha256"]) == 64
    assert pretrained.initialise(second, "cnn", "auto", None) == used
    assert published.asked == 1
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("how", ["hung", "slow", "cut", "missing"])
def test_weights_that_cannot_be_had_cost_one_line(
    published: type[Weights], how: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    published.how = how
    model = build_model("cnn", 10, 8)
    before, begun = copy.deepcopy(model.state_dict()), time.monotonic()
    with caplog.at_level("INFO"):
        assert pretrained.initialise(model, "cnn", "auto", None) is None
    assert time.monotonic() - begun < 3
    assert "training from nothing: the published weights of cnn cannot be had" in caplog.text
    assert "data.pretrained" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(ModelError, match=r"cannot be had .*set pretrained to none"):
        pretrained.initialise(model, "cnn", "default", None)


@pytest.mark.parametrize("body", [b"<html>log in</html>", b""])
def test_what_is_no_file_of_weights_is_not_kept(published: type[Weights], body: bytes, tmp_path: Path) -> None:
    published.body = body
    assert pretrained.initialise(build_model("cnn", 10, 8), "cnn", "auto", None) is None
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("right", [True, False])
def test_the_checksum_in_the_name_of_published_weights_counts(
    published: type[Weights], right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(build_model("cnn", 10, 8).state_dict(), tmp_path / "w.pth")
    published.body = (tmp_path / "w.pth").read_bytes()
    named = hashlib.sha256(published.body).hexdigest()[:8] if right else "0123abcd"
    file = tmp_path / "cache" / f"w-{named}.pth"
    address = pretrained.published("cnn")
    assert address
    monkeypatch.setattr(pretrained, "published", lambda _: (address[0], file))
    assert (pretrained.initialise(build_model("cnn", 10, 8), "cnn", "auto", None) is not None) == right
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.name] * right


@pytest.mark.parametrize("answer", [b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc",
                                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"])  # fmt: skip
def test_an_answer_that_is_no_http_costs_one_line(
    answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "NETWORK_ISOLATION"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server, caplog.at_level("INFO"):

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        place = f"http://127.0.0.1:{server.getsockname()[1]}/w", tmp_path / "w.safetensors"
        monkeypatch.setattr(pretrained, "published", lambda _: place)
        assert pretrained.initialise(build_model("cnn", 10, 8), "cnn", "auto", None) is None
        thread.join()
    assert "training from nothing" in caplog.text


@pytest.mark.usefixtures("published")
def test_published_weights_that_do_not_fit_cost_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Of a vision transformer for pictures of another size, or a model that was made wider."""
    with caplog.at_level("INFO"):
        assert pretrained.initialise(build_model("cnn", 10, 64), "cnn", "auto", None) is None
    assert "training from nothing" in caplog.text
    assert "the weights do not fit the model" in caplog.text


def test_densenets_are_published_with_older_names() -> None:
    source, target = build_model("densenet121", 3, 64), build_model("densenet121", 3, 64)
    older = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12])\.", r"\1.\2.", name): value
             for name, value in source.state_dict().items()}  # fmt: skip
    assert set(older) != set(source.state_dict())
    pretrained.load_weights(target, older)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import not_there_at_all\n", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("class MyNet(:\n", "SyntaxError"),
        ("class MyNet:\n    def __init__(self, *_):\n        {}['width']\n", "KeyError: 'width'"),
        ("class Other:\n    pass\n", "my_net.py has no class MyNet"),
    ],
)
def test_what_is_wrong_in_ones_own_file_is_one_sentence(
    text: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_net.py").write_text(text)
    monkeypatch.setattr(model_module, "__file__", str(tmp_path / "model.py"))
    with pytest.raises(ModelError, match=sentence):
        build_model("my_net.MyNet", 3, 8)


def test_a_job_without_a_network_asks_nobody(published: type[Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETWORK_ISOLATION", "1")
    assert pretrained.initialise(build_model("cnn", 10, 8), "cnn", "auto", None) is None
    assert pretrained.initialise(build_model("cnn", 10, 8), "cnn", "none", None) is None
    assert published.asked == 0


def test_a_file_goes_before(published: type[Weights], tmp_path: Path) -> None:
    used = pretrained.initialise(build_model("cnn", 10, 8), "cnn", "none", tmp_path / "w.safetensors")
    assert used
    assert published.asked == 0


def test_models_without_published_weights_start_from_nothing() -> None:
    for name in ("cnn", "my_net.MyNet"):
        assert pretrained.published(name) is None
        assert pretrained.initialise(nn.Linear(1, 1), name, "auto", None) is None
    address = pretrained.published("resnet18")
    assert address
    assert address[1].name.startswith("resnet18-")


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda w: w, ""),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, "without 'module.'"),
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "without '_orig_mod.'"),
        (lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()}, "without 'module._orig_mod.'"),
        (lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}, "epoch": 3}, "taken from state_dict"),
        (lambda w: {"model_state_dict": w, "optimizer": {"lr": 0.1}}, "taken from model_state_dict"),
        (lambda w: {"model_ema": {f"module.{k}": v for k, v in w.items()}, "n": 2}, "taken from model_ema"),
        (lambda w: {"model": {"state_dict": w}}, "taken from model.state_dict"),
        (lambda w: {"ema_state_dict": w, "n": 1}, "taken from ema_state_dict"),
        (lambda w: w | {"head._extra_state": None}, ""),
        (lambda w: {f"backbone.{k}": v for k, v in w.items()} | {"loss.weight": torch.ones(3)}, "without 'backbone.'"),
    ],
)
def test_weights_of_the_usual_shapes(wrap: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = build_model("cnn", 4, 8), build_model("cnn", 4, 8)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    with caplog.at_level("INFO"):
        pretrained.load_weights(target, pretrained.read_weights(tmp_path / "w.pth"))
    assert said in caplog.text
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
