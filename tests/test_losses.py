"""The token-label loss against a slow, literal account of the published one, in float64 and plain loops.

B images, C classes, N tokens. Sparse targets have their own tests, in tests/token_labels.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from volo.losses import TokenLabelLoss, blend_ground_truth, mix_class_targets, soft_cross_entropy
from volo.models import create_model


def mean_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean over rows [R, C] of -sum(t * log softmax(x)); fewer target rows are tiled blockwise, as published."""
    losses = []
    for row, logit in enumerate(logits):
        log_total = math.log(sum(math.exp(value - max(logit)) for value in logit)) + max(logit)
        target = targets[row % len(targets)]
        losses.append(sum(t * (log_total - value) for t, value in zip(target, logit, strict=True)))
    return sum(losses) / len(losses)


def published_loss(cls, tokens, target, box, dense_weight, cls_weight, ground_truth=False) -> tuple[float, ...]:
    """Total, class and token term, from float64 arrays; ``box`` as four integers."""
    num_tokens = tokens.shape[1]
    if target.ndim == 2:
        cls_target = target
        token_rows = np.concatenate([np.tile(row, (num_tokens, 1)) for row in target])  # [B * N, C], sample by sample
    else:
        cls_target = target[:, :, 1].copy()
        token_rows = np.concatenate([image[:, 2:].T for image in target])  # [B * N, C]
        if ground_truth:
            for image, (truth, teacher) in enumerate(zip(target[:, :, 0], target[:, :, 1], strict=True)):
                share = 0.5 if truth.argmax() == teacher.argmax() else 0.9
                cls_target[image] = share * teacher + (1 - share) * truth
    top, left, bottom, right = box
    kept = 1 - (bottom - top) * (right - left) / num_tokens
    if kept < 1:
        cls_target = kept * cls_target + (1 - kept) * cls_target[::-1]
    cls_term = mean_cross_entropy(cls, cls_target)
    token_term = mean_cross_entropy(tokens.reshape(-1, tokens.shape[2]), token_rows)
    return cls_weight * cls_term + dense_weight * token_term, cls_term, token_term


