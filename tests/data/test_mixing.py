"""MixUp, CutMix and soft targets against timm's Mixup; MixToken's box against the published formula."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import mixup as timm_mixup

from volo.config import MixConfig
from volo.data.mixing import apply_mix, draw_mix, draw_mix_token_box, mix_targets, soft_targets


def config(**options) -> MixConfig:
    return MixConfig(mix_token=False, **options)


class SameDraws:
    """numpy's global drawing functions, as timm calls them, on a given generator."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def rand(self, *size):
        return self.rng.random(size or None)

    def beta(self, a, b, size=None):
        return self.rng.beta(a, b, size=size)

    def randint(self, low, high, size=None):
        return self.rng.integers(low, high, size=size)


def timm_with_our_draws(monkeypatch, cfg: MixConfig, seed: int, smoothing: float) -> timm_mixup.Mixup:
    same = types.SimpleNamespace(**{n: getattr(np, n) for n in dir(np) if not n.startswith("__")})
    same.random = SameDraws(seed)
    monkeypatch.setattr(timm_mixup, "np", same)
    mixup = timm_mixup.Mixup(
        cfg.mixup, cfg.cutmix, prob=cfg.prob, switch_prob=cfg.switch_prob, mode=cfg.mode, label_smoothing=smoothing,
        num_classes=7,
    )  # fmt: skip

    def per_batch():  # timm draws the parameters of a batch in another order than those of an element
        lam, use_cutmix = mixup._params_per_elem(1)
        return float(lam[0]), bool(use_cutmix[0])

    monkeypatch.setattr(mixup, "_params_per_batch", per_batch)
    return mixup


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "options",
    [
        dict(mixup=0.8),
        dict(cutmix=1.0),
        dict(mixup=0.8, cutmix=1.0),
        dict(mixup=0.4, cutmix=1.0, prob=0.5, switch_prob=0.3),
        dict(cutmix=0.5, prob=0.7),
    ],
)
def test_the_same_draws_give_timms_numbers(monkeypatch, mode, options):
    cfg = config(mode=mode, **options)
    for seed in range(12):
        batch = (2, 6)[seed % 2]
        images = torch.randn(batch, 3, 21, 16, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(batch) % 7
        before = images.clone()
        plan = draw_mix(np.random.default_rng(seed), cfg, batch, (21, 16))
        mixed = apply_mix(images, plan)
        targets = mix_targets(soft_targets(labels, 7, 0.1), plan)
        assert torch.equal(images, before)

        mixup = timm_with_our_draws(monkeypatch, cfg, seed, smoothing=0.1)
        expected_images, expected_targets = mixup(images.clone(), labels)
        torch.testing.assert_close(mixed, expected_images, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(targets, expected_targets, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(targets.sum(1), torch.ones(batch))


def test_ratios_have_timms_distribution():
    cfg, count = config(mixup=0.8, cutmix=1.0, prob=0.9, mode="elem"), 4000
    np.random.seed(0)
    mixup = timm_mixup.Mixup(0.8, 1.0, prob=0.9, mode="elem", num_classes=2)
    _, theirs = mixup(torch.zeros(count, 3, 8, 8), torch.zeros(count, dtype=torch.int64))
    theirs = mixup._params_per_elem(count)[0]
    plan = draw_mix(np.random.default_rng(0), cfg, count, (8, 8))
    assert abs((plan.lam == 1).double().mean() - 0.1) < 0.04  # including boxes thinner than a pixel
    is_cut = plan.boxes.any(1)
    assert abs(is_cut.double().mean() - 0.45) < 0.05
    blended = plan.lam[~is_cut & (plan.lam < 1)].numpy()
    assert abs(blended.mean() - 0.5) < 0.03
    assert abs(np.mean(theirs == 1) - 0.1) < 0.03


def test_one_ratio_per_batch_per_pair_or_per_element():
    for mode, distinct in (("batch", 1), ("pair", 4), ("elem", 8)):
        plan = draw_mix(np.random.default_rng(0), config(mixup=1.0, mode=mode), 8, (16, 16))
        assert plan.lam.unique().numel() == distinct
        if mode != "elem":
            assert torch.equal(plan.lam, plan.lam.flip(0)) and torch.equal(plan.boxes, plan.boxes.flip(0))


def test_the_cutmix_ratio_follows_the_area_of_the_box():
    for seed in range(50):
        plan = draw_mix(np.random.default_rng(seed), config(cutmix=1.0, mode="elem"), 4, (20, 30))
        top, left, bottom, right = plan.boxes.unbind(1)
        torch.testing.assert_close(plan.lam, 1 - ((bottom - top) * (right - left)).double() / 600)


def test_when_nothing_is_mixed():
    rng = np.random.default_rng(0)
    assert draw_mix(rng, config(), 4, (8, 8)) is None
    assert draw_mix(rng, config(mixup=1.0, off_epoch=3), 4, (8, 8), epoch=2) is not None
    assert draw_mix(rng, config(mixup=1.0, off_epoch=3), 4, (8, 8), epoch=3) is None
    never = draw_mix(rng, config(mixup=1.0, cutmix=1.0, prob=0.0), 4, (8, 8))
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(apply_mix(images, never), images)


@pytest.mark.parametrize("batch", [1, 7])
def test_an_odd_batch_is_refused(batch):
    with pytest.raises(ValueError, match=f"mix.mixup .*[(]{batch}[)].*train.device_batch_size"):
        draw_mix(np.random.default_rng(0), config(mixup=1.0), batch, (8, 8))


def test_soft_targets():
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    torch.testing.assert_close(targets, timm_mixup.mixup_target(torch.tensor([2, 0]), 4, 1.0, 0.1))
    assert soft_targets(torch.tensor([1]), 3).tolist() == [[0, 1, 0]]
    assert soft_targets(torch.empty(0, dtype=torch.int64), 3).shape == (0, 3)


def published_box(lam: float, centre: tuple[int, int], grid_hw: tuple[int, int]) -> tuple[int, ...]:
    """The published formula, with its global draws replaced by arguments."""
    height, width = grid_hw
    cut_h, cut_w = int(height * np.sqrt(1 - lam)), int(width * np.sqrt(1 - lam))
    row, column = centre
    bounds = (row - cut_h // 2, height), (column - cut_w // 2, width), (row + cut_h // 2, height)
    return tuple(int(np.clip(v, 0, top)) for v, top in (*bounds, (column + cut_w // 2, width)))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40))
def test_mix_token_box_is_the_published_one(seed, height, width):
    box = draw_mix_token_box(np.random.default_rng(seed), (height, width))
    rng = np.random.default_rng(seed)
    lam, row, column = rng.beta(1, 1), int(rng.integers(height)), int(rng.integers(width))
    assert box == published_box(lam, (row, column), (height, width))
    top, left, bottom, right = box
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    assert all(type(value) is int for value in box)


def test_mix_token_statistics_on_the_published_grid():
    """On 14 x 14 cells: lambda is at least 0.265 and 0.729 on average; 2 % of the boxes are empty."""
    rng = np.random.default_rng(0)
    boxes = np.array([draw_mix_token_box(rng, (14, 14)) for _ in range(20_000)])
    lam = 1 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 196
    assert lam.min() >= 0.265 and abs(lam.mean() - 0.729) < 0.006
    assert abs((lam == 1).mean() - 0.020) < 0.004
