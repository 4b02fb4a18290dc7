"""Random label maps, and stores and folders of label files that hold them.

k top scores per cell, h x w cells of a label map, C classes.
"""

from pathlib import Path

import numpy as np
import torch

from volo.token_labels.store import TokenLabelMap
from volo.token_labels.writer import StoreWriter

HEADER = {"teacher": "a teacher", "covers": "whole_image", "top_k": 2, "num_classes": 10}


def drawn_map(seed: int, k: int = 2, h: int = 3, w: int = 4, num_classes: int = 10) -> TokenLabelMap:
    rng = np.random.default_rng(seed)
    scores = rng.normal(3, 5, (k, h, w)).astype(np.float16)
    return TokenLabelMap(scores, rng.integers(0, num_classes, (k, h, w)).astype(np.int16))


def write_store(path: Path, labels: dict[str, TokenLabelMap], **changes) -> Path:
    with StoreWriter(path, **(HEADER | changes)) as out:
        for key, label in labels.items():
            out.add(key, label)
    return path


def assert_same(a: TokenLabelMap, b: TokenLabelMap) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes()


LABELS = {f"cat/c{i}": drawn_map(i, h=1 + i, w=5 - i) for i in range(4)}


GOOD = drawn_map(0)


def with_score(value: float) -> TokenLabelMap:
    scores = GOOD.scores.copy()
    scores[1, 2, 3] = value
    return GOOD._replace(scores=scores)


def with_class(value: int) -> TokenLabelMap:
    classes = GOOD.classes.copy()
    classes[1, 2, 3] = value
    return GOOD._replace(classes=classes)


def save(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def published(root: Path, labels: dict[str, TokenLabelMap]) -> Path:
    for stem, label in labels.items():
        save(root / f"{stem}.pt", torch.stack([torch.tensor(label.scores), torch.tensor(label.classes).half()]))
    return root
