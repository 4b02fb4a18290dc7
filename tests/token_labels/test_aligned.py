"""Sparse targets against the dense ones of the published code: same targets, same losses, same gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from volo.losses import TokenLabelLoss
from volo.token_labels.aligned import AlignedMaps, token_targets
from volo.token_labels.token_cells import TokenCells


def drawn_cells(rng: np.random.Generator, k: int, cells: int, tokens: int, per_token: int, num_classes: int):
    """One sample with arbitrary content; the top-k classes of a cell differ, those of neighbours may not."""
    weights = rng.random((tokens, per_token)).astype(np.float32)
    weights /= weights.sum(1, keepdims=True)
    class_weights = rng.random(cells).astype(np.float32)
    return TokenCells(
        scores=rng.normal(3, 4, (k, cells)).astype(np.float32),
        classes=np.argsort(rng.random((num_classes, cells)), axis=0)[:k].astype(np.int64),
        cells=rng.integers(cells, size=(tokens, per_token)),
        weights=weights,
        class_weights=class_weights / class_weights.sum(),
        valid=rng.random(tokens) < 0.8,
    )


def literal(sample: TokenCells, label: int, num_classes: int, smoothing: float, published: bool) -> torch.Tensor:
    """[C, 2 + N] the published way: scores scattered into dense maps, pooled, softmax over all classes, smoothed."""
    maps = np.zeros((num_classes, sample.scores.shape[1]))
    for k in range(len(sample.scores)):
        maps[sample.classes[k], np.arange(maps.shape[1])] = sample.scores[k]
    pooled = [maps @ sample.class_weights]
    for cells, weights in zip(sample.cells, sample.weights, strict=True):
        pooled.append(sum(maps[:, cell] * weight for cell, weight in zip(cells, weights, strict=True)))
    targets = torch.tensor(np.stack(pooled, 1)).softmax(0)
    off = smoothing / num_classes
    on = 1 - smoothing + (off if published else 0)
    truth = torch.full((num_classes, 1), off, dtype=torch.float64)
    truth[label] = 1 - smoothing + off
    return torch.cat([truth, targets * on + off], 1)


def smoothed(labels: list[int], num_classes: int, smoothing: float) -> torch.Tensor:
    one_hot = torch.nn.functional.one_hot(torch.tensor(labels), num_classes).float()
    return one_hot * (1 - smoothing) + smoothing / num_classes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    k=st.integers(1, 5),
    cells=st.integers(1, 9),
    tokens=st.integers(1, 6),
    per_token=st.integers(1, 5),
    num_classes=st.integers(6, 12),
    smoothing=st.sampled_from([0.0, 0.1]),
    published=st.booleans(),
)
def test_targets_and_losses_equal_the_dense_way(
    seed, batch, k, cells, tokens, per_token, num_classes, smoothing, published
):
    rng = np.random.default_rng(seed)
    samples = [drawn_cells(rng, k, cells, tokens, per_token, num_classes) for _ in range(batch)]
    labels = [int(label) for label in rng.integers(num_classes, size=batch)]
    truth = smoothed(labels, num_classes, smoothing)
    targets = token_targets(AlignedMaps.collate(samples), truth, smoothing, published)
    expected = torch.stack(
        [literal(s, label, num_classes, smoothing, published) for s, label in zip(samples, labels, strict=True)]
    )
    valid = torch.tensor(np.stack([sample.valid for sample in samples]))
    expected_tokens = expected[:, :, 2:] * valid[:, None]
    torch.testing.assert_close(targets.to_dense()[:, :, :2].double(), expected[:, :, :2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(targets.to_dense()[:, :, 2:].double(), expected_tokens, atol=1e-5, rtol=1e-5)

    cls = torch.randn(batch, num_classes, requires_grad=True)
    token_logits = (3 * torch.randn(batch, tokens, num_classes)).requires_grad_()
    loss = TokenLabelLoss(dense_weight=0.7, ground_truth=True)((cls, token_logits), targets)
    gradients = torch.autograd.grad(loss, (cls, token_logits))

    # by hand, in float64: the token term is the mean over valid tokens
    log_p = token_logits.double().log_softmax(2)
    rows = -(expected_tokens.transpose(1, 2) * log_p).sum(2)
    dense = rows.sum() / max(int(valid.sum()), 1)
    agree = expected[:, :, 1].argmax(1) == torch.tensor(labels)
    share = torch.where(agree, 0.5, 0.9).double()[:, None]
    blended = share * expected[:, :, 1] + (1 - share) * expected[:, :, 0]
    by_hand = -(blended * cls.double().log_softmax(1)).sum(1).mean() + 0.7 * dense
    torch.testing.assert_close(loss.double(), by_hand, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(by_hand, (cls, token_logits)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_sparse_and_dense_targets_give_one_loss():
    """All tokens valid, 1,000 classes, MixToken: the [B, C, 2 + N] tensor and the sparse targets agree."""
    rng = np.random.default_rng(0)
    samples = [replace_valid(drawn_cells(rng, 5, 81, 49, 4, 1000)) for _ in range(3)]
    targets = token_targets(AlignedMaps.collate(samples), smoothed([1, 2, 999], 1000, 0.1), 0.1, True)
    output = torch.randn(3, 1000, requires_grad=True), torch.randn(3, 49, 1000, requires_grad=True)
    box = torch.tensor([1, 2, 5, 6])
    for ground_truth in (False, True):
        loss = TokenLabelLoss(ground_truth=ground_truth)
        sparse, dense = loss(output, targets, box), loss(output, targets.to_dense(), box)
        torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(sparse, output), torch.autograd.grad(dense, output), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def replace_valid(sample: TokenCells) -> TokenCells:
    return sample._replace(valid=np.ones_like(sample.valid))


def test_published_smoothing_sums_to_slightly_more_than_one():
    rng = np.random.default_rng(1)
    batch = AlignedMaps.collate([replace_valid(drawn_cells(rng, 5, 20, 4, 4, 1000))])
    truth = smoothed([3], 1000, 0.1)
    published = token_targets(batch, truth, 0.1, True).to_dense().sum(1)
    exact = token_targets(batch, truth, 0.1, False).to_dense().sum(1)
    torch.testing.assert_close(published, torch.tensor([[1.0, *[1.0001] * 5]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(exact, torch.ones(1, 6), atol=1e-6, rtol=0)


def test_maps_of_different_sizes_share_a_batch():
    rng = np.random.default_rng(2)
    small, large = drawn_cells(rng, 3, 4, 6, 2, 9), drawn_cells(rng, 5, 30, 6, 5, 9)
    truth = smoothed([0, 1], 9, 0.1)
    together = token_targets(AlignedMaps.collate([small, large]), truth, 0.1, False).to_dense()
    for row, sample in enumerate((small, large)):
        alone = token_targets(AlignedMaps.collate([sample]), truth[row : row + 1], 0.1, False).to_dense()
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_mixing_is_mixing_of_the_dense_targets(batch):
    rng = np.random.default_rng(3)
    samples = [replace_valid(drawn_cells(rng, 2, 9, 4, 3, 8)) for _ in range(batch)]
    targets = token_targets(AlignedMaps.collate(samples), smoothed([1] * batch, 8, 0.1), 0.1, False)
    lam, token_lam = torch.rand(batch), torch.rand(batch, 4)
    dense = targets.to_dense()
    weights = torch.cat([lam[:, None, None].expand(-1, 1, 2), token_lam[:, None]], 2)
    torch.testing.assert_close(
        targets.blended(lam, token_lam).to_dense(), dense * weights + dense.flip(0) * (1 - weights)
    )


def test_all_tokens_outside_the_image_give_no_token_loss():
    rng = np.random.default_rng(4)
    sample = drawn_cells(rng, 2, 9, 4, 3, 8)._replace(valid=np.zeros(4, bool))
    targets = token_targets(AlignedMaps.collate([sample]), smoothed([1], 8, 0.1), 0.1, False)
    terms = TokenLabelLoss().terms((torch.randn(1, 8), torch.randn(1, 4, 8)), targets)
    assert terms.dense == 0
    assert torch.isfinite(terms.total)


def test_targets_for_another_grid_are_refused():
    rng = np.random.default_rng(5)
    targets = token_targets(AlignedMaps.collate([drawn_cells(rng, 2, 9, 6, 3, 8)]), smoothed([1], 8, 0.1), 0.1, False)
    with pytest.raises(ValueError, match="6 tokens and the network has 4"):
        TokenLabelLoss()((torch.randn(1, 8), torch.randn(1, 4, 8)), targets)