@st.composite
def cases(draw):
    """Logits, targets with or without teacher, a box on the grid (often empty), weights; awkward sizes among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, classes = draw(st.integers(1, 5), "B"), draw(st.integers(2, 7), "C")
    rows, cols = draw(st.integers(1, 5), "rows"), draw(st.integers(1, 5), "cols")
    top, left = draw(st.integers(0, rows)), draw(st.integers(0, cols))
    box = (top, left, draw(st.integers(top, rows)), draw(st.integers(left, cols)))
    has_teacher = draw(st.booleans(), "teacher")
    shape = (batch, classes, 2 + rows * cols) if has_teacher else (batch, classes)
    target = rng.dirichlet(np.full(classes, 0.5), size=shape[:1] + shape[2:])
    target = np.moveaxis(target, -1, 1)
    scale = draw(st.sampled_from([1.0, 30.0]), "scale")
    cls, tokens = rng.normal(0, scale, (batch, classes)), rng.normal(0, scale, (batch, rows * cols, classes))
    ground_truth = has_teacher and draw(st.booleans(), "ground truth")
    return cls, tokens, target, box, draw(st.floats(0.1, 2)), draw(st.floats(0, 2)), ground_truth


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_the_published_loss(case):
    cls, tokens, target, box, dense_weight, cls_weight, ground_truth = case
    expected = published_loss(*case)
    logits = [torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in (cls, tokens)]
    loss = TokenLabelLoss(dense_weight, cls_weight, ground_truth)
    terms = loss.terms(logits, torch.tensor(target, dtype=torch.float32), torch.tensor(box))
    assert [term.item() for term in terms] == pytest.approx(expected, rel=2e-5, abs=1e-5)
    assert loss(logits, torch.tensor(target, dtype=torch.float32), torch.tensor(box)) == terms.total
    if box[0] == box[2] or box[1] == box[3]:
        assert loss(logits, torch.tensor(target, dtype=torch.float32)).item() == pytest.approx(
            terms.total.item(), rel=1e-6
        )

    # d loss / d logits = weight * (sum(t) * softmax - t) / rows, by hand
    terms.total.backward()
    mixed = torch.tensor(target[:, :, 1] if target.ndim == 3 else target)
    if ground_truth:
        truth = torch.tensor(target[:, :, 0])
        share = torch.where(mixed.argmax(1) == truth.argmax(1), 0.5, 0.9).double()[:, None]
        mixed = share * mixed + (1 - share) * truth
    kept = 1 - (box[2] - box[0]) * (box[3] - box[1]) / tokens.shape[1]
    mixed = kept * mixed + (1 - kept) * mixed.flip(0)
    of_cls = cls_weight * (torch.tensor(cls).softmax(1) - mixed) / len(cls)
    torch.testing.assert_close(logits[0].grad.double(), of_cls, rtol=1e-4, atol=1e-6)
    rows = torch.tensor(target[:, :, 2:]).transpose(1, 2) if target.ndim == 3 else torch.tensor(target)[:, None]
    of_tokens = dense_weight * (torch.tensor(tokens).softmax(2) - rows) / tokens[:, :, 0].size
    torch.testing.assert_close(logits[1].grad.double(), of_tokens, rtol=1e-4, atol=1e-6)


def test_by_hand():
    """Two images, two classes, four tokens, a box of one of the four tokens; logits 0 make every term log 2."""
    output = torch.zeros(2, 2), torch.zeros(2, 4, 2)
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    box = torch.tensor([0, 0, 1, 1])
    assert TokenLabelLoss()(output, target, box) == pytest.approx(1.5 * math.log(2))
    mixed = mix_class_targets(target, box, num_tokens=4)
    assert mixed.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    sure = torch.tensor([[100.0, 0.0], [0.0, 100.0]]), torch.zeros(2, 4, 2)
    assert TokenLabelLoss(dense_weight=1.0).terms(sure, target, box) == pytest.approx(
        (25 + math.log(2), 25, math.log(2))
    )


def test_the_middle_image_of_an_odd_batch_is_its_own_partner():
    target = torch.eye(3)
    mixed = mix_class_targets(target, torch.tensor([0, 0, 1, 2]), num_tokens=4)
    assert mixed.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]


def test_the_published_rule_for_the_ground_truth():
    """The published code gives a teacher that misses the class 0.9, and one that finds it 0.5; not the reverse."""
    truth = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]])
    blended = blend_ground_truth(teacher, truth)
    torch.testing.assert_close(blended, torch.tensor([[0.8, 0.15, 0.05], [0.37, 0.54, 0.09]]))
    corrected = blend_ground_truth(teacher, truth, corrected=True)
    torch.testing.assert_close(corrected, torch.tensor([[0.8, 0.15, 0.05], [0.93, 0.06, 0.01]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_taken_to_float32_first(dtype):
    generator = torch.Generator().manual_seed(0)
    cls, tokens = (
        30 * torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in [(3, 50), (3, 9, 50)]
    )
    target = torch.rand(3, 50, generator=generator).softmax(1)
    loss = TokenLabelLoss()
    half, full = loss((cls, tokens), target), loss((cls.float(), tokens.float()), target)
    assert half.dtype == torch.float32 and half == full
    gradient = torch.autograd.grad(half, cls)[0]
    assert gradient.dtype == dtype and gradient.isfinite().all()


def test_without_token_term():
    cls, target = torch.randn(2, 3, requires_grad=True), torch.eye(3)[:2]
    for tokens in (None, torch.full((2, 4, 3), torch.nan)):
        terms = TokenLabelLoss(dense_weight=0, cls_weight=0.5).terms((cls, tokens), target)
        expected = soft_cross_entropy(cls, target)
        assert terms == (0.5 * expected, expected, 0)
        terms.total.backward()


def test_what_the_network_gives_is_what_the_loss_takes():
    model = create_model(
        "volo_nano", img_size=32, num_classes=5, layers=(1, 1, 1, 1), embed_dims=(8,) * 4, num_heads=(1,) * 4
    )
    box = torch.tensor([0, 1, 2, 4])
    loss = TokenLabelLoss()(model.train()(torch.randn(3, 3, 32, 32), box), torch.eye(5)[:3], box)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class NoWaiting(TorchDispatchMode):
    """Fails on whatever would make the host wait for the device: reading a value, or a size that depends on one."""

    WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "item"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITS, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("slots", [None, 2 + 4])
def test_the_device_is_never_waited_for(slots):
    target = torch.rand(2, 3) if slots is None else torch.rand(2, 3, slots)
    output = torch.randn(2, 3), torch.randn(2, 4, 3)
    box = torch.tensor([0, 0, 1, 2])
    with pytest.raises(AssertionError), NoWaiting():
        box[0].item()
    with NoWaiting():
        TokenLabelLoss(ground_truth=slots is not None).terms(output, target, box)


@pytest.mark.parametrize(
    ("cls", "tokens", "target", "options", "box", "message"),
    [
        ((2, 3), (2, 4, 3), (2, 5), {}, False, r"targets of \(2, 5\) do not fit class logits \(2, 3\)"),
        ((2, 3), (2, 4, 3), (3, 3), {}, False, r"targets of \(3, 3\) do not fit"),
        ((2, 3), (2, 4, 3), (3, 2, 6), {}, False, r"targets of \(3, 2\) do not fit"),
        ((2, 3), (2, 4, 3), (2, 3, 7), {}, False, "targets are for 5 tokens and the network has 4"),
        ((2, 3), (2, 4, 3), (2, 3, 1), {}, False, r"\[B, C\] or \[B, C, 2 \+ N\]; these are \(2, 3, 1\)"),
        ((2, 3), (2, 4, 3), (2,), {}, False, r"these are \(2,\)"),
        ((2, 3), None, (2, 3), {}, False, "no token logits; use dense_weight=0"),
        ((2, 3), None, (2, 3), {"dense_weight": 0}, True, "MixToken box was given"),
    ],
)
def test_shapes_that_do_not_fit(cls, tokens, target, options, box, message):
    output = torch.zeros(cls), tokens and torch.zeros(tokens)
    with pytest.raises(ValueError, match=message):
        TokenLabelLoss(**options)(output, torch.zeros(target), torch.tensor([0, 0, 1, 1]) if box else None)


def test_targets_without_a_teacher_are_the_ground_truth_already():
    cls, tokens, target = torch.randn(3, 4), torch.randn(3, 2, 4), torch.rand(3, 4).softmax(-1)
    plain = TokenLabelLoss()((cls, tokens), target)
    assert torch.equal(TokenLabelLoss(ground_truth=True)((cls, tokens), target), plain)
