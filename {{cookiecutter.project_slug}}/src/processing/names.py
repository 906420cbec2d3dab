"""The names that folders and tables give to splits: words, short ones, and names that say more than such a word."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

LONG = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
        "dev": "validation", "devel": "validation", "eval": "validation", "evaluation": "validation", "test": "test",
        "testing": "test", "trainval": "train"}  # fmt: skip
SHORT = {"tr": "train", "trn": "train", "tra": "train", "va": "validation", "vl": "validation", "vld": "validation",
         "te": "test", "ts": "test", "tes": "test", "tst": "test"}  # some are languages too  # fmt: skip
WORDS = LONG | SHORT
# Any of these words, in a name that may say more, as seg_train or TestSet do; and in one that runs on, as trainA does.
NAMED = re.compile(rf"(|.*[^a-z])({'|'.join(WORDS)})(|(?:[^a-z]|set|data|images|split).*)")
LOOSE = re.compile(rf"(.*?)({'|'.join(sorted(LONG, key=len, reverse=True))})(.*)")
NOISE = re.compile("[^a-z]|(data)?sets?|data|images?|imgs?|pictures?|photos?|jpe?gs?|splits?")  # more that says nothing
BESIDE = re.compile("masks?|annotations?|groundtruths?|segmentation(s|class|object)?")  # of pictures, for another task
FOLD = re.compile(r"(fold|split|part|partition)[^a-z]*\d+")


def divisions(names: Sequence[str]) -> list[dict[str, str]]:
    """Which of some folders are splits: train and another one, with the same words around; or only train.

    Of several data sets each has its own.
    """
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        if match := word_in(name, loose=len(names) > 1):
            groups.setdefault((NOISE.sub("", match[1]), NOISE.sub("", match[3])), {})[name] = match[2]
    found = []
    for words in groups.values():
        if len(words) < len(names) and all(name.lower() in SHORT for name in words):
            continue  # tr and te beside others may be languages
        splits = {name: WORDS[word] for name, word in words.items()}
        spare = [name for name, word in words.items() if word in ("eval", "evaluation")]
        if "test" not in splits.values() and any(splits[name] == "validation" for name in {*splits} - {*spare}):
            splits |= dict.fromkeys(spare, "test")  # beside another validation folder
        if "train" in splits.values() and (len({*splits.values()}) > 1 or len(names) == 1):
            found.append(splits)
    return found


def says_no_class(name: str) -> bool:
    """Whether a folder has a name like `images`, or that of a split."""
    return bool(word_in(name)) or not NOISE.sub("", name.lower())


def are_none(names: Collection[str]) -> bool:
    """Whether folders hold pictures, and masks or the like of these, in place of classes."""
    beside = {name for name in names if BESIDE.fullmatch(NOISE.sub("", name.lower()))}
    return bool(beside) and bool(rest := {*names} - beside) and all(map(says_no_class, rest))


def word_in(name: str, loose: bool = False) -> re.Match[str] | None:
    """The word of `WORDS` in a name, with what stands before and after it; `loose`: also where the name runs on."""
    low = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()  # TrainSet as train_set
    return NAMED.fullmatch(low) or (LOOSE.fullmatch(low) if loose else None)
