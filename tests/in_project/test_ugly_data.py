"""Folders of real pictures as people have them: a right result, or one sentence that names the offender."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import SOURCE
from processing.preprocess import Limits, pack
from processing.scan import PackingError, scan
from tests.helpers import CLASSES, draw
from training.data import load_split

SCRIPT = [sys.executable, str(SOURCE / "processing" / "preprocess.py")]
GENEROUS = Limits(unreadable=0.5)
STRICT = Limits(unreadable=0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten good pictures each."""
    folder = tmp_path / "photos"
    for label in CLASSES[:2]:
        (folder / label).mkdir(parents=True)
        for number in range(10):
            draw(label, number).save(folder / label / f"{number}.png")
    return folder


def report(output: Path) -> str:
    path = output.with_name(f"{output.name}.report.txt")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of raw chunks."""
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def bomb() -> bytes:
    """A few kilobytes that claim to be 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b""))


def jpeg() -> bytes:
    buffer = io.BytesIO()
    draw("down", 1, 64).save(buffer, "JPEG")
    return buffer.getvalue()


def passes() -> bytes:
    """A progressive JPEG file with 50,000 empty passes over its pixels, which take minutes."""
    buffer = io.BytesIO()
    draw("down", 1, 1000).save(buffer, "JPEG", progressive=True)
    return buffer.getvalue()[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" * 50_000 + b"\xff\xd9"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("passes.jpg", passes(), "more than 20 passes over 1000000 pixels"),
        ("marks.jpg", b"\xff\xd8" + b"\xff" * 6_000_000, "too many parts"),
        ("truncated.jpg", jpeg()[:-200], "the image is damaged"),
        ("empty.jpg", b"", "0 bytes that are not a readable image"),
        ("text.jpg", b"dear diary", "not a readable image"),
        ("bomb.png", bomb(), "60000x60000 pixels, more than the limit of 100000000"),
        ("noise.bmp", b"BM" + bytes(range(256)), "the image is damaged|not a readable image"),
    ],
)
def test_unreadable_files_are_reported_and_fail_past_the_ceiling(
    photos: Path, tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    (photos / "down" / name).write_bytes(data)
    with pytest.raises(PackingError) as error:
        pack(photos, tmp_path / "packed", limits=STRICT)
    assert f"1 of 21 files cannot be read, more than 0.0%; the first: 'down/{name}: " in str(error.value)
    assert not (tmp_path / "packed").exists()
    assert report(tmp_path / "packed").startswith(f"unreadable: down/{name}: ")
    info = pack(photos, tmp_path / "packed", limits=GENEROUS)
    assert sum(info["counts"].values()) == 20
    assert len(report(tmp_path / "packed").splitlines()) == 1
    assert re.search(reason, report(tmp_path / "packed"))
    (photos / "down" / name).unlink()
    pack(photos, tmp_path / "packed")
    assert report(tmp_path / "packed") == ""


def test_the_size_limits_are_settings(photos: Path, tmp_path: Path) -> None:
    Image.new("1", (11_000, 11_000)).save(photos / "down" / "poster.png")
    (photos / "down" / "film.tiff").write_bytes(bytes(2_000_000))
    with pytest.raises(PackingError, match="2 of 22 files cannot be read"):
        pack(photos, tmp_path / "packed", limits=Limits(unreadable=0.0, megapixels=0.2))
    assert "film.tiff: 2,000,000 bytes, more than an image of 0.2 megapixels has" in report(tmp_path / "packed")
    (photos / "down" / "film.tiff").unlink()
    assert sum(pack(photos, tmp_path / "packed", limits=Limits(megapixels=130))["counts"].values()) == 21


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_pictures() -> dict[str, bytes]:
    """The same upright picture in modes and wrappings that people have."""
    picture = draw("down", 5, 16)
    other = Image.new("RGB", (16, 16), (0, 255, 0))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "mislabelled.jpg": encode(picture, "PNG"),
        "UPPER.JPEG": encode(picture, "JPEG", quality=95, subsampling=0),
        "alpha.png": encode(picture.convert("RGBA"), "PNG"),
        "cmyk.tif": encode(picture.convert("CMYK"), "TIFF"),
        "turned.png": encode(picture.transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned),
        "animated.webp": encode(picture, "WEBP", save_all=True, append_images=[other], lossless=True),
        "animated.png": encode(picture, "PNG", save_all=True, append_images=[other]),
        "pages.tiff": encode(picture, "TIFF", save_all=True, append_images=[other]),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_are_packed_as_they_look(photos: Path, tmp_path: Path, name: str) -> None:
    (photos / "down" / name).write_bytes(odd_pictures()[name])
    pack(photos, tmp_path / "packed", size=16)
    for split in ("train", "validation", "test"):
        rows = load_split(tmp_path / "packed" / split)
        paths = rows.info["rows"][split]
        if f"down/{name}" in paths:
            pixels = rows.pixels(np.array([paths.index(f"down/{name}")]))[0]
            assert np.abs(pixels.astype(int) - np.asarray(draw("down", 5, 16))).mean() < 4
            return
    pytest.fail(f"{name} was not packed")


def test_grey_sixteen_bits_and_palettes_are_packed_as_they_look(photos: Path, tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))
    Image.fromarray(ramp).save(photos / "down" / "deep.png")
    draw("down", 5, 16).quantize(16).save(photos / "down" / "palette.png", transparency=0)
    info = pack(photos, tmp_path / "packed", size=16)
    assert sum(info["counts"].values()) == 22
    name = next(name for name, rows in info["rows"].items() if "down/deep.png" in rows)
    row = info["rows"][name].index("down/deep.png")
    pixels = load_split(tmp_path / "packed" / name).pixels(np.array([row]))[0]
    assert np.array_equal(pixels[0, :, 0], (ramp[0] >> 8).astype(np.uint8))


