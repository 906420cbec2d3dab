"""What counts of right and wrong answers say, alike where a model is trained, evaluated and reported on.

Standard library only: the laptop imports this module too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964  # of a normal distribution, 95 % of which is within so many standard deviations


def summary(right: Sequence[int], actual: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """What accuracy hides.

    Args:
        right, actual, predicted: by class, the images that were recognised, that are of it, and that were called it.

    Returns:
        The share of the largest class, which always answering it would reach as accuracy (`majority`), and of the
        classes that have images the unweighted mean of F1 and the lowest recall.
    """
    rows = [row for row in zip(right, actual, predicted, strict=True) if row[1]]
    return {
        "majority": max(actual) / sum(actual),
        "f1": math.fsum(2 * hits / (images + called) for hits, images, called in rows) / len(rows),
        "worst_recall": min(hits / images for hits, images, _ in rows),
    }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, "Probable Inference ...", JASA 22, 1927)."""
    share = successes / trials
    centre = share + Z * Z / (2 * trials)
    reach = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    scale = 1 + Z * Z / trials
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def advice(accuracy: float, majority: float, images: int) -> str:
    """A sentence about a model that is no better than a guess, or better only by chance; nothing about others."""
    if wilson(round(accuracy * images), images)[0] > majority:
        return ""
    return (
        f"The accuracy of {accuracy:.4f} on {images} images is not clearly above {majority:.4f}, which always naming "
        "the most frequent class reaches: begin with pretrained weights (data.pretrained), train on more images or for "
        "more epochs, or set class_weights to balanced where classes are rare."
    )
