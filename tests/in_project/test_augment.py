"""Augmentation: each does what it says, for a sample alone, and switching one on leaves the others as they were."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from imaging import normalise
from tests.test_loop import same, train
from training import augment, feed
from training.augment import Augmentation
from training.config import ConfigurationError, Hyperparameters

OFF: dict[str, Any] = {"translate": 0.0, "horizontal_flip": False}
ALL: dict[str, dict[str, Any]] = {
    "flips": {"horizontal_flip": True},
    "shifts": {"translate": 0.125},
    "crops": {"crop_scale": 0.3},
    "colours": {"colour_jitter": 0.4},
    "holes": {"erase": 0.5},
    "turns": {"rotate": 30.0},
    "operations": {"augment": "trivial"},
}
TOGETHER: dict[str, Any] = {name: value for options in ALL.values() for name, value in options.items()}
ROWS = np.arange(200)


def drawn(samples: int = 200, size: int = 24, epoch: int = 1, **options: Any) -> Augmentation:
    return augment.draw(samples, size, Hyperparameters(**OFF | options), epoch)


def pictures(count: int = 200, size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def equal(first: Augmentation, second: Augmentation, *names: str) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


def test_all_off_is_the_same_object() -> None:
    images, labels = pictures(3), torch.tensor([0, 1, 2])
    choices = drawn()
    assert all(len(getattr(choices, field.name)) == 0 for field in fields(choices))
    assert choices.apply(images, ROWS[:3]) is images
    floats = normalise(images, [0.5] * 3, [0.2] * 3)
    mixed = feed.mix(floats, labels, 3, Hyperparameters(), 0, 0, 0)
    assert mixed[0] is floats
    assert mixed[1] is labels


def test_shifts_and_flips_are_drawn_as_ever() -> None:
    random = np.random.default_rng([3, 2, 1])
    shifts, flips = random.integers(-4, 4, size=(100, 2), endpoint=True), random.random(100) < 0.5
    choices = augment.draw(100, 32, Hyperparameters(horizontal_flip=True, seed=3), 2)
    assert np.array_equal(choices.shifts, shifts)
    assert np.array_equal(choices.flips, flips)


@pytest.mark.parametrize("name", ALL)
def test_streams_are_independent(name: str) -> None:
    together = drawn(**TOGETHER)
    stream = ALL["shifts"] if name == "flips" else {}  # the flips follow the shifts in one stream
    assert equal(drawn(**ALL[name] | stream), together, name)
    others = {key: value for options in ALL.values() if options is not ALL[name] for key, value in options.items()}
    assert len(getattr(drawn(**others), name)) == 0
    assert equal(drawn(**others), together, *(ALL.keys() - {name, "flips" if name == "shifts" else name}))
    for other in (drawn(**TOGETHER, seed=1), drawn(**TOGETHER, epoch=2)):
        assert not equal(together, other, name)


@pytest.mark.parametrize("options", [*ALL.values(), TOGETHER])
def test_a_sample_is_augmented_alike_in_any_batch_on_any_rank(options: dict[str, Any]) -> None:
    images, choices = pictures(), drawn(**options)
    before = images.clone()
    together = choices.apply(images, ROWS)
    assert torch.equal(images, before)
    assert not torch.equal(together.float(), images.float())
    for rank in range(2):
        own = ROWS[rank::2]
        assert torch.equal(choices.apply(images[own], own), together[own])
    assert torch.equal(choices.apply(images[[7]], ROWS[[7]]), together[[7]])
    assert normalise(together, [0.5] * 3, [0.2] * 3).isfinite().all()


def test_every_operation_is_drawn_with_every_strength() -> None:
    choices = drawn(20_000, augment="trivial")
    assert set(choices.operations) == set(range(augment.OPERATIONS))
    assert set(np.rint(30 * choices.strengths)) == set(range(-30, 31))
    assert np.bincount(choices.operations).min() > 1200
    turned = drawn(20_000, rotate=30.0).turns
    assert np.degrees([turned.min(), turned.max()]) == pytest.approx([-30, 30], abs=0.1)


def operate(number: int, strength: float, images: torch.Tensor) -> torch.Tensor:
    rows = np.full(len(images), number)
    return augment._operate(images, rows, np.full(len(images), strength))


SHEAR_RIGHT, SHEAR_DOWN, RIGHT, DOWN, TURN = range(5)
BRIGHT, CONTRAST, COLOUR, SHARP, POSTER, SOLAR, STRETCH, EQUAL, NOTHING = range(5, 14)


@pytest.mark.parametrize("size", [3, 17, 32])
@pytest.mark.parametrize("strength", [-1.0, -0.4, 0.0, 0.2, 1.0])
def test_operations_do_what_torchvisions_do(strength: float, size: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    images = pictures(40, size)
    images[:10] = images[:10] // 8 + 40  # of little contrast
    images[10:14] = 77  # of one colour
    images[14, :, :, 1] = 0
    theirs = images.permute(0, 3, 1, 2)
    wanted = {
        BRIGHT: transforms.adjust_brightness(theirs, 1 + 0.99 * strength),
        COLOUR: transforms.adjust_saturation(theirs, 1 + 0.99 * strength),
        SHARP: transforms.adjust_sharpness(theirs, 1 + 0.99 * strength),
        POSTER: transforms.posterize(theirs, 8 - round(6 * abs(strength))),
        SOLAR: transforms.solarize(theirs, 255 * (1 - abs(strength))),
        STRETCH: transforms.autocontrast(theirs),
        EQUAL: transforms.equalize(theirs),
        NOTHING: theirs,
    }
    for number, result in wanted.items():
        ours = operate(number, strength, images).permute(0, 3, 1, 2)
        rounded = number in (BRIGHT, COLOUR, SHARP, STRETCH)  # here; there cut off, some of it twice
        assert (ours.int() - result.int()).abs().max() <= 2 * rounded, number
    for number in range(13):
        changed = operate(number, strength, images)
        assert (changed.dtype, changed.shape) == (torch.uint8, images.shape)
        alone = operate(number, strength, images[[5]])
        assert torch.equal(changed[5], alone[0])


def test_moves_go_where_they_say() -> None:
    images = pictures(4, 9)
    assert torch.equal(operate(DOWN, 2 / 9, images)[:, :-2], images[:, 2:])
    assert torch.equal(operate(RIGHT, -2 / 9, images)[:, :, 2:], images[:, :, :-2])
    assert not operate(RIGHT, 1.0, images).any()  # no more than out of the picture
    quarter = augment.warp(images, augment.motion(turn=np.full(4, np.pi / 2)))
    assert torch.equal(quarter, images.rot90(1, (1, 2))) or torch.equal(quarter, images.rot90(-1, (1, 2)))
    for number in (SHEAR_RIGHT, SHEAR_DOWN, TURN):
        assert torch.equal(operate(number, 0.0, images), images)
        moved = operate(number, 0.3, images)
        assert torch.equal(moved[:, 4, 4], images[:, 4, 4])  # about the centre
        assert not torch.equal(moved, images)


def test_flips_mirror() -> None:
    images, choices = pictures(), drawn(**ALL["flips"])
    flipped = choices.apply(images, ROWS)
    for row in ROWS:
        assert torch.equal(flipped[row], images[row].flip(1) if choices.flips[row] else images[row])


def test_crops_have_the_areas_and_proportions_asked_for() -> None:
    top, left, height, width = drawn(5000, 200, crop_scale=0.25).crops.T
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 200
    areas = height * width / 200**2
    assert areas.min() == pytest.approx(0.25, abs=0.01)
    assert areas.max() == pytest.approx(1, abs=0.01)
    assert areas.mean() == pytest.approx(0.625, abs=0.02)
    assert (width / height).min() == pytest.approx(3 / 4, abs=0.03)
    assert (width / height).max() == pytest.approx(4 / 3, abs=0.03)
    assert np.log(width / height).mean() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("crop", [augment.crop_by_resize, augment.crop_by_gather])
def test_a_crop_is_enlarged_bilinearly(crop: Any) -> None:
    crops = drawn(crop_scale=0.1).crops
    flat = torch.full((200, 24, 24, 3), 77, dtype=torch.uint8)
    assert torch.equal(crop(flat, crops), flat)
    whole = np.tile([0, 0, 24, 24], (200, 1))
    assert torch.equal(crop(pictures(), whole), pictures())

    line = torch.arange(0, 240, 10, dtype=torch.uint8)
    ramps = line[:, None, None].expand(200, 24, 24, 3).clone()
    down, right = crop(ramps, crops).int(), crop(ramps.transpose(1, 2).contiguous(), crops).int()
    for large, start, length in ((down, 0, 2), (right.transpose(1, 2), 1, 3)):
        assert (large == large[:, :, :1, :1]).all()  # constant along the other axis and the channels
        assert (large.diff(dim=1) >= 0).all()
        assert large[:, 0, 0, 0].tolist() == (10 * crops[:, start]).tolist()  # from the first pixel of the part
        assert large[:, -1, 0, 0].tolist() == (10 * (crops[:, start] + crops[:, length] - 1)).tolist()  # to its last
    doubled = crop(ramps[:1], np.array([[6, 6, 12, 12]]))[0, :, 0, 0].tolist()
    assert doubled[:4] == [60, 62, 68, 72] or doubled[:4] == [60, 63, 68, 73]  # 62.5 and 72.5, rounded either way


def test_both_ways_to_crop_agree() -> None:
    crops = drawn(crop_scale=0.05).crops
    ways = [way(pictures(), crops) for way in (augment.crop_by_resize, augment.crop_by_gather)]
    assert {way.dtype for way in ways} == {torch.uint8}
    assert (ways[0].int() - ways[1].int()).abs().max() <= 1


def colours(brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0) -> Any:
    factors = np.array([[brightness, contrast, saturation]] * 200, dtype=np.float32)
    return augment.change_colours(pictures() // 4 + 96, factors)  # 96 to 159: nothing is clamped


def test_colours_change_as_named() -> None:
    images = (pictures() // 4 + 96).float()
    luma = torch.tensor(augment.LUMA)
    grey = images @ luma
    assert torch.allclose(colours(), images)
    assert torch.allclose(colours(brightness=1.3), 1.3 * images)
    stretched = colours(contrast=1.5)
    assert torch.allclose((stretched @ luma).mean((1, 2)), grey.mean((1, 2)), atol=1e-3)
    assert torch.allclose(stretched.std((1, 2)), 1.5 * images.std((1, 2)), rtol=1e-3)
    assert torch.allclose(colours(saturation=0.4) @ luma, grey, atol=1e-3)
    assert torch.allclose(colours(saturation=0.0), grey[..., None].expand_as(images), atol=1e-3)
    one_by_one = 1.2 * images
    mean = (one_by_one @ luma).mean((1, 2))[:, None, None, None]
    one_by_one = mean + 0.7 * (one_by_one - mean)
    grey = (one_by_one @ luma)[..., None]
    assert torch.allclose(colours(1.2, 0.7, 1.4), grey + 1.4 * (one_by_one - grey), atol=1e-3)


def test_colours_are_clamped_and_drawn_in_range() -> None:
    choices = drawn(**ALL["colours"])
    assert choices.colours.min() == pytest.approx(0.6, abs=0.01)
    assert choices.colours.max() == pytest.approx(1.4, abs=0.01)
    assert choices.colours.mean() == pytest.approx(1, abs=0.05)
    changed = drawn(colour_jitter=1.0).apply(pictures(), ROWS)
    assert (changed.min().item(), changed.max().item()) == (0, 255)


def test_erased_rectangles_have_the_areas_asked_for() -> None:
    choices = drawn(5000, 100, erase=0.3)
    hit = choices.holes[:, 2] > 0
    assert hit.mean() == pytest.approx(0.3, abs=0.02)
    assert not choices.holes[~hit, 2:].any()
    top, left, height, width = choices.holes[hit].T
    assert max((top + height).max(), (left + width).max()) <= 100
    areas = height * width / 100**2
    assert areas.min() == pytest.approx(0.02, abs=0.003)
    assert areas.max() == pytest.approx(1 / 3, abs=0.01)
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert (drawn(5000, 100, erase=1.0).holes[:, 2:] > 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_erasing_paints_the_rectangle_and_nothing_else(dtype: torch.dtype) -> None:
    images, choices = pictures().to(dtype), drawn(**ALL["holes"])
    erased = augment.erase_by_copy(images, choices.holes, choices.fills)
    assert torch.equal(erased, augment.erase_by_mask(images, choices.holes, choices.fills))
    assert erased.dtype == dtype
    for row, (top, left, height, width) in enumerate(choices.holes.tolist()):
        inside = torch.zeros(24, 24, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(erased[row][~inside], images[row][~inside])
        assert (erased[row][inside] == torch.from_numpy(choices.fills[row])).all()


def mixed(
    step: int = 0, rank: int = 0, epoch: int = 0, count: int = 6, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A mixed batch of images whose channel 1 tells the sample that a pixel stems from."""
    images = torch.zeros(count, 20, 30, 3)
    images[..., 1] = torch.arange(count)[:, None, None]
    images = images.permute(0, 3, 1, 2)
    labels = torch.arange(count) % 4
    return feed.mix(images, labels, 5, Hyperparameters(**options), epoch, step, rank)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_targets_match_what_is_in_the_image(options: dict[str, Any]) -> None:
    shares, cuts = [], 0
    for step in range(30):
        images, targets = mixed(step, **options)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert targets.dtype == torch.float32
        assert torch.allclose(targets.sum(1), torch.ones(6))
        own = targets[1, 1].item()
        for row in range(6):
            expected = own * functional.one_hot(torch.tensor(row % 4), 5)
            expected = expected + (1 - own) * functional.one_hot(torch.tensor((row - 1) % 6 % 4), 5)
            assert torch.allclose(targets[row], expected, atol=1e-6)
            assert images[row, 1].mean().item() == pytest.approx(own * row + (1 - own) * ((row - 1) % 6), abs=1e-4)
        cuts += set(images[0, 1].unique().tolist()) <= {0.0, 5.0}
        shares.append(own)
    assert len(set(shares)) > 20
    assert (cuts == 30) == (options == {"cutmix": 1.0})
    assert (cuts > 5) == ("cutmix" in options)


