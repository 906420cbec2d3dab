"""The memory that pictures take: estimated from their headers, shared by all that are decoded, and never exceeded."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bounds
import imaging
import payload
from pipelines import SOURCE
from pipelines.local import serve as serve_local
from tests.helpers import free_port
from tests.hosting import ask
from tests.test_inference import artifact

__all__ = ["artifact"]  # a fixture
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("JPEG", "RGB", {}), "progressive": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    "cmyk": ("JPEG", "CMYK", {"progressive": True}), "grey": ("JPEG", "L", {}), "png": ("PNG", "RGB", {}),
    "palette": ("PNG", "P", {}), "transparent": ("PNG", "RGBA", {}), "deep": ("PNG", "I;16", {}),
    "webp": ("WEBP", "RGB", {}), "lossless": ("WEBP", "RGBA", {"lossless": True}), "bmp": ("BMP", "RGB", {}),
    "tiff": ("TIFF", "RGB", {"compression": "tiff_lzw"}), "fax": ("TIFF", "1", {"compression": "group4"}),
}  # fmt: skip
# Prints the bytes by which a process grows over a picture's decoding, and what was reckoned with.
GROWTH = """
import sys
sys.path.insert(0, {source!r})
import bounds, imaging
data = open({file!r}, "rb").read()
taken = []
bounds.ROOM.take = lambda size, seconds: taken.append(size)
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
image = imaging.decode(data)
print(peak() - before, taken[0])
"""


def encoded(kind: str, width: int, height: int, **more: Any) -> bytes:
    """A large picture in few bytes."""
    form, mode, options = KINDS[kind]
    squares = np.ones((-(-height // 16), -(-width // 16)), np.uint8)
    flat = np.kron(np.arange(256, dtype=np.uint8).reshape(16, 16), squares)[:height, :width]
    if mode == "I;16":
        image = Image.fromarray(flat.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(flat).convert("RGB").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **options, **more)
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how a process grows")
@pytest.mark.parametrize("kind", KINDS)
def test_no_picture_takes_more_than_was_reckoned_with(kind: str, tmp_path: Path) -> None:
    exif = {} if kind in ("bmp", "fax", "deep") else {"exif": Image.Exif()}
    if exif:
        exif["exif"][0x0112] = 6
    (tmp_path / "picture").write_bytes(encoded(kind, 4000, 3000, **exif))
    code = GROWTH.format(source=str(SOURCE), file=str(tmp_path / "picture"))
    grown, taken = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert 0.5 * taken < grown < taken + 12e6  # and strips, tables and the file itself


def test_pictures_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("png", 1000, 1000)  # takes 7 MB, and 3 afterwards
    monkeypatch.setattr(imaging, "ROOM", bounds.Room(12_000_000))
    kept = [imaging.decode(data) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(imaging.decode, data)
        time.sleep(0.3)
        assert not third.done()
        with pytest.raises(bounds.NoRoom, match="takes 7 MB of memory, and other pictures take some of 12 MB"):
            imaging.decode(data, patience=0.1)
        kept.clear()
        gc.collect()
        assert np.array_equal(third.result(30), imaging.decode(data))


def test_what_can_never_fit_is_refused_at_once_and_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imaging, "ROOM", room := bounds.Room(8_000_000))
    with pytest.raises(bounds.NoRoom, match="takes 19 MB of memory, and there are 8 MB for pictures"):
        imaging.decode(encoded("webp", 1000, 1000))
    with pytest.raises(payload.RequestError) as refused:
        payload.read(encoded("webp", 1000, 1000), "image/webp")
    assert refused.value.status == 503
    with pytest.raises(bounds.ImageError):
        imaging.decode(encoded("png", 1000, 1000)[:3000])
    gc.collect()
    room.take(8_000_000, 0)


def test_a_request_waits_for_room_no_longer_than_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imaging, "ROOM", room := bounds.Room(12_000_000))
    monkeypatch.setattr(payload, "PATIENCE", 0.1)
    room.take(12_000_000, 0)
    later = threading.Timer(5, room.give, [12_000_000])  # without an end it would be answered then
    later.start()
    with pytest.raises(payload.RequestError, match="takes 7 MB of memory, and other pictures take some of 12 MB"):
        payload.read(encoded("png", 1000, 1000), "image/png")
    later.cancel()


def test_the_memory_of_large_pictures_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr("bounds.ctypes.CDLL", lambda _: SimpleNamespace(malloc_trim=trimmed.append))
    monkeypatch.setattr(bounds, "_libc", bounds._libc.__wrapped__)  # another test may have asked for it
    room = bounds.Room(2 * bounds.LARGE)
    room.take(2 * bounds.LARGE - 1, 0)
    room.give(bounds.LARGE - 1)
    assert not trimmed
    room.give(bounds.LARGE)
    assert trimmed == [0]


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = bounds.unused()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none, in version 1
    monkeypatch.setattr(bounds, "LIMITS", [str(tmp_path / name) for name in ("memory.max", "memory.limit_in_bytes")])
    assert abs(bounds.unused() - machine) < 1e9
    (tmp_path / "memory.max").write_text("8589934592\n")
    assert 0 < bounds.unused() < 7 / 8 * 2**33
    (tmp_path / "memory.max").write_text("1000\n")
    assert bounds.unused() == 0


def test_scaling_by_strips_is_pillows() -> None:
    random = np.random.default_rng(0)
    for height, width, size in ((2100, 1700, 224), (1, 3, 8), (40, 40, 40), (1500, 1500, 1600)):
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        side = min(height, width)
        box = ((width - side) // 2, (height - side) // 2)
        square = Image.fromarray(pixels).crop((*box, box[0] + side, box[1] + side))
        whole = square.resize((size, size), Image.Resampling.BILINEAR)
        assert np.array_equal(imaging.fit(pixels, size), np.asarray(whole))


@pytest.mark.container
@pytest.mark.parametrize("memory", ["1g", "2g"])
def test_large_pictures_do_not_end_a_small_container(memory: str, artifact: Path, serving_image: str) -> None:
    """Eight clients at once, with pictures of 50 megapixels: each is answered, or gets 503."""
    bodies = [encoded(kind, 8000, 6250) for kind in ("png", "jpeg", "progressive", "webp", "grey", "transparent")]
    port = free_port()
    words = serve_local.command(serving_image, artifact, port)
    words[2:2] = ["--memory", memory, "--memory-swap", memory]
    process = subprocess.Popen(words)
    try:
        serve_local._wait(process, port)
        url = f"http://127.0.0.1:{port}"
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda number: ask(url, bodies[number % len(bodies)], "image/png"), range(16)))
        statuses = [answer.status for answer in answers]
        assert set(statuses) <= {200, 503}, statuses
        assert statuses[:2] == [200, 200] or statuses.count(200) >= 6
        assert ask(url, bodies[0], "image/png").status == 200
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait()
