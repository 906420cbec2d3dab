"""Packing: the same input gives the same bytes, splits are honest, and nothing half-done is left."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import imaging
from pipelines import SOURCE
from processing import preprocess
from processing.divide import assign, automatic_size
from processing.preprocess import pack
from processing.scan import Item, PackingError, scan
from tests.helpers import CLASSES, draw
from training.data import load_split


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_input_same_bytes_whatever_the_threads(raw: Path, tmp_path: Path) -> None:
    before = digest(raw)
    first = pack(raw, tmp_path / "a", workers=1)
    assert pack(raw, tmp_path / "b", workers=4) == first
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert pack(raw, tmp_path / "c", seed=1)["fingerprint"] != first["fingerprint"]
    assert digest(raw) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_every_image_is_in_one_split_with_its_own_pixels_and_label(raw: Path, packed: Path) -> None:
    info = json.loads((packed / "train" / "dataset.json").read_text())
    assert info["counts"] == {"train": 42, "validation": 9, "test": 9}
    assert sorted(path for rows in info["rows"].values() for path in rows) == sorted(item.path for item in scan(raw)[0])
    for name, rows in info["rows"].items():
        split = load_split(packed / name)
        assert split.info == info
        for index, path in enumerate(rows):
            assert split.classes[split.labels[index]] == path.split("/")[0]
            assert np.array_equal(split.images[0][index], imaging.decode((raw / path).read_bytes()))


def test_mean_and_deviation_are_those_of_the_training_split(packed: Path) -> None:
    split = load_split(packed / "train")
    pixels = split.images[0].reshape(-1, 3) / 255
    assert split.info["mean"] == pytest.approx(pixels.mean(0).tolist(), abs=1e-5)
    assert split.info["std"] == pytest.approx(pixels.std(0).tolist(), abs=1e-5)


def test_shards_bound_the_memory_and_change_nothing_else(raw: Path, packed: Path, tmp_path: Path) -> None:
    pack(raw, tmp_path / "sharded", shard_bytes=10 * 12 * 12 * 3)
    whole, parts = load_split(packed / "train"), load_split(tmp_path / "sharded" / "train")
    assert [len(shard) for shard in parts.images] == [10, 10, 10, 10, 2]
    rows = np.random.default_rng(0).permutation(42)
    assert np.array_equal(parts.pixels(rows), whole.pixels(rows))
    assert np.array_equal(parts.labels, whole.labels)


def test_split_shares_and_at_least_one_training_image() -> None:
    items = [Item(f"a/{n}", "a", None) for n in range(1000)] + [Item(f"b/{n}", "b", None) for n in range(2)]
    splits = assign(items, seed=3)
    assert {name: sum(item.label == "a" for item in rows) for name, rows in splits.items()} == {
        "train": 700,
        "validation": 150,
        "test": 150,
    }
    assert [name for name, rows in splits.items() if any(item.label == "b" for item in rows)] == ["train"]
    for count in range(3, 20):
        few = assign([Item(f"a/{number}", "a", None) for number in range(count)], seed=3)
        assert all(few.values()), f"a class of {count} images leaves a split empty"
    moved = assign([*items, Item("c/0", "c", None)], seed=3)
    assert [item for item in moved["test"] if item.label == "a"] == [
        item for item in splits["test"] if item.label == "a"
    ]


def test_ready_made_splits_are_kept_and_a_missing_one_is_cut_out_of_train(raw: Path, tmp_path: Path) -> None:
    for label in CLASSES:
        shutil.copytree(raw / label, tmp_path / "photos" / "train" / label)
        (tmp_path / "photos" / "val" / label).mkdir(parents=True)
        draw(label, 99).save(tmp_path / "photos" / "val" / label / "99.png")
    rows = pack(tmp_path / "photos", tmp_path / "packed")["rows"]
    assert sorted(rows["validation"]) == [f"val/{label}/99.png" for label in CLASSES]
    assert len(rows["train"]) == 51
    assert len(rows["test"]) == 9
    draw("up", 1).save(tmp_path / "photos" / "val" / "stray.png")
    (tmp_path / "photos" / "val" / "diagonal").mkdir()
    draw("up", 1).save(tmp_path / "photos" / "val" / "diagonal" / "1.png")
    with pytest.raises(PackingError, match="class 'diagonal' has images for validation or test, but none in"):
        pack(tmp_path / "photos", tmp_path / "packed")


def test_size_follows_the_images(raw: Path, tmp_path: Path) -> None:
    assert automatic_size(raw, scan(raw)[0]) == 12
    (tmp_path / "a").mkdir()
    draw("up", 0, size=65).save(tmp_path / "a" / "large.PNG")
    assert automatic_size(tmp_path, [Item("a/large.PNG", "a", None)]) == 224


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "is no folder"),
        (lambda folder: folder.mkdir(), "holds no image in class folders"),
        (lambda folder: (folder / "a").mkdir(parents=True), "holds no image in class folders"),
        (lambda folder: folder.write_text("file"), "is no folder"),
    ],
    ids=["missing", "empty", "no image", "a file"],
)
def test_nothing_to_pack_is_said(make: object, message: str, tmp_path: Path) -> None:
    make(tmp_path / "photos")  # type: ignore[operator]
    with pytest.raises(PackingError, match=message):
        pack(tmp_path / "photos", tmp_path / "packed")


def test_raw_images_are_never_replaced(raw: Path, tmp_path: Path) -> None:
    shutil.copytree(raw, tmp_path / "photos")
    before = digest(tmp_path)
    for output in (tmp_path / "photos", tmp_path / "photos" / "packed", tmp_path):
        with pytest.raises(PackingError, match="something else than a packed data set"):
            pack(tmp_path / "photos", output)
    (tmp_path / "letters").mkdir()
    with pytest.raises(PackingError, match="something else than a packed data set"):
        pack(tmp_path / "photos", tmp_path / "letters")
    assert digest(tmp_path) == before


def test_an_interrupted_packing_keeps_the_older_data_set(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(raw, tmp_path / "packed")
    before = digest(tmp_path / "packed")
    monkeypatch.setattr(preprocess, "_describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(raw, tmp_path / "packed", seed=1)
    assert digest(tmp_path / "packed") == before
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_command_line(raw: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SOURCE / "processing" / "preprocess.py"), "--input", str(raw)]
    good = subprocess.run([*command, "--output", str(tmp_path / "p"), "--size", "6"], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert "packed 3 classes at 6 pixels: 42 train, 9 validation, 9 test" in good.stdout
    command[-1] = str(tmp_path / "nowhere")
    bad = subprocess.run([*command, "--output", str(tmp_path / "q")], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert len(bad.stderr.splitlines()) == 1
