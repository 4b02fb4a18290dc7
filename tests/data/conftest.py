"""Small pictures and image folders."""

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """Return a smooth colour picture with a little noise, which resizing, JPEG and every operation change."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(6 * (a * x + b * y) + c) for a, b, c in rng.uniform(0.2, 1.5, size=(3, 3))]
    values = 127 + 90 * np.stack(waves, -1) + rng.normal(0, 12, size=(height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.fixture
def make_picture():
    return picture


@pytest.fixture
def make_folder(tmp_path):
    """Return a function that writes ``counts[class name]`` PNG files per class folder and returns the root's path."""

    def make(counts: dict[str, int], name: str = "train") -> str:
        number = 0
        for class_name, count in counts.items():
            folder = tmp_path / name / class_name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(number, 18 + number % 7, 15 + number % 5).save(folder / f"{i}.png")
                number += 1
        return str(tmp_path / name)

    return make