def test_strange_names_nested_folders_and_files_that_are_no_images(photos: Path, tmp_path: Path) -> None:
    deep = photos / "down" / "2019" / "with spaces & 'quotes' \"double\""
    deep.mkdir(parents=True)
    for number, name in enumerate(("ünïcödé 🐈.PNG", "new\nline.png", "-dash.png", "$(touch x).png", "a;b.png")):
        draw("down", 50 + number).save(deep / name)
    draw("left", 50).save(Path(os.fsdecode(os.fsencode(photos / "left") + b"/latin-\xe9.png")))
    for name in (".DS_Store", "._0.png", ".hidden.jpg"):
        (photos / "down" / name).write_bytes(b"\0\0\0\1Bud1")
    (photos / "down" / "notes.txt").write_text("notes")
    (photos / "down" / "IMG_1.HEIC").write_bytes(b"ftypheic")
    os.mkfifo(photos / "down" / "pipe.png")
    (photos / "down" / "pipe link.png").symlink_to("pipe.png")
    draw("down", 51).save(photos / "stray.png")
    info = pack(photos, tmp_path / "packed")
    assert sum(info["counts"].values()) == 26
    assert report(tmp_path / "packed").splitlines() == [
        "left out: stray.png: lies outside of the class folders",
        "left out: down/pipe link.png: not a regular file",
        "left out: down/pipe.png: not a regular file",
        "left out: down/IMG_1.HEIC: not one of .jpg .jpeg .png .webp .bmp .tif .tiff",
        "left out: down/notes.txt: not one of .jpg .jpeg .png .webp .bmp .tif .tiff",
    ]
    done = subprocess.run(
        [*SCRIPT, "--input", str(photos), "--output", str(tmp_path / "again")], capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "files: 5 left out; " in done.stdout
    assert json.loads((tmp_path / "again" / "train" / "dataset.json").read_text())["fingerprint"] == info["fingerprint"]


def test_links_are_followed_once_and_dangling_ones_reported(photos: Path, tmp_path: Path) -> None:
    """Those inside the folder; test_strangers.py has the others."""
    album = photos / "left" / "album"
    album.mkdir()
    draw("up", 1).save(album / "1.png")
    draw("up", 2).save(photos / "left" / "loose.png")
    (photos / "down" / "linked.png").symlink_to(photos / "left" / "loose.png")
    (photos / "down" / "gone.png").symlink_to("nothing.png")
    (photos / "down" / "album").symlink_to(album)
    (photos / "down" / "album again").symlink_to(album)
    (album / "loop").symlink_to(album)
    (photos / "down" / "self").symlink_to(photos / "down" / "self")
    (photos / "third").symlink_to(album)
    os.symlink("nothing", os.fsencode(photos / "left") + b"/gone-\xe9.png")  # noqa: PTH211
    found, _ = scan(photos)
    assert len([item for item in found if item.label == "down"]) == 13
    assert {item.label for item in found} == {"down", "left", "third"}
    pack(photos, tmp_path / "packed", limits=Limits(unreadable=0.5, keep_contradicting=True))
    assert [line for line in report(tmp_path / "packed").splitlines() if not line.startswith("twice: ")] == [
        "unreadable: down/gone.png: No such file or directory",
        "unreadable: left/gone-\\udce9.png: No such file or directory",
        "left out: down/self: not one of .jpg .jpeg .png .webp .bmp .tif .tiff",
    ]


def test_a_folder_whose_name_is_no_text(photos: Path, tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    command = [*SCRIPT, "--input", str(photos), "--output", os.fsdecode(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9" in done.stdout
    assert load_split(Path(os.fsdecode(place)) / "train").classes == ["down", "left"]


def empty_class(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / "photo.heic").write_bytes(b"x")


def one_class(folder: Path) -> None:
    (folder / "left").rename(folder.parent / "elsewhere")


def two_images(folder: Path) -> None:
    for path in folder.glob("*/[2-9].png"):
        path.unlink()


def unknown_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split).mkdir()
    for label in CLASSES[:2]:
        (folder / label).rename(folder / "train" / label)
    (folder / "val" / "alien").mkdir()
    draw("up", 1).save(folder / "val" / "alien" / "1.png")


def all_broken(folder: Path) -> None:
    for path in (folder / "left").iterdir():
        path.write_bytes(b"broken")


def binary_name(folder: Path) -> None:
    os.rename(os.fsencode(folder / "left"), os.fsencode(folder) + b"/l\xe9ft")  # noqa: PTH104


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (empty_class, "class folder 'empty' holds no image; add some, or remove it (left out: 'empty/photo.heic: not"),
        (one_class, "holds one class, 'down'; a classifier needs two or more"),
        (two_images, "no image is left for validation: give at least one class three images, or add a val folder"),
        (unknown_class, "class 'alien' has images for validation or test, but none in the training folder"),
        (all_broken, "class 'left' has no image left for training; "),
        (binary_name, "class folder 'l\\udce9ft' has a name that is not valid UTF-8; rename it"),
    ],
)
def test_folders_that_cannot_be_trained_on_are_one_sentence(
    photos: Path, tmp_path: Path, make: Callable[[Path], None], sentence: str
) -> None:
    make(photos)
    output = tmp_path / "packed"
    command = [*SCRIPT, "--input", str(photos), "--output", str(output), "--unreadable", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not output.exists()


def test_a_class_of_one_image_trains_on_it(photos: Path, tmp_path: Path) -> None:
    (photos / "rare").mkdir()
    draw("up", 1).save(photos / "rare" / "only.png")
    info = pack(photos, tmp_path / "packed")
    assert "rare/only.png" in info["rows"]["train"]


def test_composed_and_decomposed_names_are_one_class(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("café", "thé"):
            name = unicodedata.normalize("NFC", label) if split == "train" else unicodedata.normalize("NFD", label)
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(4):
                draw(CLASSES[label == "thé"], number + 4 * (split == "val")).save(place / f"{number}.png")
    assert pack(tmp_path / "photos", tmp_path / "packed")["classes"] == ["café", "thé"]


def test_a_folder_that_cannot_be_listed_is_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "left":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PackingError, match="left cannot be listed: Permission denied"):
        pack(photos, tmp_path / "packed")


def mounted(tmp_path: Path, *options: str) -> Path:
    """A mount point, or a skip where this user cannot mount."""
    place = tmp_path / "mount"
    place.mkdir()
    if subprocess.run(["mount", *options, str(place)], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    return place


def unmount(place: Path) -> None:
    subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_folder_is_packed(photos: Path, tmp_path: Path) -> None:
    place = mounted(tmp_path, "-o", "bind,ro", str(photos))
    try:
        with pytest.raises(OSError, match="Read-only"):
            (place / "x").touch()
        assert sum(pack(place, tmp_path / "packed")["counts"].values()) == 20
    finally:
        unmount(place)


def test_a_disk_without_room_is_one_sentence_and_keeps_the_older_data_set(photos: Path, tmp_path: Path) -> None:
    place = mounted(tmp_path, "-t", "tmpfs", "-o", "size=400k", "tmpfs")
    try:
        first = pack(photos, place / "packed", size=32)
        with pytest.raises(PackingError, match=r"packing needs about 3 MB in .*mount, where 0 MB are free"):
            pack(photos, place / "packed", size=224)
        (place / "ballast").write_bytes(bytes(290_000))
        command = [*SCRIPT, "--input", str(photos), "--output", str(place / "packed"), "--size", "32", "--seed", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert load_split(place / "packed" / "train").info == first
        assert sorted(path.name for path in place.iterdir()) == ["ballast", "packed"]
    finally:
        unmount(place)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_packing_leaves_no_half_data_set(photos: Path, tmp_path: Path, number: signal.Signals) -> None:
    for copy in range(400):
        draw("down", 100 + copy, 300).save(photos / "down" / f"many {copy}.png")
    command = [*SCRIPT, "--input", str(photos), "--output", str(tmp_path / "packed")]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".packed.*.tmp/*/train")) and time.monotonic() < deadline:
        time.sleep(0.01)
    started.send_signal(number)
    assert started.wait(timeout=30) in (143, -number)
    assert not (tmp_path / "packed").exists()
    litter = [path.name for path in tmp_path.iterdir() if path.name != "photos"]
    assert len(litter) == (0 if number == signal.SIGTERM else 1)
    pack(photos, tmp_path / "packed", limits=GENEROUS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "photos"]
