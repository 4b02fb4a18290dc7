"""Losses of token labeling (arXiv 2104.10858): one term on the class token, one on every token.

B images, C classes, N tokens of the final grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from volo.token_labels.targets import Targets, as_targets, soft_cross_entropy


class LossTerms(NamedTuple):
    """The loss and its parts before weighting, each a scalar tensor."""

    total: Tensor
    cls: Tensor
    dense: Tensor


def mix_class_targets(target: Tensor, mix_box: Tensor, num_tokens: int) -> Tensor:
    """Mix class targets [B, C] by the share of the token grid that MixToken took from the reversed batch.

    ``mix_box`` is (top, left, bottom, right) on the grid of ``num_tokens`` cells; an empty box mixes nothing.
    """
    top, left, bottom, right = mix_box.unbind()
    kept = 1 - ((bottom - top) * (right - left)).to(target.dtype) / num_tokens
    return kept * target + (1 - kept) * target.flip(0)


class TokenLabelLoss(nn.Module):
    """Soft-target cross entropy on the class token plus ``dense_weight`` times that on the tokens.

    Args:
        dense_weight: Weight of the token term; 0 leaves it out (the network may then have no token head).
        cls_weight: Weight of the class term.
        ground_truth: Blend the image's own label into the class target, as fine-tuning does, if the targets have a
            teacher in them ([B, C] are the own labels already). See :func:`blend_ground_truth`.
        corrected_ratio: Give the image's own label more weight, not less, if the teacher misses it.
    """

    def __init__(
        self,
        dense_weight: float = 0.5,
        cls_weight: float = 1.0,
        ground_truth: bool = False,
        corrected_ratio: bool = False,
    ):
        super().__init__()
        self.dense_weight = dense_weight
        self.cls_weight = cls_weight
        self.ground_truth = ground_truth
        self.corrected_ratio = corrected_ratio

    def forward(self, output, target: Tensor | Targets, mix_box: Tensor | None = None) -> Tensor:
        """Return the weighted loss; arguments as in :meth:`terms`."""
        return self.terms(output, target, mix_box).total

    def terms(self, output, target: Tensor | Targets, mix_box: Tensor | None = None) -> LossTerms:
        """Return the loss and its two terms.

        Args:
            output: ``TokenLogits`` or a pair (cls [B, C], tokens [B, N, C]); the tokens are un-mixed.
            target: [B, C], used for the class token and for every token; [B, C, 2 + N] with the ground truth, the
                teacher's class target and the teacher's N token targets along the last axis; or any of
                :mod:`volo.token_labels.targets`.
            mix_box: int [4] (top, left, bottom, right) of MixToken on the final token grid, or None.

        Raises:
            ValueError: The shapes do not fit together.
        """
        cls_logits, token_logits = output
        targets = as_targets(target)
        self._check(cls_logits, token_logits, targets)
        cls_target = self._class_target(targets)
        if mix_box is not None:
            if token_logits is None:
                raise ValueError("a MixToken box was given, but the output has no token logits to count its area on")
            cls_target = mix_class_targets(cls_target, mix_box, num_tokens=token_logits.shape[1])

        cls = soft_cross_entropy(cls_logits, cls_target)
        if self.dense_weight == 0:
            return LossTerms(self.cls_weight * cls, cls, torch.zeros_like(cls))
        dense = targets.token_loss(token_logits)
        return LossTerms(self.cls_weight * cls + self.dense_weight * dense, cls, dense)

    def _class_target(self, targets: Targets) -> Tensor:
        """Return the class target [B, C]."""
        if targets.teacher is None:
            return targets.truth
        if self.ground_truth:
            return blend_ground_truth(targets.teacher, targets.truth, self.corrected_ratio)
        return targets.teacher

    def _check(self, cls_logits: Tensor, token_logits: Tensor | None, targets: Targets) -> None:
        """Raise ValueError if logits and targets do not fit together."""
        if self.dense_weight and token_logits is None:
            raise ValueError("the output has no token logits; use dense_weight=0 or a network with a token head")
        if targets.shape != cls_logits.shape:
            raise ValueError(
                f"targets of {tuple(targets.shape)} do not fit class logits {tuple(cls_logits.shape)}: the first two "
                "axes are images and classes"
            )
        tokens = token_logits.shape[1] if token_logits is not None else None
        if self.dense_weight and targets.num_tokens not in (None, tokens):
            raise ValueError(
                f"the targets are for {targets.num_tokens} tokens and the network has {tokens}: make the labels for "
                "its final grid"
            )


def blend_ground_truth(teacher: Tensor, truth: Tensor, corrected: bool = False) -> Tensor:
    """Blend teacher and ground-truth class targets [B, C]: share * teacher + (1 - share) * truth.

    The teacher's share is 0.5 if it predicts the true class. If not, the published code uses 0.9, although its comment
    says to trust such a teacher less; its fine-tuning results rest on that. ``corrected`` uses 0.1.
    """
    agree = teacher.argmax(-1) == truth.argmax(-1)
    share = torch.where(agree, 0.5, 0.1 if corrected else 0.9).to(teacher.dtype).unsqueeze(-1)
    return share * teacher + (1 - share) * truth
