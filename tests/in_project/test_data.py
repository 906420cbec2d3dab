"""What users bring as data: splits, copies, 16 bits, EXIF, tables and names; each is used rightly or said."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import bounds
import imaging
from inference import inference
from inference.export import write_artifact
from model import build_model
from pipelines import terminal
from pipelines.config import load
from pipelines.local import data
from pipelines.terminal import UserError
from processing.divide import assign
from processing.preprocess import Limits, main, pack
from processing.scan import Item, PackingError, read_table, scan
from tests.helpers import CLASSES, draw
from training.config import Hyperparameters
from training.data import load_split

A, B, C = "train", "validation", "test"


def layout(folder: Path, files: str) -> Path:
    for name in files.split():
        path = folder / (name if "." in name else f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ("train/cat/1 train/dog/1 val/cat/2 annotations/a.xml", {A: 2, B: 1}),
        ("training/cat/1 training/dog/1 evaluation/cat/2 validation/cat/2", {A: 2, B: 1, C: 1}),
        ("training/cat/1 training/dog/1 evaluation/cat/2", {A: 2, B: 1}),
        ("archive/train/cat/1 archive/train/dog/1 archive/test/cat/2 archive/a.md __MACOSX/train/x.png", {A: 2, C: 1}),
        ("seg_train/seg_train/cat/1 seg_train/seg_train/dog/1 seg_test/seg_test/cat/2 seg_pred/1.png", {A: 2, C: 1}),
        ("TRAIN/cat/1 TRAIN/dog/1 Dev/cat/2 Testing/cat/3", {A: 2, B: 1, C: 1}),
        ("TrainData/cat/1 TrainData/dog/1 TestData/cat/2", {A: 2, C: 1}),
        ("train2017/cat/1 train2017/dog/1 val2017/cat/2", {A: 2, B: 1}),
        ("train/images/cat/1 train/images/dog/1 val/images/cat/2", {A: 2, B: 1}),
        ("cat/train/1 cat/test/2 dog/train/1 dog/test/2", {A: 2, C: 2}),
        ("train/train/cat/1 train/train/dog/1 train/test/cat/2", {A: 2, C: 1}),
        ("train/cat/1 train/dog/1", {A: 2}),
        ("train/1 bus/1 car/1", {None: 3}),
        ("bullet_train/1 crash_test/1", {None: 2}),
        ("cats/2019/1 cats/2020/1 dogs/2019/2", {None: 3}),
        ("trainimgs/cat/1 trainimgs/dog/1 testimgs/cat/2", {A: 2, C: 1}),
        ("cat/1 dog/1 @eaDir/cat/1 $RECYCLE.BIN/1", {None: 2}),
        ("strain/1 contest/1", {None: 2}),
        ("tr/cat/1 tr/dog/1 te/cat/2", {A: 2, C: 1}),
        ("data/Trn/cat/1 data/Trn/dog/1 data/Vld/cat/2 data/Tst/dog/2", {A: 2, B: 1, C: 1}),
        ("train/cat/1 train/dog/1 va/cat/2 tst/cat/3 labels/1.txt", {A: 2, B: 1, C: 1}),
        ("imagesTr/cat/1 imagesTr/dog/1 imagesTs/cat/2", {A: 2, C: 1}),
        ("01_train/cat/1 01_train/dog/1 02_val/cat/2", {A: 2, B: 1}),
        ("pets/train/images/cat/1 pets/train/images/dog/1 pets/devel/images/cat/2", {A: 2, B: 1}),
        ("tr/1 te/1 de/1", {None: 3}),
        ("train_station/hall/1 bus_station/hall/1", {None: 2}),
        ("with_mask/1 without_mask/1", {None: 2}),
        ("mask/1 no_mask/1", {None: 2}),
        ("mask/1 face/1", {None: 2}),
    ],
)
def test_splits_are_recognised_through_their_neighbours(files: str, splits: object, tmp_path: Path) -> None:
    items, _ = scan(layout(tmp_path / "photos", files))
    assert Counter(item.split for item in items) == splits
    if None not in dict(splits):  # type: ignore[call-overload]
        assert {item.label for item in items} == {"cat", "dog"}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ("val/cat/1 val/dog/1 test/cat/2", "holds 'test', 'val', named like a split, but no train folder"),
        ("test/cat/1 test/dog/1", "holds 'test', named like a split"),
        ("train/cat/1 train/dog/1 trucks/red/1", "holds 'train', named like a split"),
        ("fold_0/cat/1 fold_1/cat/2", "holds 'fold_0', 'fold_1', named like a split"),
        ("train/cat/1 train/dog/1 val/cat/2 holdout/cat/3", "holdout looks like a split beside train, val; call it"),
        ("train/1 train/2 val/3", "holds no image in class folders; expected .*/<split>/<class>/<image>"),
        ("trainA/1 trainB/1 testA/1 testB/1", "testA, trainA and testB, trainB are splits of several data sets"),
        ("v1/train/cat/1 v1/test/cat/2 v2/train/cat/1 v2/test/dog/1", "v1 holds splits .test, train., and so"),
        ("tr/1 te/1", "holds no image in class folders"),
        ("tr/cat/1 tr/dog/1 te/cat/2 notes/a.txt", "holds 'te', 'tr', named like a split"),
        ("train_a/cat/1 train_a/dog/1 test_own/cat/1", "holds 'test_own', 'train_a', named like a split"),
        ("EuroSAT/27/Forest/1 EuroSAT/27/River/1", "if the folders in .*/photos/EuroSAT/27 are the classes, name"),
        ("cat/1 dog/1 test/1", "holds 'test', named like a split"),
        ("cat/1 Validation/1", "holds 'Validation', named like a split"),
        ("images/1 masks/1", "holds 'images', 'masks': pictures and what belongs to them, not classes; expected"),
        ("train/img/1 train/mask/1 val/img/2 val/mask/2", "holds 'img', 'mask': pictures and what"),
        ("JPEGImages/1 SegmentationClass/1 SegmentationObject/1", "holds 'JPEGImages', 'SegmentationClass', 'Segm"),
        ("images/1 ground_truth/1", "holds 'ground_truth', 'images': pictures"),
        ("data/train/cat/1 data/train/dog/1 data/val/cat/2 samples/1", "data holds splits .train, val., and so is no"),
    ],
)
def test_what_looks_like_splits_and_is_none_is_refused(files: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(PackingError, match=sentence):
        scan(layout(tmp_path / "photos", files))


def test_what_lies_beside_splits_is_listed(tmp_path: Path) -> None:
    _, left_out = scan(layout(tmp_path / "photos", "train/cat/1 train/dog/1 val/cat/2 annotations/a.xml"))
    assert left_out == ["annotations: is none of the splits train, val"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for label in CLASSES[:2]:
        (folder / label).mkdir(parents=True)
        for number in range(20):
            draw(label, number).save(folder / label / f"{number}.png")
    return folder


def report(output: Path) -> list[str]:
    path = output.with_name(f"{output.name}.report.txt")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def places(info: dict[str, dict[str, list[str]]]) -> dict[str, str]:
    return {path: split for split, paths in info["rows"].items() for path in paths}


def test_copies_stay_in_one_split_whether_bytes_or_only_pixels_are_equal(photos: Path, tmp_path: Path) -> None:
    for number in range(20):
        shutil.copy(photos / "down" / f"{number}.png", photos / "down" / f"again {number}.png")
        draw("left", number).save(photos / "left" / f"as {number}.bmp")
    info = pack(photos, tmp_path / "packed")
    where = places(info)
    assert len(where) == 80
    for number in range(20):
        assert where[f"down/{number}.png"] == where[f"down/again {number}.png"]
        assert where[f"left/{number}.png"] == where[f"left/as {number}.bmp"]
    assert {split: len(rows) for split, rows in info["rows"].items()} == {A: 56, B: 12, C: 12}
    assert info["survey"]["table"] == [["down", 28, 6, 6, "12x12", 20, 0], ["left", 28, 6, 6, "12x12", 20, 0]]
    assert "twice: down/again 0.png, as down/0.png" in report(tmp_path / "packed")
    assert len(report(tmp_path / "packed")) == 40


def test_a_test_picture_that_is_also_in_training_is_trained_on_only(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    photos.rename(tmp_path / "sets" / "train")
    for label in CLASSES[:2]:
        (tmp_path / "sets" / "test" / label).mkdir(parents=True)
        for number in range(18, 24):
            draw(label, number).save(tmp_path / "sets" / "test" / label / f"{number}.bmp")
    where = places(pack(tmp_path / "sets", tmp_path / "packed"))
    assert Counter(where.values())[C] == 8
    for number in (18, 19):
        assert where[f"test/down/{number}.bmp"] == where[f"train/down/{number}.png"] != C


def test_a_split_of_nothing_but_copies_is_refused(photos: Path, tmp_path: Path) -> None:
    for name in ("train", "test"):
        shutil.copytree(photos, tmp_path / "sets" / name)
    with pytest.raises(PackingError, match="no image is left for test: its pictures are copies of others"):
        pack(tmp_path / "sets", tmp_path / "packed")
    shutil.rmtree(photos / "left")
    shutil.copytree(photos / "down", photos / "left")
    with pytest.raises(PackingError, match="no image is left for validation: its pictures are copies of others or in"):
        pack(photos, tmp_path / "packed")
    assert len(report(tmp_path / "packed")) == 40


def test_copies_cost_no_second_decoding(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[bytes] = Counter()
    decode = imaging.decode
    monkeypatch.setattr(imaging, "decode", lambda data, *more: (seen.update([data]), decode(data, *more))[1])
    for number in range(20):
        draw("left", number).save(photos / "left" / f"as {number}.bmp")
    info = pack(photos, tmp_path / "packed", shard_bytes=12 * 12 * 3 * 7)
    assert {*seen.values()} == {1}
    split = load_split(tmp_path / "packed" / "train")
    shown = np.concatenate([*split.images])
    for path, pixels in zip(info["rows"]["train"], shown, strict=True):
        assert np.array_equal(pixels, imaging.decode((photos / path).read_bytes()))


def test_a_picture_in_two_classes_is_left_out_or_kept_on_request(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        draw("up", number).save(photos / "down" / f"both {number}.png")
        draw("up", number).save(photos / "left" / f"both {number}.bmp")
    assert main(["--input", str(photos), "--output", str(tmp_path / "packed")]) == 0
    out = capsys.readouterr().out
    assert "a picture in several classes is left out, as its class is unsure; data.keep_contradicting=true keeps" in out
    assert "files: 6 in several classes; " in out
    info = load_split(tmp_path / "packed" / "train").info
    assert len(places(info)) == 40
    assert [row[-1] for row in info["survey"]["table"]] == [3, 3]
    kept = pack(photos, tmp_path / "packed", limits=Limits(keep_contradicting=True))
    where = places(kept)
    assert all(where[f"down/both {number}.png"] == where[f"left/both {number}.bmp"] for number in range(3))


def test_one_broken_file_of_few_is_left_out_and_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "down" / "broken.jpg").write_bytes(b"nonsense")
    command = ["--input", str(photos), "--output", str(tmp_path / "packed")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "unreadable: down/broken.jpg: 8 bytes that are not a readable image" in out
    assert "files: 1 unreadable; " in out
    for number in range(9):
        (photos / "down" / f"broken {number}.jpg").write_bytes(b"nonsense")
    assert main(command) == 2
    assert main([*command, "--unreadable", "0.3"]) == 0


def deep(folder: Path, low: int, high: int, kind: str = "PNG") -> Path:
    """Two classes of ten grey pictures with 16 bits, of which values from `low` to `high` are used."""
    for label in CLASSES[:2]:
        (folder / label).mkdir(parents=True)
        for number in range(10):
            grey = np.asarray(draw(label, number, 24).convert("L")).astype(np.float64)
            grey = (grey - grey.min()) / (grey.max() - grey.min())
            values = np.round(low + grey * (high - low)).astype(np.uint16)
            Image.fromarray(values).save(folder / label / f"{number}.{kind.lower()}", kind)
    return folder


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [(0, 255, [0, 255]), (3, 250, [0, 255]), (0, 4095, [0, 4095]), (0, 65535, [0, 65535]), (10, 1000, [0, 1023]),
     (27000, 30000, [27000, 30000])],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_by_what_the_data_set_uses(
    low: int, high: int, scale: list[int], kind: str, tmp_path: Path
) -> None:
    info = pack(deep(tmp_path / "photos", low, high, kind), tmp_path / "packed")
    assert info["deep"] == scale
    pixels = load_split(tmp_path / "packed" / "train").images[0]
    assert len(np.unique(pixels)) > 60
    assert int(pixels.max()) - int(pixels.min()) > 200


def colour(pixels: NDArray[np.uint16], kind: str) -> bytes:
    """A colour picture with 16 bits, which Pillow does not write, as a file."""
    height, width, channels = pixels.shape
    if kind == "TIFF":
        data, end = pixels.astype("<u2").tobytes(), 8 + 2 * pixels.size
        fields = [(256, 1, width), (257, 1, height), (258, 3, end), (259, 1, 1), (262, 1, 2), (273, 1, 8),
                  (277, 1, channels), (278, 1, height), (279, 1, len(data))]  # fmt: skip
        entries = b"".join(struct.pack("<HHLL", tag, 4 - (count > 1), count, value) for tag, count, value in fields)
        return (b"II*\0" + struct.pack("<L", end + 6) + data + struct.pack("<3H", 16, 16, 16)
                + struct.pack("<H", len(fields)) + entries + bytes(4))  # fmt: skip
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">LLBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data)) for name, data in parts
    )


@pytest.mark.parametrize(("kind", "channels"), [("PNG", 2), ("PNG", 3), ("PNG", 4), ("TIFF", 3)])
def test_colour_with_16_bits_keeps_all_of_them(kind: str, channels: int) -> None:
    pixels = np.arange(12 * 8 * channels, dtype=np.uint16).reshape(12, 8, channels) * 40
    colours = channels - (channels % 2 == 0)
    pixels[..., colours:] = 0xFF00  # opaque, in the high bytes
    data = colour(pixels, kind)
    found = imaging.decode(data)
    assert found.dtype == np.uint16
    assert np.array_equal(found, np.broadcast_to(pixels[..., :colours], found.shape))
    fitted = imaging.fit(found, 8, (0, 16383))
    assert fitted.shape == (8, 8, 3)
    assert len(np.unique(fitted)) > 50
    with pytest.raises(bounds.ImageError, match="has 8x12 pixels of 16 bits, which count twice, more than the limit"):
        imaging.decode(data, 150)


def test_a_transparent_picture_with_16_bits_is_blended() -> None:
    pixels = np.full((4, 4, 4), 65535, dtype=np.uint16)
    pixels[..., :3], pixels[0, 0] = 0, 0
    found = imaging.decode(colour(pixels, "PNG"))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [0, 0, 0]


def test_values_that_say_nothing_was_measured_set_no_scale(tmp_path: Path) -> None:
    folder = deep(tmp_path / "photos", 100, 4000)
    values = np.full((24, 24), 2000, dtype=np.uint16)
    values[0, 0], values[:, 3:9] = 65535, 4000
    Image.fromarray(values).save(folder / "down" / "hot.png")
    assert pack(folder, tmp_path / "packed")["deep"] == [0, 4095]


def test_serving_scales_16_bits_as_training_did(tmp_path: Path) -> None:
    pack(deep(tmp_path / "photos", 0, 255), tmp_path / "packed")
    split = load_split(tmp_path / "packed" / "validation")
    model = build_model("cnn", 2, split.image_size).eval()
    write_artifact(tmp_path / "artifact", model, Hyperparameters(model="cnn"), split, {}, None)
    facts = json.loads((tmp_path / "artifact" / "model.json").read_text())
    assert facts["preprocessing"]["deep"] == [0, 255]
    classifier = inference.model_fn(str(tmp_path / "artifact"))
    path = split.info["rows"]["validation"][0]
    (batch,) = inference.fit(inference.input_fn((tmp_path / "photos" / path).read_bytes(), "image/png"), classifier)
    assert np.array_equal(batch, split.images[0][0])


def test_a_data_set_of_one_colour_is_refused(tmp_path: Path) -> None:
    for number in range(10):
        for label in CLASSES[:2]:
            (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 + number, 8), (9, 9, 9)).save(tmp_path / "photos" / label / f"{number}.png")
    with pytest.raises(PackingError, match=r"all pictures for training are of one colour, \[9, 9, 9\]"):
        pack(tmp_path / "photos", tmp_path / "packed")


def exif(tag: bytes, *more: bytes, values: bytes = b"") -> bytes:
    """A block of EXIF with these entries, which are 12 bytes each."""
    entries = [tag, *more]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + values


TURNED = struct.pack("<HHLHH", 274, 3, 1, 6, 0)
# An exposure that is no rational, a negative one, a pointer that leads nowhere, and a kind of value that there is none.
BROKEN = {
    "negative": struct.pack("<HHLL", 282, 10, 1, 38),
    "outside": struct.pack("<HHLL", 34665, 4, 1, 10**6),
    "kind": struct.pack("<HHLL", 33434, 99, 7, 5),
    "long": struct.pack("<HHLL", 37500, 7, 2**31, 40),
}


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("broken", [*BROKEN, "head"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_read_whatever_else_is_broken_in_exif(kind: str, broken: str) -> None:
    picture, file = draw("down", 3, 32), io.BytesIO()
    block = exif(TURNED, BROKEN.get(broken, BROKEN["negative"]), values=struct.pack("<ll", -1, 3))
    block = b"XX" * (broken == "head") + block[2 * (broken == "head") :]
    picture.transpose(Image.Transpose.ROTATE_90).save(file, kind, exif=b"Exif\0\0" + block, quality=95)
    assert np.abs(imaging.decode(file.getvalue()).astype(int) - np.asarray(picture)).mean() < 30  # 70 where not turned


def tiff(pixels: NDArray[np.uint8], *more: bytes) -> bytes:
    """A grey TIFF file of orientation 6 with more entries."""
    height, width = pixels.shape
    fields = [(256, 3, width), (257, 3, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (274, 3, 6),
              (277, 3, 1), (278, 3, height), (279, 4, pixels.size)]  # fmt: skip
    entries = [struct.pack("<HHLL", tag, form, 1, value) for tag, form, value in fields] + [*more]
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    start = 8 + pixels.size
    return (b"II*\0" + struct.pack("<L", start) + pixels.tobytes() + struct.pack("<H", len(entries))
            + b"".join(entries) + bytes(4) + struct.pack("<ll", -1, 3))  # fmt: skip


@pytest.mark.parametrize("broken", ["negative", "outside", "none"])
def test_a_tiff_is_turned_without_its_exif_being_written_again(broken: str) -> None:
    upright = np.asarray(draw("down", 3, 32).convert("L"))
    stored = np.ascontiguousarray(np.rot90(upright))
    values = 8 + stored.size + 2 + 11 * 12 + 4
    more = {"negative": [struct.pack("<HHLL", 282, 10, 1, values)], "outside": [BROKEN["outside"]], "none": []}[broken]
    assert np.array_equal(imaging.decode(tiff(stored, *more))[..., 0], upright)


def table(folder: Path, text: str | bytes) -> Path:
    for number in range(3):
        layout(folder, f"images/{number}.png")
    path = folder / "labels.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nimages/0.png,cat\nimages/1.png,dog\n",
        b"\xef\xbb\xbffilename;class\r\nimages/0.png;cat\r\n\r\nimages/1.png;dog\r\n",
        "Image_ID\tCategory\nimages/0\tcat\nimages/1\tdog\n",
        "images/0.png,cat\nimages/1.png,dog\n",
        ",label,file name\n0,cat,images\\0.png\n1,dog,./images/1.png\n",
        "path,label\nimages/0.png,cat\nimages/1.png,dog".encode("utf-16"),
        "path,label\rimages/0.png,cat\rimages/1.png,dog\r",
        "id,species\nimages/0,cat\nimages/1,dog\n",
        "img_url,Breed of it\nimages/0.png,cat\nimages/1.png,dog\n",
        "number,fname,category\n7,images/0.png,cat\n8,images/1.png,dog\n",
        "cat,images/0.png\ndog,images/1.png\n",
        "images/0.png cat\nimages/1.png dog\n",
        "sep=;\r\npath;label\r\nimages/0.png;cat\r\nimages/1.png;dog\r\n",
        'path, label\nimages/0.png, "cat"\nimages/1.png, "dog"\n',
    ],
)
def test_tables_of_the_usual_spellings_are_read(text: str | bytes, tmp_path: Path) -> None:
    items, wrong = read_table(table(tmp_path, text))
    assert wrong == []
    assert [(item.path, item.label) for item in items] == [("images/0.png", "cat"), ("images/1.png", "dog")]


def test_a_column_that_names_nothing_but_splits_is_one(tmp_path: Path) -> None:
    rows = ["images/0.png,cat,train", "images/1.png,dog,val", "images/2.png,dog,Test"]
    for head in ("path,label,tvt", "path,label,type", "file,class,data set"):
        items, wrong = read_table(table(tmp_path, "\n".join([head, *rows])))
        assert ([item.split for item in items], wrong) == ([A, B, C], [])
    for head, flags, splits in (("is_valid", "False True FALSE", [A, B, A]), ("isTrain", "1 0 0", [A, C, C])):
        text = [f"{row.rpartition(',')[0]},{flag}" for row, flag in zip(rows, flags.split(), strict=True)]
        items, wrong = read_table(table(tmp_path, "\n".join([f"name,label,{head}", *text])))
        assert ([item.split for item in items], wrong) == (splits, [])
    items, _ = read_table(table(tmp_path, "\n".join(["path,label,seen from", *rows[:2], "images/2.png,dog,bus"])))
    assert {item.split for item in items} == {None}
    items, _ = read_table(table(tmp_path, "path,label\nimages/0.png,train\nimages/1.png,test\n"))
    assert [(item.label, item.split) for item in items] == [("train", None), ("test", None)]


def test_wrong_rows_are_named(tmp_path: Path) -> None:
    rows = ["path,label,split", "images/0.png,cat,Train", "images/1.png,dog,val", "gone.png,dog,", "images/2.png,,",
            "../a.png,dog,", ",dog,", "images/2.png,dog,later", "images/2.png,d\u200bog,"]  # fmt: skip
    (tmp_path / "a.png").write_bytes(b"x")
    items, wrong = read_table(table(tmp_path / "d", "\n".join(rows)))
    assert [item.split for item in items] == [A, B]
    assert wrong == [
        "row 4: 'gone.png' is no file", "row 5: it has no label",
        "row 6: '../a.png' is a place outside of the folder of the table", "row 7: it has no path",
        "row 8: the split 'later' is none of train, validation, test",
        "row 9: the label 'd\\u200bog' has characters that nobody sees or that change how text runs",
    ]  # fmt: skip
    said = "row 4: rows 4 and 5 say different things of 'images/2.png'"
    twice = "path,label\nimages/0.png,cat\nimages/1.png,dog\nimages/2.png,cat\nimages/2.png,dog\n"
    assert read_table(table(tmp_path / "e", twice))[1][0] == said
    for text, sentence in (("a,b\n1,2\n", "has the columns 'a', 'b'; it needs path and label"),
                           ("path,label\nimages/0.png,cat\n", "holds one class, 'cat'"),
                           (b"\x89PNG\r\n\x1a\n\0", "is no table in UTF-8")):  # fmt: skip
        with pytest.raises(PackingError, match=sentence):
            read_table(table(tmp_path / "f", text))


def test_splits_of_a_table_have_usual_names_too(tmp_path: Path) -> None:
    rows = ["path,label,Usage", "images/0.png,cat,Training", "images/1.png,dog,PublicTest", "images/2.png,dog,validate"]
    items, wrong = read_table(table(tmp_path, "\n".join(rows)))
    assert ([item.split for item in items], wrong) == ([A, C, B], [])


@pytest.mark.usefixtures("photos")
def test_a_table_is_packed_with_its_splits_and_too_many_wrong_rows_stop_it(tmp_path: Path) -> None:
    rows = [f"photos/{label}/{number}.png,{label},{'test' if number > 15 else 'train'}"
            for label in CLASSES[:2] for number in range(20)]  # fmt: skip
    path = tmp_path / "birds.csv"
    path.write_text("\n".join(["path,label,split", *rows, "photos/gone.png,down,train"]))
    info = pack(path, tmp_path / "packed")
    assert info["counts"][C] == 8
    assert sum(info["counts"].values()) == 40
    assert report(tmp_path / "packed") == ["unreadable: row 42: 'photos/gone.png' is no file"]
    with pytest.raises(PackingError, match=r"1 of 41 files cannot be read, more than 0.0%; the first: \"row 42: "):
        pack(path, tmp_path / "packed", limits=Limits(unreadable=0))


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another place for packed data."""
    monkeypatch.setattr(data, "ROOT", tmp_path / "project")
    monkeypatch.setattr(data, "DATA", tmp_path / "project" / "data")
    monkeypatch.setattr(data, "STAMPS", tmp_path / "project" / "stamps")
    (tmp_path / "project" / "data").mkdir(parents=True)
    return tmp_path / "project"


