"""Bounds of what a picture that a stranger sent may cost before it is decoded, and while it is: work and memory.

And the bytes of a large body, which lie in a file: `Stored`.
"""

from __future__ import annotations

import ctypes
import functools
import io
import math
import mmap
import os
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

from PIL import Image, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
AGAIN = "save it again with another program"

# What a picture may ask of a decoder, far above what cameras and editors write: a few kB can ask for hours. A request
# may hold many pictures, so each limit follows the picture's size in bytes or pixels, or costs little beside them.
MAX_READS = 4000  # by which Pillow takes a header apart, and one more for each so many bytes of the rest:
BYTES_A_READ = 128
MAX_PASSES = 20  # of a progressive JPEG, where ten are usual; up to five times as many of a small one
MAX_STRIPS, BYTES_A_STRIP = 512, 64  # or tiles of a TIFF that is not compressed; more, if each has so many bytes
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")  # others can be bombs, and change no pixel, but
PNG_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # these may say which side is up

_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # of JPEG; 0 and the restart markers belong to the pixels


class ImageError(ValueError):
    """The bytes are not an image that this project can read; the message says why."""


class NoRoom(MemoryError):
    """There is no memory now for a picture that is within the limits; the message says how much it needs."""


PIECE = 2**20  # bytes of a body that are looked at, read or written at a time
IN_MEMORY = 2**23  # bytes of one which are kept in memory; more are in a file


class Stored(mmap.mmap):
    """Bytes in a file, which the system keeps in memory only as it likes; and what is asked of them as of `bytes`."""

    file: IO[bytes]

    def __new__(cls, file: IO[bytes]) -> Self:
        """Take a file, which goes when these bytes do; it has no name that would stay."""
        self = super().__new__(cls, file.fileno(), 0, access=mmap.ACCESS_READ)
        self.file = file
        return self

    def __del__(self) -> None:
        self.file.close()

    def startswith(self, prefix: bytes | tuple[bytes, ...], start: int = 0) -> bool:
        """As of bytes, for what is no longer than 64."""
        return self[start : start + 64].startswith(prefix)

    def count(self, part: bytes, start: int = 0, end: int = sys.maxsize) -> int:
        """As of bytes."""
        return sum(1 for _ in re.compile(re.escape(part)).finditer(self, start, end))


Data = bytes | Stored


def pieces(data: Data, start: int = 0, end: int = sys.maxsize) -> Iterator[bytes]:
    """A part of a body, in pieces that are small."""
    end = min(end, len(data))
    return (data[place : min(place + PIECE, end)] for place in range(start, end, PIECE))


def stored(parts: Iterable[bytes]) -> Data:
    """All parts as one, which are never all in memory where they are large.

    Raises:
        NoRoom: the disk has none for them.
    """
    waiting, size, file = [], 0, None
    with ExitStack() as failing:
        try:
            for part in parts:
                waiting.append(part)
                size += len(part)
                if size > IN_MEMORY:
                    file = file or failing.enter_context(tempfile.TemporaryFile())
                    file.writelines(waiting)
                    waiting.clear()
            if not file:
                return b"".join(waiting)
            file.flush()
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise NoRoom(f"what has more than {IN_MEMORY} bytes is kept in a file: {why}") from error
        failing.pop_all()
    return Stored(file)


class _Metered(io.BufferedReader):
    """Bytes that can be read so many times only: whatever loop over the parts of a file Pillow has, it ends."""

    def __init__(self, data: Data) -> None:
        super().__init__(io.BytesIO(data) if isinstance(data, bytes) else io.FileIO(os.dup(data.file.fileno())))
        self.seek(0)
        self.reads, self.bytes = MAX_READS, 4 * len(data) + 2**20  # what is left of them

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.reads, self.bytes = self.reads - 1, self.bytes - len(data)
        if self.reads < 0 or self.bytes < 0:
            raise ImageError(f"the image consists of too many parts; {AGAIN}")
        return data