def test_cutmix_pastes_one_rectangle_of_the_images_proportions() -> None:
    for step in range(20):
        images, targets = mixed(step, cutmix=1.0)
        pasted = images[1, 1] == 0
        height, width = pasted.any(1).sum().item(), pasted.any(0).sum().item()
        assert pasted.sum().item() == height * width
        assert width == pytest.approx(1.5 * height, abs=1.5)
        assert targets[1, 0].item() == pytest.approx(height * width / 600, abs=1e-6)
        assert torch.equal(pasted, images[2, 1] == 1)  # at the same place in all images


def test_mixing_depends_on_seed_epoch_step_and_rank() -> None:
    options: dict[str, Any] = {"mixup": 1.0, "cutmix": 1.0}
    first = mixed(**options)
    again = mixed(**options)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for change in ({"seed": 1}, {"epoch": 1}, {"step": 1}, {"rank": 1}):
        assert not torch.equal(first[1], mixed(**options | change)[1])
    alone, targets = mixed(count=1, **options)
    assert not alone.any()
    assert targets.tolist() == [[1, 0, 0, 0, 0]]
    for alpha in (1e-12, 99.0):
        assert all(mixed(step, mixup=alpha)[1].isfinite().all() for step in range(5))


def test_training_with_everything_on_is_reproducible(packed: Path) -> None:
    options = TOGETHER | {"mixup": 0.2, "cutmix": 1.0, "accumulate": 2, "epochs": 2}
    weights, history = train(packed, **options)
    assert same(weights, train(packed, **options)[0])
    assert all(math.isfinite(epoch["train_loss"]) for epoch in history)
    assert not same(weights, train(packed, **options | {"mixup": 0.3})[0])


@pytest.mark.parametrize("name", ["crop_scale", "colour_jitter", "erase", "mixup", "cutmix", "rotate"])
def test_values_out_of_range_are_refused(name: str) -> None:
    for value in (-0.1, 1.1 if name in ("crop_scale", "colour_jitter", "erase") else 200.0):
        options: dict[str, Any] = {name: value}
        with pytest.raises(ConfigurationError, match=rf"{name} is {value}; it must be at least "):
            Hyperparameters(**options)