@pytest.mark.parametrize(
    ("source", "name"),
    [("cifar10/train", "cifar10"), ("birds/images/train", "birds"), ("photos", "photos"), ("set/seg_train", "set")],
)
@pytest.mark.usefixtures("workshop")
def test_a_data_set_has_the_useful_name_of_its_folder(source: str, name: str, tmp_path: Path) -> None:
    assert data._name(tmp_path / source) == name


def test_make_data_prints_one_table_of_80_columns_and_writes_a_page(
    photos: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "<script>alert(1)" + "猫" * 40
    (photos / "down").rename(photos / long)
    (photos / long / "broken.jpg").write_bytes(b"nonsense")
    shutil.copy(photos / long / "1.png", photos / long / "2 again.png")
    for label in (long, "left"):
        draw("up", 1).save(photos / label / "both.png")
    monkeypatch.setitem(terminal.given, "DATA", str(photos))
    monkeypatch.setattr("sys.argv", ["data"])
    assert data.main() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split("  ")[0] == "class"
    assert all(data.columns(line) <= 80 for line in out)
    assert [line.split()[-7:] for line in out[1:3]] == [
        [line.split()[-7], "15", "3", "3", "12x12", "1", "2"] if "script" in line else
        ["left", "14", "3", "3", "12x12", "0", "1"] for line in out[1:3]
    ]  # fmt: skip
    page = (workshop / "data" / "photos.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert page.count("data:image/jpeg;base64,") == 5 + 5 + 2 + 2
    assert "broken.jpg: 8 bytes that are not a readable image" in page


@pytest.mark.parametrize(
    ("source", "sentence"),
    [(".", "holds this project's own packed data"), ("data", "holds this project's own packed data"),
     ("data/letters", "was not packed"), ("nowhere", "there is no folder 'nowhere'")],
)  # fmt: skip
def test_a_folder_that_cannot_be_meant_gets_its_own_reason(
    source: str, sentence: str, workshop: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packed, workshop / "data" / "letters")
    monkeypatch.chdir(workshop)
    with pytest.raises(UserError, match=sentence):
        data.prepare(load(), source)


def test_a_table_is_no_folder_where_one_is_needed(tmp_path: Path) -> None:
    path = table(tmp_path, "path,label\n")
    with pytest.raises(UserError, match=r"there is no folder '.*labels.csv'; DATA"):
        data.raw(str(path))


def test_copies_follow_their_picture() -> None:
    items = [Item(f"a/{number}", "a", None) for number in range(40)]
    copies = {f"a/{number}": f"a/{number - 1}" for number in range(1, 40, 2)}
    where = {item.path: name for name, rows in assign(items, 0, copies).items() for item in rows}
    assert all(where[path] == where[first] for path, first in copies.items())
