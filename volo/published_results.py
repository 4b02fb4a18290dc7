"""The published numbers: what the paper and timm report for the eleven published weights.

``published.json`` is the only place that states them; recipes, tables and ``validate.py`` read them here. Accuracies
are in percent. An accuracy belongs to a crop ratio: the published code and timm do not always use the same one.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple


class PublishedAccuracy(NamedTuple):
    """Accuracy on one dataset in percent."""

    top1: float
    top5: float


class PublishedTop1(NamedTuple):
    """One published top-1 accuracy: who reports it ("paper" or "timm"), percent, and the crop ratio used."""

    source: str
    value: float
    crop_pct: float


@dataclass(frozen=True)
class Published:
    """One row of the published table.

    Args:
        name: Registered architecture, volo_d1 ... volo_d5.
        resolution: Side of the square input in pixels.
        params: Number of parameters at 1000 classes.
        gmacs: Multiply-accumulates of one image in 10^9.
        paper_top1: ImageNet top-1 of the paper.
        official_crop_pct: Crop ratio of the published code, which gave ``paper_top1``.
        timm_crop_pct: Crop ratio of timm's measurements.
        timm: timm's measurements by dataset: "imagenet", "real", "v2-matched-frequency".
    """

    name: str
    resolution: int
    params: int
    gmacs: float
    paper_top1: float
    official_crop_pct: float
    timm_crop_pct: float
    timm: dict[str, PublishedAccuracy]

    @property
    def key(self) -> str:
        """Name and resolution, as the recipes are called: volo_d1_224."""
        return f"{self.name}_{self.resolution}"


@cache
def all_published() -> tuple[Published, ...]:
    """Return all rows, smallest model first and by resolution within a model."""
    table = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    return tuple(_row(dict(fields)) for fields in table["models"])


def published(model: str, resolution: int) -> Published | None:
    """Return the row of ``model`` at ``resolution`` pixels, or None if nothing is published for it."""
    return next((row for row in all_published() if (row.name, row.resolution) == (model, resolution)), None)


def published_top1(model: str, resolution: int, dataset: str) -> list[PublishedTop1]:
    """Return every published top-1 of ``model`` at ``resolution`` on ``dataset``, the paper's first.

    ``dataset`` is "imagenet", "real" or "v2-matched-frequency"; the list is empty for anything else, and for a
    model or resolution that was not published. The paper's value is there for "imagenet" alone.
    """
    row = published(model, resolution)
    if row is None or dataset not in row.timm:
        return []
    paper = [PublishedTop1("paper", row.paper_top1, row.official_crop_pct)] if dataset == "imagenet" else []
    return [*paper, PublishedTop1("timm", row.timm[dataset].top1, row.timm_crop_pct)]


def _row(fields: dict) -> Published:
    timm = fields.pop("timm")
    crop_pct = timm.pop("crop_pct")
    return Published(
        **fields, timm_crop_pct=crop_pct, timm={name: PublishedAccuracy(**acc) for name, acc in timm.items()}
    )
