"""Batches reach the device by three ways with the same bytes, and large data sets are shuffled in bounded memory."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import imaging
from processing.preprocess import pack
from training import feed as feed_module
from training.augment import draw
from training.config import Hyperparameters
from training.data import Split, epoch_order, load_split, window_rows
from training.feed import Feed

CPU = torch.device("cpu")
PLAIN = draw(100, 12, Hyperparameters(translate=0.0), 0)  # no augmentation


@pytest.fixture
def split(raw: Path, tmp_path: Path) -> Split:
    """In several shards."""
    pack(raw, tmp_path / "packed", shard_bytes=12 * 12 * 3 * 10)
    split = load_split(tmp_path / "packed" / "train")
    assert len(split.images) > 3
    return split


def whole_epoch(split: Split, batch_size: int = 5) -> list[NDArray[np.int64]]:
    order = epoch_order(len(split), 0, 0)
    return [order[first : first + batch_size] for first in range(0, len(split), batch_size)]


@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("gathered", [100, 5000, 1_000_000])
@pytest.mark.parametrize("mode", ["direct", "resident", "stream"])
def test_every_way_gives_the_same_batches(
    split: Split, mode: str, gathered: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "GATHERED", gathered)
    augmentation = draw(len(split), 12, Hyperparameters(horizontal_flip=True, colour_jitter=0.5), 0)
    shares = whole_epoch(split)
    batches = list(Feed(split, CPU, mode).batches(shares, augmentation, start))
    assert len(batches) == len(shares) - start
    for rows, (images, labels) in zip(shares[start:], batches, strict=True):
        alone = augmentation.apply(split.batch(rows, CPU)[0], rows)
        assert torch.equal(images, imaging.normalise(alone, split.info["mean"], split.info["std"]))
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(labels.numpy(), split.labels[rows])


def test_a_cpu_needs_no_thread_and_no_copy_of_the_data(split: Split) -> None:
    feed = Feed(split, CPU)
    assert feed.mode == "direct"
    before = threading.active_count()
    for _ in feed.batches([np.arange(3)], PLAIN):
        assert threading.active_count() == before


def test_a_cpu_prepares_no_more_than_it_was_told_together(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    record_rows(monkeypatch, taken)
    monkeypatch.setattr(feed_module, "GATHERED", 17 * 12 * 12 * 3)
    for images, _ in Feed(split, CPU).batches(whole_epoch(split), PLAIN):
        assert len(images) <= 5
    assert sum(taken) == len(split)
    assert max(taken) == 15


def record_rows(monkeypatch: pytest.MonkeyPatch, taken: list[int]) -> None:
    """Note how many rows are read at a time."""
    pixels = Split.pixels

    def noted(self: Split, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        taken.append(len(rows))
        return pixels(self, rows)

    monkeypatch.setattr(Split, "pixels", noted)


def test_a_stream_stays_a_few_batches_ahead_and_ends_with_its_reader(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    record_rows(monkeypatch, taken)
    batches = Feed(split, CPU, "stream").batches(whole_epoch(split, 1), PLAIN)
    next(batches)
    threading.Event().wait(0.3)
    assert 1 < len(taken) <= feed_module.AHEAD + 3 < len(split)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "feed"]


def test_an_error_in_the_stream_reaches_the_loop(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = Split.pixels
    monkeypatch.setattr(Split, "pixels", lambda self, rows: pixels(self, rows if rows[0] == 0 else rows + 10**6))
    batches = Feed(split, CPU, "stream").batches([np.array([0]), np.array([1])], PLAIN)
    next(batches)
    with pytest.raises(IndexError):
        next(batches)


def test_a_windowed_order_visits_every_row_once_and_few_places_at_a_time() -> None:
    images, window = 10_000, 1_000
    order = epoch_order(images, 3, 1, window)
    assert np.array_equal(np.sort(order), np.arange(images))
    assert np.array_equal(order, epoch_order(images, 3, 1, window))
    assert not np.array_equal(order, epoch_order(images, 3, 2, window))
    assert np.array_equal(epoch_order(50, 3, 1, 50), epoch_order(50, 3, 1))
    block = window // 64
    for first in range(0, images, window):
        places = np.unique(order[first : first + window] // block)
        assert len(places) <= 3 * window / block  # neighbours; 1,000 rows from anywhere would be on 514 of 667 places
    assert len(np.unique(epoch_order(images, 3, 1)[:window] // block)) > 3 * window / block
    assert np.corrcoef(np.arange(window), order[:window])[0, 1] < 0.2


def test_the_window_follows_its_setting(split: Split) -> None:
    assert window_rows(split, 12 * 12 * 3 * 7 / 1e9) == 7
    assert window_rows(split, 1e-12) == 1
