"""Images in every mode come out as upright 8-bit RGB, or are refused with a reason."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import bounds
import imaging


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(height: int = 20, width: int = 30) -> Image.Image:
    """Left half dark red, right half light blue."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2] = (120, 20, 20)
    pixels[:, width // 2 :] = (150, 180, 240)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG"])
def test_every_format_gives_the_same_picture(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    decoded = imaging.decode(encoded(picture(), kind, **options))
    assert decoded.dtype == np.uint8
    assert decoded.shape == (20, 30, 3)
    tolerance = 12 if kind == "JPEG" else 0
    assert np.abs(decoded[:, :10].astype(int) - (120, 20, 20)).max() <= tolerance
    assert np.abs(decoded[:, 20:].astype(int) - (150, 180, 240)).max() <= tolerance


@pytest.mark.parametrize("orientation", [*range(10), 200])
def test_exif_orientation_is_applied(orientation: int) -> None:
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Image.Transpose that turns the upright picture into the stored one
    stored = picture().transpose(Image.Transpose(undo[orientation])) if orientation in undo else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = imaging.decode(encoded(picture(), "PNG"))
    assert np.array_equal(imaging.decode(encoded(stored, "PNG", exif=exif)), upright)


def grey16() -> NDArray[np.uint16]:
    return np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(kind: str) -> None:
    decoded = imaging.fit(imaging.decode(encoded(Image.fromarray(grey16()), kind)), 10)
    assert np.array_equal(decoded[..., 0], (grey16() >> 8).astype(np.uint8))
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_transparency_is_blended_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert imaging.decode(encoded(clear))[0, 0].tolist() == [255, 255, 255]
    assert imaging.decode(encoded(half))[0, 0].tolist() == pytest.approx([227, 127, 127], abs=1)
    assert imaging.decode(encoded(Image.new("LA", (4, 4), (50, 0))))[0, 0].tolist() == [255, 255, 255]
    assert imaging.decode(encoded(palette, transparency=1))[0, 0].tolist() == [255, 255, 255]
    assert imaging.decode(encoded(palette))[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("mode", "colour"), [("1", 1), ("L", 99), ("CMYK", (0, 255, 255, 0)), ("YCbCr", (128, 128, 128))]
)
def test_other_modes_become_rgb(mode: str, colour: int | tuple[int, ...]) -> None:
    image = Image.new(mode, (5, 5), colour)
    kind = "PNG" if mode in ("1", "L") else "JPEG"
    decoded = imaging.decode(encoded(image, kind))
    wanted = np.asarray(image.convert("RGB"))
    assert np.abs(decoded.astype(int) - wanted).max() <= 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes that are not a readable image"),
        (b"plain text", "10 bytes that are not a readable image"),
        (encoded(Image.new("L", (8, 8)), "GIF"), "not a readable image"),
        (encoded(picture(), "JPEG")[:400], "damaged"),
        (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "pixel mode 'F' has values outside 0 to 65535 or fractions"),
        (encoded(Image.new("I", (8, 8), 70_000), "TIFF"), "pixel mode 'I' has values outside 0 to 65535"),
        (encoded(Image.new("I", (8, 8), -1), "TIFF"), "pixel mode 'I' has values outside 0 to 65535"),
        (encoded(Image.new("1", (10001, 10001)), "PNG"), "10001x10001 pixels, more than the limit"),
    ],
    ids=["empty", "text", "gif", "truncated", "float", "above 16 bits", "below 0", "too large"],
)
def test_bad_images_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(bounds.ImageError, match=message):
        imaging.decode(data)


def test_fit_takes_the_centred_square() -> None:
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, 10:20] = 200
    assert (imaging.fit(image, 5) == 200).all()
    assert imaging.fit(image[:, 10:20], 10) is not None
    assert imaging.fit(np.full((1, 4000, 3), 7, dtype=np.uint8), 16).shape == (16, 16, 3)


def test_normalise_gives_zero_mean_and_unit_deviation() -> None:
    batch = torch.randint(0, 256, (8, 6, 6, 3), dtype=torch.uint8)
    mean = (batch.float() / 255).mean((0, 1, 2))
    std = (batch.float() / 255).std((0, 1, 2), correction=0)
    out = imaging.normalise(batch, mean.tolist(), std.tolist())
    assert out.shape == (8, 3, 6, 6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_png_round_trip_is_exact() -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert np.array_equal(imaging.decode(imaging.encode_png(image)), image)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))


def png(parts: bytes, mark: bytes = b"IDAT") -> bytes:
    data = encoded(picture(), "PNG")
    place = data.index(mark) - 4
    return data[:place] + parts + data[place:]


