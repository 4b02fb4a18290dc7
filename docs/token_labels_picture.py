#!/usr/bin/env python
"""Make docs/token_labels.png: two photographs of scikit-learn, cropped, turned and flipped, with labels that follow.

    python docs/token_labels_picture.py

Clusters of colour and position stand in for a teacher.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images

from volo.token_labels.store import TokenLabelMap, label_key
from volo.token_labels.writer import StoreWriter

ROOT = Path(__file__).parents[1]

PARTS = {"temple": ["temple", "sky", "shrubs", "water"], "dahlia": ["leaves", "shade", "dahlia"]}  # by size
WIDTH = 1500  # pixels
CELLS = (28, 42)  # of a label map: the photographs are 427 x 640


def clusters(photo: np.ndarray, count: int) -> np.ndarray:
    """Return the cluster of every cell, int [rows, columns]; the largest cluster first."""
    cells = np.asarray(Image.fromarray(photo).resize(CELLS[::-1], Image.Resampling.BOX), dtype=float) / 255
    places = np.stack(np.mgrid[: CELLS[0], : CELLS[1]], axis=-1) / CELLS[1]
    features = np.concatenate([cells, 0.5 * places], axis=-1).reshape(-1, 5)
    found = KMeans(count, n_init=4, random_state=0).fit_predict(features)
    rank = np.argsort(np.argsort(-np.bincount(found)))
    return rank[found].reshape(CELLS)


def main(output: Path) -> None:
    """Write the picture, reduced to the width of a page."""
    photos = dict(zip(PARTS, load_sample_images().images, strict=True))
    names = [name for parts in PARTS.values() for name in parts]
    with tempfile.TemporaryDirectory() as folder:
        classes = Path(folder, "classes.txt")
        classes.write_text("\n".join(names))
        with StoreWriter(
            Path(folder, "labels"), teacher="clusters", covers="whole_image", top_k=1, num_classes=len(names)
        ) as store:
            for name, photo in photos.items():
                Path(folder, "train", name).mkdir(parents=True)
                Image.fromarray(photo).save(Path(folder, "train", name, "photo.png"))
                found = clusters(photo, len(PARTS[name])) + names.index(PARTS[name][0])
                scores = np.full((1, *CELLS), 6, dtype=np.float16)
                store.add(label_key(f"{name}/photo.png"), TokenLabelMap(scores, found[None].astype(np.int16)))
        options = {
            "data.root": folder,
            "data.val_split": "none",
            "data.class_list": classes,
            "model.num_classes": len(names),
            "token_label.root": Path(folder, "labels"),
            "token_label.geometry": "aligned",
            "augment.erase_prob": 0,
            "train.batch_size": 2,
            "num_images": 2,
            "epoch": 10,  # of those looked at, one with a photograph turned beyond its border
            "output": output,
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        config = ("--config", ROOT / "configs/volo_d1_224.yaml")
        subprocess.run([sys.executable, ROOT / "scripts/show_batch.py", *config, *words], check=True)
    picture = Image.open(output).convert("RGB")
    smaller = picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)
    smaller.quantize(256).save(output, optimize=True)


if __name__ == "__main__":
    main(ROOT / "docs/token_labels.png")
