"""Write scikit-learn's handwritten digits as image files: a real data set that needs no download.

1,797 grey pictures of 8x8 pixels in ten classes (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998).
"""

from __future__ import annotations

import shutil
from pathlib import Path


def write_digits(folder: Path) -> None:
    """Write `<folder>/<digit>/<number>.png` for every picture; the folder appears when it is complete."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = temporary / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(folder)
