"""The preview shows what the loss sees, and every kind of batch can be drawn."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from volo.data.mixing import Mix, token_shares
from volo.engine.preview import readable_names, token_view
from volo.reporting.batch_picture import TokenView, draw_batch
from volo.token_labels.targets import DenseTargets, TokenTargets


def test_token_view_names_the_largest_target_and_marks_tokens_outside():
    targets = TokenTargets(
        truth=torch.zeros(1, 4),
        teacher=torch.zeros(1, 4),
        classes=torch.tensor([[[1, 2], [3, 3], [0, 1]]]),
        excess=torch.tensor([[[0.2, 0.5], [0.3, 0.3], [0.0, 0.0]]]),
        background=torch.tensor([[0.075, 0.1, 0.0]]),
        mass=torch.tensor([[1.0, 1.0, 0.0]]),
    )
    view = token_view(targets, (1, 3))
    assert view.classes[0, :2].tolist() == [2, 3]
    np.testing.assert_allclose(view.shares[0, :2], [0.575, 0.7], atol=1e-6)
    assert view.valid.tolist() == [[True, True, False]]
    dense = token_view(
        DenseTargets(targets.to_dense()), (1, 3)
    )  # as the published code builds them: every token counts
    np.testing.assert_array_equal(dense.classes, view.classes)
    np.testing.assert_array_equal(dense.shares, view.shares)
    assert dense.valid.all()


def test_synsets_are_shown_in_words():
    assert readable_names(("n01440764", "n01443537")) == ["tench", "goldfish"]
    assert readable_names(("cat", "dog")) == ["cat", "dog"]


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (3, (2, 5)), (4, (14, 14))])
def test_every_batch_can_be_drawn(count, grid):
    rng = np.random.default_rng(0)
    images = rng.random((count, 20, 30, 3))
    tokens = grid[0] * grid[1]
    view = TokenView(
        rng.integers(3, size=(count, tokens)), rng.random((count, tokens)), rng.random((count, tokens)) < 0.8, grid
    )
    plain = Image.open(io.BytesIO(draw_batch(images, ["a"] * count, ["a", "b", "c"])))
    with_tokens = Image.open(io.BytesIO(draw_batch(images, ["a"] * count, ["a", "b", "c"], view, (0, 0, 1, 1))))
    assert min(plain.size) > 200
    assert with_tokens.size[0] > plain.size[0] or count > 1


def test_tokens_that_see_nothing_are_hatched_and_others_named():
    def drawn(valid: bool) -> np.ndarray:
        view = TokenView(np.zeros((1, 4), int), np.ones((1, 4)), np.full((1, 4), valid), (2, 2))
        png = draw_batch(np.zeros((1, 20, 20, 3)), ["black"], ["tree"], view)
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
        return pixels[80:-80, pixels.shape[1] // 2 + 40 : -40]  # well inside the panel of tokens

    named, hatched = drawn(True), drawn(False)
    reds = (named[..., 0] - named[..., 2]) > 60  # the colour of the class
    assert reds.mean() > 0.5
    is_grey = abs(hatched - hatched.mean(2, keepdims=True)).max() < 3
    assert is_grey, "no colour of a class"
    white = (hatched.mean(2) > 200).mean()
    assert 0.02 < white < 0.5, "lines of a hatching"
    # Hatching: every row and every column crosses a line.
    assert (hatched.mean(2) > 150).any(0).all() and (hatched.mean(2) > 150).any(1).all()


def test_cutmix_takes_from_each_token_what_lies_under_the_box():
    # 8 x 12 pixels, 2 x 3 tokens of 4 x 4; the box covers rows 2..6, columns 4..10
    plan = Mix(torch.tensor([0.75, 0.4], dtype=torch.float64), torch.tensor([[2, 4, 6, 10], [0, 0, 0, 0]]), "elem")
    shares = token_shares(plan, (2, 3), (8, 12))
    expected = torch.tensor([[1, 0.5, 0.75, 1, 0.5, 0.75], [0.4] * 6], dtype=torch.float64)
    torch.testing.assert_close(shares, expected)
    assert float(shares[0].mean()) == pytest.approx(0.75)  # a whole image's share is its ratio


def test_class_names_with_line_feeds_are_drawn():
    view = TokenView(np.zeros((1, 4), np.int64), np.full((1, 4), 0.5), np.ones((1, 4), bool), (2, 2))
    names = ["a\nb\x1b\udce9"]
    assert draw_batch(np.zeros((1, 20, 20, 3)), names, names, view) == draw_batch(
        np.zeros((1, 20, 20, 3)), [r"a\nb\x1b\udce9"], [r"a\nb\x1b\udce9"], view
    )
