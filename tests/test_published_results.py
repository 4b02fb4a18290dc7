"""The published numbers: the eleven rows, checked against timm's models and against each other."""

import pytest
import timm
import torch

from volo.published_results import all_published, published, published_top1

# Model, resolution, parameters at 1000 classes: written down apart from published.json.
PARAMS = {
    ("volo_d1", 224): 26_632_040,
    ("volo_d1", 384): 26_777_960,
    ("volo_d2", 224): 58_678_336,
    ("volo_d2", 384): 58_872_896,
    ("volo_d3", 224): 86_325_072,
    ("volo_d3", 448): 86_626_128,
    ("volo_d4", 224): 192_961_520,
    ("volo_d4", 448): 193_413_104,
    ("volo_d5", 224): 295_455_584,
    ("volo_d5", 448): 295_907_168,
    ("volo_d5", 512): 296_091_488,
}
# Paper, then timm's top-1/top-5 on ImageNet, ReaL and V2: written down apart from published.json.
ACCURACIES = """
volo_d1_224 84.2 84.148/96.772 88.898/98.023 74.10/92.05
volo_d1_384 85.2 85.262/97.218 89.711/98.290 75.69/92.98
volo_d2_224 85.2 85.204/97.186 89.329/98.207 75.47/92.47
volo_d2_384 86.0 86.054/97.582 89.784/98.407 76.24/93.17
volo_d3_224 85.4 85.440/97.274 89.589/98.371 75.69/92.95
volo_d3_448 86.3 86.514/97.710 90.179/98.542 77.19/94.04
volo_d4_224 85.7 85.868/97.464 89.799/98.422 76.13/93.08
volo_d4_448 86.8 86.788/97.880 90.510/98.595 77.75/93.92
volo_d5_224 86.1 86.076/97.574 89.876/98.490 76.60/93.36
volo_d5_448 87.0 86.974/97.928 90.587/98.691 77.91/94.14
volo_d5_512 87.1 87.068/97.970 90.633/98.702 78.12/94.22
"""
DATASETS = ("imagenet", "real", "v2-matched-frequency")


def test_the_eleven_models_and_their_parameters():
    assert {(row.name, row.resolution): row.params for row in all_published()} == PARAMS
    assert [row.key for row in all_published()] == sorted(row.key for row in all_published())


@pytest.mark.slow
def test_parameters_and_crop_equal_timm():
    for row in all_published():
        with torch.device("meta"):
            model = timm.create_model(row.key)
        assert sum(p.numel() for p in model.parameters()) == row.params, row.key
        assert model.pretrained_cfg["crop_pct"] == row.timm_crop_pct, row.key
        assert model.pretrained_cfg["input_size"] == (3, row.resolution, row.resolution), row.key


def test_official_crop_follows_the_model_alone():
    for row in all_published():
        assert row.official_crop_pct == (1.15 if row.name in ("volo_d4", "volo_d5") else 0.96), row.key


def test_the_accuracies_digit_by_digit():
    for row, line in zip(all_published(), ACCURACIES.split("\n")[1:-1], strict=True):
        key, paper, *pairs = line.split()
        assert (row.key, row.paper_top1) == (key, float(paper))
        assert [tuple(map(float, pair.split("/"))) for pair in pairs] == [row.timm[d] for d in DATASETS], key


def test_accuracies_are_plausible():
    for row in all_published():
        assert tuple(row.timm) == DATASETS
        assert all(70 < acc.top1 < acc.top5 < 100 for acc in row.timm.values()), row.key
        # The same weights: ReaL forgives labels, V2 is harder, and timm is close to what the authors report.
        assert row.timm["v2-matched-frequency"].top1 < row.timm["imagenet"].top1 < row.timm["real"].top1, row.key
        assert abs(row.timm["imagenet"].top1 - row.paper_top1) < 0.25, row.key
        # Accuracies over 50,000 and 10,000 images have no finer steps than these.
        assert round(row.timm["imagenet"].top1 * 500, 6).is_integer(), row.key
        assert round(row.timm["v2-matched-frequency"].top1 * 100, 6).is_integer(), row.key


def test_accuracy_and_cost_grow_with_the_resolution():
    for name in ("volo_d1", "volo_d2", "volo_d3", "volo_d4", "volo_d5"):
        rows = [row for row in all_published() if row.name == name]
        for small, large in zip(rows, rows[1:], strict=False):
            assert small.resolution < large.resolution
            assert small.params < large.params and small.paper_top1 < large.paper_top1
            assert all(small.timm[d].top1 < large.timm[d].top1 for d in DATASETS)
            # Work grows with the tokens, and attention's part of it faster.
            assert large.gmacs / small.gmacs > (large.resolution / small.resolution) ** 2


def test_look_up():
    assert published("volo_d3", 448).paper_top1 == 86.3
    assert published("volo_d1", 448) is None
    assert published("volo_tiny", 224) is None


def test_published_top1_by_dataset():
    assert published_top1("volo_d4", 224, "imagenet") == [("paper", 85.7, 1.15), ("timm", 85.868, 0.96)]
    assert published_top1("volo_d5", 512, "real") == [("timm", 90.633, 1.15)]
    assert published_top1("volo_d1", 384, "v2-matched-frequency") == [("timm", 75.69, 1.0)]
    assert published_top1("volo_d1", 224, "v2-threshold-0.7") == []
    assert published_top1("volo_tiny", 32, "imagenet") == []
