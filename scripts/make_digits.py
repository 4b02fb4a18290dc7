#!/usr/bin/env python
"""Write scikit-learn's handwritten digits as a folder in ImageNet's layout, for the quickstart.

    python scripts/make_digits.py --output data/digits

makes train/<digit>/NNNN.png and val/<digit>/NNNN.png, where NNNN is the index of the image in scikit-learn's set:
1,797 grayscale scans of 8x8 pixels (the test part of "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository), enlarged to 32x32. A fifth of every digit, drawn from a fixed seed, is held out in val.
The folder appears complete or not at all. If it exists and is complete, nothing is done.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from volo.cli import parse_options

NUM_IMAGES = 1797
SIZE = 32  # pixels
VAL_SHARE = 0.2
SEED = 0


@dataclass(frozen=True)
class DigitsOptions:
    """Where to write the digits.

    Args:
        output: Folder to write.
    """

    output: str = "data/digits"


def held_out(labels: np.ndarray) -> np.ndarray:
    """Return a boolean array, true for the images of val: the same share of every class, drawn from SEED."""
    rng = np.random.default_rng(SEED)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        mask[indices[: round(VAL_SHARE * len(indices))]] = True
    return mask


def to_image(scan: np.ndarray) -> Image.Image:
    """Return the 8x8 scan of values 0-16 as an 8-bit image of SIZE x SIZE; bicubic keeps the strokes smooth."""
    pixels = np.round(scan * (255 / 16)).astype(np.uint8)
    return Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def write_images(folder: Path) -> None:
    from sklearn.datasets import load_digits  # takes a second, not needed if the folder is complete

    digits = load_digits()
    in_val = held_out(digits.target)
    for index, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        class_folder = folder / ("val" if in_val[index] else "train") / str(label)
        class_folder.mkdir(parents=True, exist_ok=True)
        to_image(scan).save(class_folder / f"{index:04d}.png")


def count_images(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*/*/*.png"))


def make_digits(output: Path) -> bool:
    """Write ``output``; return false if it was complete already.

    Raises ValueError if ``output`` holds anything else, which is left as it is.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if count_images(output) == NUM_IMAGES:
            return False
        raise ValueError(
            f"{output} exists but does not hold the {NUM_IMAGES:,} digits (found {count_images(output):,}). "
            "Move it away, or give another folder with --output"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / output.name
        write_images(folder)
        try:
            os.rename(folder, output)
        except OSError:
            # Another process may have been faster; it wrote the same images.
            if count_images(output) != NUM_IMAGES:
                raise
            return False
    return True


def run(options: DigitsOptions) -> int:
    """Write the folder and report it; return the exit code."""
    made = make_digits(Path(options.output))
    print(f"{options.output}: {NUM_IMAGES:,} handwritten digits {'written' if made else 'exist already'}")
    return 0


if __name__ == "__main__":
    summary = __doc__.splitlines()[0]
    options = parse_options(DigitsOptions, sys.argv[1:], prog="make_digits.py", usage="[options]", description=summary)

    from volo.runtime.program import finish

    finish(lambda: run(options))
