"""Find the images of a raw folder or of a table, and the splits that it has ready."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from processing.names import FOLD, LONG, WORDS, are_none, divisions, says_no_class, word_in
from progress import plain
from training.config import shown

SPLITS = ("train", "validation", "test")
JUNK = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN")  # beginnings of names
TABLES, SEEN = (".csv", ".tsv", ".txt"), 20  # ends of names; and rows that are looked at where no head says path
# Heads of a table's columns, in small letters and nothing else; of several the first of these counts.
COLUMNS = {
    "path": ("path", "filepath", "imagepath", "filename", "imagename", "file", "image", "img", "imageid", "id", "name"),
    "label": ("label", "labelname", "classname", "class", "category", "labels", "target", "labelid", "classid", "y"),
    "split": ("split", "subset", "partition", "set", "phase", "usage"),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LEAVES = "a link that leads out of the folder"


class PackingError(ValueError):
    """The folder cannot be packed; the message names the offender and the fix."""


@dataclass(frozen=True)
class Item:
    """One image file: its place in the input and the class and ready-made split that the place gives it."""

    path: str  # relative to the input, with forward slashes
    label: str
    split: str | None


def scan(folder: Path) -> tuple[list[Item], list[str]]:
    """Find every image below `folder`, in a fixed order, and say of every other file why it was left out.

    Hidden files do not count; links inside the folder are followed.

    Raises:
        PackingError: when there is no folder, no image, a class without one, or fewer than two classes.
    """
    if not folder.is_dir():
        raise PackingError(f"{folder} is no folder; DATA must name one with a sub-folder of images per class")
    home = folder.resolve()
    base, ready_made = _find_splits(folder, home)
    items, empty = list[Item](), list[str]()
    left_out = [f"{_join(base, name)}: is none of the splits {', '.join(ready_made)}"
                for name in _entries(folder / base, home)[0] if ready_made and name not in ready_made]  # fmt: skip
    for place, split in ready_made.items() or [("", None)]:
        place = _join(base, place)
        while ready_made and len(own := _entries(folder / place, home)[0]) == 1 and says_no_class(own[0]):
            place = _join(place, own[0])
        labels, files, others, leaving = _entries(folder / place, home)
        left_out += [f"{_join(place, name)}: {LEAVES}" for name in leaving]
        left_out += [f"{_join(place, name)}: lies outside of the class folders" for name in files + others]
        for name in labels:
            start = _join(place, name)
            found = list(images(folder, start, left_out))
            parts = [path[len(start) + 1 :].split("/") for path in found]
            inner = {} if ready_made else _ready_made(sorted({below[0] for below in parts if below[1:]}))
            if any(below[2:] and below[0] in inner for below in parts):
                raise PackingError(f"{folder / start} holds splits ({', '.join(inner)}), and so is no class; "
                                   "name it as DATA, or take away what lies beside it")  # fmt: skip
            items += [Item(path, _label(name), split or inner.get(below[0]))
                      for path, below in zip(found, parts, strict=True)]  # fmt: skip
            if not found and split in (None, "train"):
                empty.append(start)
    wanted = f"expected {folder}/{'<split>/' * bool(ready_made)}<class>/<image>, with {' '.join(SUFFIXES)}"
    if not items:
        raise PackingError(f"{folder} holds no image in class folders; {wanted}{_first(left_out)}")
    if empty:
        raise PackingError(f"class folder {empty[0]!r} holds no image; add some, or remove it{_first(left_out)}")
    _check_classes(folder, items, wanted)
    return items, left_out


def _check_classes(source: Path, items: Sequence[Item], wanted: str) -> None:
    classes = {item.label for item in items}
    if len(classes) < 2:
        places = {str(Path(item.path).parent) for item in items}
        if not items[0].split and source.is_dir() and (inner := os.path.commonpath(places)) not in places:
            wanted = f"if the folders in {source / inner} are the classes, name that as DATA"
        raise PackingError(f"{source} holds one class, {classes.pop()!r}; a classifier needs two or more; {wanted}")
    if are_none(classes):
        names = ", ".join(map(repr, sorted(classes)))
        raise PackingError(f"{source} holds {names}: pictures and what belongs to them, not classes; {wanted}")


def read_table(table: Path) -> tuple[list[Item], list[str]]:
    """Read a CSV file of paths, relative to it, labels and perhaps splits: the images, and what is wrong in which row.

    Raises:
        PackingError: when it is no such table, or has fewer than two classes.
    """
    data, home = table.read_bytes(), table.parent.resolve()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        text = re.sub(r"\Asep=.\r?\n", "", text)  # which Excel reads, and hides
        head = text.partition("\n")[0]
        mark = max(",;\t|", key=head.count) if re.search("[,;\t|]", head) else " "
        cells = csv.reader(io.StringIO(text, newline=None), delimiter=mark, skipinitialspace=True)
        rows = [[cell.strip() for cell in row] for row in cells]
    except (UnicodeError, csv.Error) as error:
        raise PackingError(f"{table} is no table in UTF-8 ({error}); save it as CSV UTF-8") from error
    heads = [re.sub("[^a-z]", "", cell.lower()) for cell in rows[0]] if rows else []
    places = {name: next((heads.index(word) for word in words if word in heads), -1) for name, words in COLUMNS.items()}
    if places["path"] < 0:  # or the first column that names a file, whatever its head
        places["path"] = next((place for row in rows[:SEEN] for place, cell in enumerate(row) if _file(home, cell)), -1)
    for place, head in enumerate(heads):
        if flag := re.fullmatch("is(train|valid|val|validation|test)", head):  # true or false, as fastai's is_valid
            rest = "test" if flag[1] == "train" else "train"
            for row in rows[1:]:
                part = row[place : place + 1]
                row[place : place + 1] = [flag[1] if cell.lower() in ("true", "1", "yes") else rest for cell in part]
    for place in range(len(heads) * (places["split"] < 0)):  # or one that names nothing but splits, whatever its head
        said = {WORDS[word[2]] if (word := word_in(row[place])) else "" for row in rows[1:] if row[place:]}
        if place not in places.values() and "train" in said and len(said) > 1 and "" not in said:
            places["split"] = place
    headless = bool(rows and places["path"] >= 0 and _file(home, rows[0][places["path"]]))
    others = [place for place in range(len(heads)) if place not in (places["path"], places["split"])]
    if headless and 0 < len(others) < 3:
        places |= {"label": others[0], "split": others[-1] if others[1:] else places["split"]}
    elif places["label"] < 0 and len(others) == 1:
        places["label"] = others[0]
    if min(places["path"], places["label"]) < 0:
        seen = ", ".join(map(shown, rows[0] if rows else [])) or "none"
        raise PackingError(f"{table} has the columns {seen}; it needs path and label, and may have split")
    found: dict[str, tuple[int, Item]] = {}
    wrong: dict[int, str] = {}
    for number, row in enumerate(rows[0 if headless else 1 :], 1 if headless else 2):
        path, label, split = (row[place] if 0 <= place < len(row) else "" for place in places.values())
        named, file = word_in(split, loose=True), _file(home, path)
        if not any(row):
            continue
        if not path or not label:
            wrong[number] = f"it has no {'label' if path else 'path'}"
        elif split and not named:
            wrong[number] = f"the split {shown(split)} is none of train, validation, test"
        elif not file or leaves(file, home):
            wrong[number] = f"{shown(path)} is {'a place outside of the folder of the table' if file else 'no file'}"
        elif plain(label) != label:
            wrong[number] = f"the label {shown(label)} has characters that nobody sees or that change how text runs"
        else:
            item = Item(Path(os.path.relpath(file, home)).as_posix(), _label(label), WORDS[named[2]] if named else None)
            first, other = found.setdefault(item.path, (number, item))
            if other != item:
                wrong[number] = wrong[first] = f"rows {first} and {number} say different things of {path!r}"
    items = [item for number, item in found.values() if number not in wrong]
    lines = [f"row {number}: {reason}" for number, reason in sorted(wrong.items())]
    if not items:
        raise PackingError(f"{table} names no image with a label{_first(lines)}")
    _check_classes(table, items, "see the column of labels")
    return items, lines


def is_table(path: Path) -> bool:
    """Whether this is a table of labels, and no folder."""
    return path.suffix.lower() in TABLES and path.is_file()


def _file(home: Path, path: str) -> Path | None:
    """The file that a table names, with or without the end of its name."""
    name = path.replace("\\", "/")
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or with a NUL
        ends = ("", *SUFFIXES, *map(str.upper, SUFFIXES))
        return next((home / (name + end) for end in ends if (home / (name + end)).is_file()), None)
    return None


def _find_splits(folder: Path, home: Path) -> tuple[str, dict[str, str]]:
    """Where ready-made splits lie, in the folder or in one that it wraps, and which folder is which of them.

    Raises:
        PackingError: when folders look like splits, and cannot be used as such.
    """
    found, place = ("", dict[str, str]()), ""
    for _ in range(4):
        names = _entries(folder / place, home)[0]
        ready_made = _ready_made(names)
        found = (place, ready_made) if ready_made else found
        said = [name for name in names if name.lower() in LONG or FOLD.fullmatch(name.lower())]
        named = {name: WORDS[match[2]] for name in names if (match := word_in(name))}
        looked = names if ready_made else {*said, *named}
        inside = {name: _entries(folder / _join(place, name), home)[:2] for name in sorted(looked)}
        odd = [name for name, own in inside.items() if own[0] and not any(map(_is_image, own[1]))]
        if not {*said}.intersection(odd) and len({named.get(name) for name in odd}) < 2:
            odd = []
        flat = len(names) > 1 and any(LONG.get(name.lower(), "train") != "train" for name in said)
        if not found[1] and (odd or flat or len({LONG.get(name.lower()) for name in said}) > 1):
            raise PackingError(f"{folder / place} holds {', '.join(map(repr, odd or said))}, named like a split, but "
                               "no train folder with validation or test beside it; name them so, or put the images of "
                               "a class directly into its folder")  # fmt: skip
        classes = {label for name in ready_made for label in inside[name][0] if not says_no_class(label)}
        if twins := [name for name in inside if name not in ready_made and classes.intersection(inside[name][0])]:
            raise PackingError(f"{folder / place / twins[0]} looks like a split beside {', '.join(ready_made)}; "
                               "call it train, validation or test, or move it")  # fmt: skip
        if len(names) != 1:
            break
        place = _join(place, names[0])
    return found


def _ready_made(names: Sequence[str]) -> dict[str, str]:
    """Which of some folders are ready-made splits."""
    found = divisions(names)
    if len(found) > 1:
        raise PackingError(f"{' and '.join(', '.join(splits) for splits in found)} are splits of several data sets; "
                           "DATA must hold those of one")  # fmt: skip
    return found[0] if found else {}


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _entries(folder: Path, home: Path) -> tuple[list[str], list[str], list[str], list[str]]:
    """Names of a folder's folders, files (dangling links too), other things, links out of `home`; none is hidden."""
    listed: tuple[list[str], list[str], list[str], list[str]] = ([], [], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(JUNK):
                    listed[_kind(entry, home)].append(entry.name)
    except OSError as error:
        raise PackingError(f"{folder} cannot be listed: {error.strerror}") from error
    for names in listed:
        names.sort()
    return listed


def _kind(entry: os.DirEntry[str], home: Path) -> int:
    try:
        if entry.is_symlink() and leaves(Path(entry.path), home):
            return 3
        if entry.is_dir():
            return 0
        return 1 if entry.is_file() or not Path(entry.path).exists() else 2
    except OSError:  # a link to itself
        return 1


def leaves(link: Path, home: Path) -> bool:
    """Whether a link leads out of a folder, whose own path holds none: what it leads to was not meant to be shared."""
    try:
        return not link.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # a link to itself
        return False


def images(root: Path, start: str, left_out: list[str]) -> Iterator[str]:
    """Paths of the images below a class folder. A folder that links lead to twice, or into itself, counts once."""
    waiting, seen, home = [start], set(), root.resolve()
    while waiting:
        place = waiting.pop()
        facts = (root / place).stat()
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders, files, others, leaving = _entries(root / place, home)
        left_out += [f"{_join(place, name)}: {LEAVES}" for name in leaving]
        waiting += [_join(place, name) for name in reversed(folders)]
        left_out += [f"{_join(place, name)}: not a regular file" for name in others]
        for name in files:
            if _is_image(name):
                yield _join(place, name)
            else:
                left_out.append(f"{_join(place, name)}: not one of {' '.join(SUFFIXES)}")


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name


def _first(left_out: list[str]) -> str:
    return f" (left out: {left_out[0]!r}{' and more' if len(left_out) > 1 else ''})" if left_out else ""


def _label(name: str) -> str:
    """The class name: composed Unicode, so that macOS and Linux agree on it."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PackingError(f"class folder {name!r} has a name that is not valid UTF-8; rename it") from error
    if plain(name) != name:
        raise PackingError(f"class folder {name!r} has characters in its name that nobody sees or that change how text "
                           "runs; rename it")  # fmt: skip
    return unicodedata.normalize("NFC", name)
