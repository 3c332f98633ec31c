"""Images on disk."""

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def places(sheet: np.ndarray, image: np.ndarray, factor: int, tolerance: int = 0) -> list[tuple[int, int]]:
    """Where an image is in a sheet, enlarged by a factor: the rows and columns of its corners."""
    sheet, image = (np.atleast_3d(x).astype(int) for x in (sheet, image))
    y, x = np.indices([sheet.shape[k] - factor * image.shape[k] + 1 for k in (0, 1)]).reshape(2, -1)
    for i, j in np.ndindex(image.shape[:2]):
        for corner in (0, factor - 1):  # of the pixel, enlarged
            found = sheet[y + factor * i + corner, x + factor * j + corner]
            there = (abs(found - image[i, j]) <= tolerance).all(-1)
            y, x = y[there], x[there]
    return list(zip(y.tolist(), x.tolist(), strict=True))


def save_png(path: Path, array: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8) if array is None else array).save(path)
    return path