def jpeg(parts: bytes, mark: bytes = b"\xff\xdb", size: int = 16, **options: object) -> bytes:
    data = encoded(Image.new("L", (size, size), 99), "JPEG", **options)
    place = data.rindex(mark)
    return data[:place] + parts + data[place:]


def bmp(side: int, compression: int, runs: bytes) -> bytes:
    bits, colours = (8, 256) if compression == 1 else (4, 16)
    start = 54 + 4 * colours
    facts = (40, side, side, 1, bits, compression, len(runs), 2835, 2835, colours, 0)
    head = b"BM" + struct.pack("<LHHL", start + len(runs), 0, 0, start) + struct.pack("<LllHHLLllLL", *facts)
    return head + bytes(4 * colours) + runs


def tiff(tags: dict[int, int], content: bytes = b"", big: bool = False, side: int = 16) -> bytes:
    """Grey, from tags of one number; 0 stands for as many places as fit into the content, which they all point at."""
    fields = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 277: 1, **tags}
    head = b"II+\0\x08\0\0\0\x10" + bytes(7) if big else b"II*\0\x08" + bytes(3)
    entry, size = ("<HHQQ", 8) if big else ("<HHLL", 4)
    start = len(head) + (8 if big else 2) + struct.calcsize(entry) * len(fields) + size
    directory = struct.pack("<Q" if big else "<H", len(fields))
    for tag, value in sorted(fields.items()):
        directory += struct.pack(entry, tag, 4, 1 if value else len(content) // 4, value or start)
    return head + directory + bytes(size) + content


def overlapping(strips: int, size: int) -> bytes:
    """A TIFF of strips that are all the same bytes, each with its own place and size in a list."""
    lists = struct.pack("<L", 122 + 8 * strips) * strips, struct.pack("<L", size) * strips
    data = tiff({259: 7, 273: 122, 278: 1, 279: 122 + 4 * strips}, b"".join(lists) + b"\xff" * size, side=5000)
    for tag, place in ((273, 122), (279, 122 + 4 * strips)):
        data = data.replace(struct.pack("<HHLL", tag, 4, 1, place), struct.pack("<HHLL", tag, 4, strips, place))
    return data


SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"  # of one component, without data
END = b"\xff\xd9"
N = 6 * 2**20 - 2000  # about what a request may have
PARTS, PASSES = "too many parts", "more than 20 passes over 1000000 pixels"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "passes": (lambda: jpeg(SCAN * 8_000, END, 1000, progressive=True), PASSES),
    "few passes over many pixels": (lambda: jpeg(SCAN * 20, END, 7000, progressive=True), "more than 20 passes"),
    "passes of a small one": (lambda: jpeg(SCAN * 600_000, END, progressive=True), "more than 100 passes"),
    "passes, not progressive": (lambda: jpeg(SCAN * 8_000, END, 1000), PASSES),
    "passes, filled": (lambda: jpeg((b"\xff" * 9 + SCAN) * 8_000, END, 1000, progressive=True), PASSES),
    "passes after a false end": (lambda: jpeg(b"\xff\xfe\0\4" + END + SCAN * 8_000, END, 1000), PASSES),
    "passes in what has no length": (
        lambda: jpeg(b"\xff\x02\xff\xff" + SCAN * 6_000, END, 1000, progressive=True),
        PASSES,
    ),
    "comments": (lambda: jpeg(b"\xff\xfe\0\2" * (N // 4)), PARTS),
    "application segments": (lambda: jpeg(b"\xff\xe2\0\2" * (N // 4)), PARTS),
    "fill bytes": (lambda: jpeg(b"\xff" * N), PARTS),
    "tables": (lambda: jpeg((b"\xff\xdb\0\x43\0" + b"\1" * 64) * (N // 69)), PARTS),
    "unknown chunks": (lambda: png(chunk(b"abCd", b"") * (N // 12)), PARTS),
    "unknown chunks at the end": (lambda: png(chunk(b"abCd", b"") * (N // 12), b"IEND"), PARTS),
    "palettes": (lambda: png(chunk(b"PLTE", bytes(3)) * (N // 15)), PARTS),
    "empty pixels": (lambda: png(chunk(b"IDAT", b"") * (N // 12)), PARTS),
    "runs": (lambda: bmp(7000, 1, b"\1\7" * (N // 2)), "run-length encoding"),
    "runs of four bits": (lambda: bmp(7000, 2, b"\xff\7" * (N // 2)), "run-length encoding"),
    "ends of lines": (lambda: bmp(7000, 1, b"\1\7\0\0" * 7000), "run-length encoding"),
    "strips": (lambda: tiff({273: 0, 278: 1, 279: 7}, bytes(4_000_000), side=7000), "more than 65536 strips or tiles"),
    "fewer strips": (
        lambda: tiff({273: 0, 278: 1, 279: 7}, bytes(90_000), side=7000),
        "22500 strips or tiles in 90122",
    ),
    "tiles": (lambda: tiff({322: 1, 323: 1, 324: 0, 325: 1}, bytes(N), side=7000), "more than 65536 strips or tiles"),
    "strips of a big file": (lambda: tiff({273: 0, 278: 1}, bytes(N), big=True, side=7000), "more than 65536 strips"),
    "a tile that is larger": (
        lambda: tiff({259: 8, 322: 2**13, 323: 2**13, 324: 150, 325: 999_999}, zlib.compress(bytes(2**26), 1)),
        "tiles of 67108864 pixels",
    ),
    "passes in a strip": (
        lambda: tiff({259: 7, 273: 122, 278: 2**32 - 1, 279: 294_290}, jpeg(SCAN * 99, END, 5000), side=5000),
        "more than 20 passes over 25000000 pixels",
    ),
    "passes in a strip of no size": (  # for libtiff to reckon
        lambda: tiff({259: 7, 273: 122, 278: 2**32 - 1, 279: 294_290}, jpeg(SCAN * 99, END, 5000), side=5000).replace(
            struct.pack("<HHLL", 279, 4, 1, 294_290), struct.pack("<HHLL", 279, 4, 1, 0)
        ),
        "more than 20 passes over 25000000 pixels",
    ),
    "strips that lie on one another": (lambda: overlapping(60_000, 100_000), "the image is damaged"),
    "strips that are all the same": (
        lambda: tiff({259: 7, 273: 0, 278: 1}, struct.pack("<L", 150) * 60_000 + SCAN * 9, side=5000),
        "more than 500000 passes over 5000 pixels",
    ),
    "a field twice": (lambda: tiff({322: 16, 323: 16, 324: 8, 325: 8}).replace(b"\x43\1", b"\x42\1"), "field twice"),
    "fields": (lambda: tiff(dict.fromkeys(range(1000, 60_000), 7)), PARTS),
}
BOMB = zlib.compress(bytes(2**20), 9)
EXTRAS = (
    chunk(b"iCCP", b"k\0\0" + BOMB), chunk(b"zTXt", b"k\0\0" + BOMB), chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
    chunk(b"fcTL", bytes(26)), chunk(b"fdAT", bytes(1000)), chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0") * 40,
    chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
)  # fmt: skip


@pytest.mark.parametrize("extra", range(len(EXTRAS)))
@pytest.mark.parametrize("mark", [b"IDAT", b"IEND"])
def test_what_a_png_needs_not_is_not_unpacked(extra: int, mark: bytes) -> None:
    """Six megabytes of colour profiles took two minutes, as Pillow unpacks 1 MiB for each."""
    data = png(EXTRAS[extra] * (N // len(EXTRAS[extra])), mark)
    begun = time.thread_time()
    try:
        assert np.array_equal(imaging.decode(data), np.asarray(picture()))
    except bounds.ImageError as error:
        assert "too many parts" in str(error)  # noqa: PT017
    assert time.thread_time() - begun < 1


@pytest.mark.parametrize("name", HOSTILE)
def test_work_is_refused_before_it_is_done(name: str) -> None:
    """Each took from four seconds to an hour of a decoder, or gigabytes, in the size that a request may have."""
    make, message = HOSTILE[name]
    data = make()
    assert len(data) <= 6 * 2**20
    begun = time.thread_time()
    with pytest.raises(bounds.ImageError, match=message):
        imaging.decode(data, 50_000_000, 100)
    assert time.thread_time() - begun < 1


def test_usual_pictures_are_far_from_the_limits() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8))
    video = np.random.default_rng(1).bytes(3_000_000) + SCAN * 9_000  # that a phone puts behind its picture
    pictures = [
        encoded(noise, "JPEG", progressive=True),
        encoded(noise, "JPEG", progressive=True) + video,
        encoded(noise, "JPEG", exif=exif(6)) + video,
        encoded(noise, "JPEG", comment=video[:60_000]),
        encoded(noise, "MPO", save_all=True, append_images=[noise] * 3),
        encoded(noise, "PNG", compress_level=0),
        encoded(noise, "TIFF", strip_size=1),
        encoded(noise, "TIFF", compression="jpeg", strip_size=8 * 2400),
        encoded(noise, "TIFF", compression="tiff_adobe_deflate", big_tiff=True),
        encoded(noise, "WEBP", save_all=True, append_images=[noise] * 3),
    ]
    for data in pictures:
        assert imaging.decode(data).shape[2] == 3
    passes = jpeg(SCAN * 14, END, 1000, progressive=True)
    assert imaging.decode(passes).shape == (1000, 1000, 3)


def test_what_others_write_beside_a_picture_is_no_work() -> None:
    """Pages of a scan, what follows the end of a file, pixels in many small chunks, large colour profiles."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    pages = {"save_all": True, "append_images": [noise] * 119}
    small = encoded(noise, "PNG", compress_level=0)
    place, size = small.index(b"IDAT") - 4, int.from_bytes(small[small.index(b"IDAT") - 4 :][:4], "big")
    pixels = small[place + 8 : place + 8 + size]
    pieces = b"".join(chunk(b"IDAT", pixels[start : start + 200]) for start in range(0, size, 200))
    pictures = [
        encoded(noise, "TIFF", compression="jpeg", **pages),
        encoded(noise, "TIFF", compression="jpeg", strip_size=16 * 1200, **pages),
        small + bytes(2_000_000),
        small[:place] + pieces + small[place + 12 + size :],
        encoded(noise, "JPEG") + encoded(noise, "JPEG", progressive=True) * 30,
        encoded(noise.convert("CMYK"), "JPEG", progressive=True),
        encoded(noise, "JPEG", icc_profile=bytes(3_000_000)),
        encoded(noise, "PNG", icc_profile=np.random.default_rng(1).bytes(900_000)),
    ]
    for data in pictures:
        assert imaging.decode(data, 50_000_000, 100).shape == (300, 400, 3)


@pytest.mark.parametrize("mark", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("name", [b"zTXt", b"tEXt", b"iTXt"])
def test_orientation_in_the_texts_of_a_png(name: bytes, mark: bytes) -> None:
    raw = exif(6).tobytes()
    profile = b"\nexif\n%8d\n%s\n" % (len(raw), raw.hex().encode())
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    texts = {
        b"zTXt": b"Raw profile type exif\0\0" + zlib.compress(profile),
        b"tEXt": b"Raw profile type exif\0" + profile,
        b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + xmp,
    }
    turned = np.asarray(picture().transpose(Image.Transpose.ROTATE_270))
    others = chunk(name, b"Comment\0\0\0\0\0\0") * 9  # that nobody reads
    assert np.array_equal(imaging.decode(png(others + chunk(name, texts[name]), mark)), turned)


@pytest.mark.filterwarnings("ignore")
def test_fields_that_all_point_at_the_same_bytes_cost_no_memory() -> None:
    """Of the EXIF of a picture of 5 MB, Pillow before 13 kept a copy for each: 6 GB."""
    fields = b"".join(struct.pack("<HHLL", 1000 + number, 1, 5_000_000, 8) for number in range(100))
    directory = b"II*\0\x08\0\0\0" + struct.pack("<H", 100) + fields + bytes(4)
    data = png(chunk(b"eXIf", directory.ljust(5_000_008, b"\0")))
    tracemalloc.start()
    try:
        assert imaging.decode(data).shape == np.asarray(picture()).shape
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data)
    finally:
        tracemalloc.stop()


def test_a_directory_costs_no_more_memory_than_its_file() -> None:
    data = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60) + bytes(N)
    tracemalloc.start()
    try:
        with pytest.raises(bounds.ImageError, match="field twice"):
            imaging.decode(data)
        assert tracemalloc.get_traced_memory()[1] < len(data)
    finally:
        tracemalloc.stop()


def exif(orientation: int) -> Image.Exif:
    fields = Image.Exif()
    fields[0x0112] = orientation
    return fields


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "PNG"])
def test_orientation_is_applied_once_in_every_format(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    turned = encoded(picture().transpose(Image.Transpose.ROTATE_90), kind, exif=exif(6), **options)
    assert np.abs(imaging.decode(turned).astype(int) - np.asarray(picture())).mean() < 5


def test_large_transparent_pictures_are_blended_like_small_ones() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1000, 4), dtype=np.uint8)  # more than one strip
    whole = imaging.decode(encoded(Image.fromarray(pixels)))
    assert np.array_equal(whole[1400:], imaging.decode(encoded(Image.fromarray(pixels[1400:]))))


def test_bytes_that_are_read_again_and_again_are_metered() -> None:
    """A directory of a TIFF may point at the same bytes many times (Pillow before 13 kept a copy for each)."""
    stream = bounds._Metered(bytes(2**20))
    for _ in range(5):
        stream.seek(0)
        stream.read()
    with pytest.raises(bounds.ImageError, match="too many parts"):
        stream.seek(0) or stream.read()