@contextmanager
def opened(data: Data) -> Iterator[ImageFile.ImageFile]:
    """Pillow's image of which the header is read, and no pixel; an ImageError where that alone is too much work."""
    if data.startswith(b"\x89PNG"):
        data = _without_extras(data)
    elif data[:2] in (b"II", b"MM"):
        _check_directory(data)
    with _Metered(data) as stream, Image.open(stream, formats=FORMATS) as image:
        if len(image.tile) > max(MAX_STRIPS, len(data) // BYTES_A_STRIP):
            raise ImageError(f"the image has {len(image.tile)} strips or tiles in {len(data)} bytes; {AGAIN}")
        stream.reads += len(data) // BYTES_A_READ + 4 * len(image.tile)
        yield image


def _without_extras(data: Data) -> Data:
    """A PNG file with nothing but what its pixels need."""
    kept, place, texts = [(0, 8)], 8, 4
    for _ in range(MAX_READS + len(data) // BYTES_A_READ):
        end, name = place + 12 + int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        texts -= (text := texts > 0 and data.startswith(PNG_TEXTS, place + 8))
        if text or name in PNG_CHUNKS:
            kept.append((place, end))
        if (place := end) >= len(data) or name == b"IEND":
            return stored(piece for span in kept for piece in pieces(data, *span))
    raise ImageError(f"the image consists of too many parts; {AGAIN}")


def _check_directory(data: Data) -> None:
    """Refuse a TIFF whose first directory Pillow would not read as libtiff does, or names very many strips or tiles."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+"
    offset, first, field = (f"{order}Q", 8, f"{order}HHQ8x") if big else (f"{order}L", 4, f"{order}HHL4x")
    try:
        (start,) = struct.unpack_from(offset, data, first)
        (count,) = struct.unpack_from(offset if big else f"{order}H", data, start)
    except (struct.error, OverflowError):
        return  # for Pillow to refuse
    start, size = start + (8 if big else 2), struct.calcsize(field)
    fields = data[start : start + min(count, MAX_READS) * size]
    entries = [*struct.iter_unpack(field, fields[: len(fields) // size * size])]
    if len({tag for tag, _, _ in entries}) < len(entries):  # one takes the first of them, the other the last
        raise ImageError(f"the image has a field twice; {AGAIN}")
    if any(number > 2**16 for tag, _, number in entries if tag in (273, 324)):
        raise ImageError(f"the image has more than {2**16} strips or tiles; {AGAIN}")


def check_work(image: ImageFile.ImageFile, data: Data) -> None:
    """Refuse what would keep a decoder busy for long although the image is small enough."""
    if image.tile and image.tile[0].codec_name == "bmp_rle":  # Pillow decodes it in Python, pixel by pixel
        raise ImageError(f"a BMP with run-length encoding is not supported; {AGAIN}")
    pixels, tags = image.width * image.height, getattr(image, "tag_v2", {})
    part = tags[322] * tags[323] if 322 in tags else min(tags.get(278, image.height), image.height) * image.width
    if part > max(pixels, 2**20):  # a tile may be larger than its image
        raise ImageError(f"the image has tiles of {part} pixels; {AGAIN}")
    if image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression")):
        limit = MAX_PASSES * min(max(2**18 // part, 1), 5) * math.ceil(pixels / part)
        if (_scans_of_strips(data, tags) if tags else _scans(data, limit)) > limit:
            raise ImageError(f"the image has more than {limit} passes over {part} pixels; {AGAIN}")


def _scans(data: Data, limit: int) -> int:
    """How many passes a JPEG has: scans outside of other segments, and before what may follow the image."""
    scans, place = 0, 2
    while scans <= limit and (marker := _MARKER.search(data, place)):
        code, place = marker[1][0], marker.end()
        if code == 0xD9 and scans:  # the end of the image
            break
        scans += code == 0xDA
        if code >= 0xC0 and code not in (0xD8, 0xD9):  # others have no segment
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


def _scans_of_strips(data: Data, tags: Mapping[int, Any]) -> int:
    """How many passes the strips or tiles of a TIFF's first image have at most; other pages do not count."""
    places, sizes = ([*tags.get(strips, ()), *tags.get(tiles, ())] for strips, tiles in ((273, 324), (279, 325)))
    if len(places) != len(sizes) or 0 in sizes or sum(sizes) > 2 * len(data):  # each may be anything
        return len(places) * data.count(b"\xff\xda")
    return sum(data.count(b"\xff\xda", place, place + size) for place, size in zip(places, sizes, strict=True))


BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}  # that Pillow keeps of a pixel, by its mode; four of others
WEBP_BYTES = 16  # of a pixel, while it is decoded
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
SPARE = 8  # one part of so many of this process's memory is left for everything else, bodies that wait among them
LARGE = 2**25  # bytes, from which on freed memory goes back to the system: the heap would keep it in pieces


def memory_of(image: ImageFile.ImageFile, data: Data, deep: bool) -> int:
    """Bytes that decoding an image takes at most, with the array that it becomes; `deep` says that it takes two ways.

    Measured with Pillow 12, libjpeg-turbo, libwebp and libtiff: the growth of a process that decoded one of each kind.
    """
    held = WEBP_BYTES if image.format == "WEBP" else BYTES.get(image.mode, 4)
    if image.format == "TIFF":  # of whose EXIF Pillow may make another image
        held *= 2
    elif image.format in ("JPEG", "MPO") and _scans(data, 1) > 1:  # whose coefficients are kept until the last one
        held += 2 * len(image.getbands())
    return image.width * image.height * (held + (9 if deep else 6 if image.mode[0] in "IF" else 3))


_libc = functools.cache(lambda: ctypes.CDLL(None))


class Room:
    """The memory that all pictures which are being decoded have together, of all threads.

    Args:
        total: bytes; None: what this process may use and does not yet, when the first picture comes.
    """

    def __init__(self, total: int | None = None) -> None:
        self._total, self._taken, self._changed = total, 0, threading.Condition()

    def take(self, size: int, seconds: float | None) -> None:
        """Take so many bytes, once they are free; None: however long that takes.

        Raises:
            NoRoom: they are not within so many seconds, or can never be.
        """
        with self._changed:
            if self._total is None:
                self._total = unused()
            total = self._total
            if size > total or not self._changed.wait_for(lambda: self._taken + size <= total, seconds):
                there = f"{'there are' if size > total else 'other pictures take some of'} {total / 1e6:.0f} MB"
                raise NoRoom(f"decoding the image takes {size / 1e6:.0f} MB of memory, and {there} for pictures; "
                             "send a smaller one, or try again")  # fmt: skip
            self._taken += size

    def give(self, size: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._taken -= size
            self._changed.notify_all()
        if size >= LARGE:
            with suppress(OSError, AttributeError):  # other systems have no such function, and need none
                _libc().malloc_trim(0)


ROOM = Room()


def unused() -> int:
    """Bytes of memory that this process may still use, by its container's limit or this machine's size."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in LIMITS:
        with suppress(OSError, ValueError):  # no such file, or `max`
            limit = min(limit, int(Path(name).read_text(encoding="ascii")))
    used = 0
    with suppress(OSError):  # only Linux says it there
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return max(limit - limit // SPARE - used, 0)
