"""Losses of token labeling (arXiv 2104.10858): one term on the class token, one on every token.

B images, C classes, N tokens of the final grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LossTerms(NamedTuple):
    """The loss and its parts before weighting, each a scalar tensor."""

    total: Tensor
    cls: Tensor
    dense: Tensor


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over rows of ``-sum(target * log_softmax(logits))``; both [..., C]. Computed in float32."""
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    return -(target * log_probabilities).sum(-1).mean()


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
        ground_truth: Class target r * teacher + (1 - r) * ground truth with r = 0.5 where both agree on the class
            and 0.9 where they do not, as the published fine-tuning does. Needs targets [B, C, 2 + N].
    """

    def __init__(self, dense_weight: float = 0.5, cls_weight: float = 1.0, ground_truth: bool = False):
        super().__init__()
        self.dense_weight = dense_weight
        self.cls_weight = cls_weight
        self.ground_truth = ground_truth

    def forward(self, output, target: Tensor, mix_box: Tensor | None = None) -> Tensor:
        """Return the weighted loss; arguments as in :meth:`terms`."""
        return self.terms(output, target, mix_box).total

    def terms(self, output, target: Tensor, mix_box: Tensor | None = None) -> LossTerms:
        """Return the loss and its two terms.

        Args:
            output: ``TokenLogits`` or a pair (cls [B, C], tokens [B, N, C]); the tokens are un-mixed.
            target: [B, C], used for the class token and for every token; or [B, C, 2 + N] with the ground truth,
                the teacher's class target and the teacher's N token targets along the last axis.
            mix_box: int [4] (top, left, bottom, right) of MixToken on the final token grid, or None.

        Raises:
            ValueError: the shapes do not fit together.
        """
        cls_logits, token_logits = output
        cls_target, token_target = self._split(cls_logits, token_logits, target)
        if mix_box is not None:
            if token_logits is None:
                raise ValueError("a MixToken box was given, but the output has no token logits to count its area on")
            cls_target = mix_class_targets(cls_target, mix_box, num_tokens=token_logits.shape[1])

        cls = soft_cross_entropy(cls_logits, cls_target)
        if self.dense_weight == 0:
            return LossTerms(self.cls_weight * cls, cls, torch.zeros_like(cls))
        dense = soft_cross_entropy(token_logits, token_target)
        return LossTerms(self.cls_weight * cls + self.dense_weight * dense, cls, dense)

    def _split(self, cls_logits: Tensor, token_logits: Tensor | None, target: Tensor):
        """Return the class target [B, C] and the token target, [B, 1, C] or [B, N, C]."""
        if target.shape[:2] != cls_logits.shape:
            raise ValueError(
                f"targets {tuple(target.shape)} do not fit class logits {tuple(cls_logits.shape)}: the first two "
                "axes are images and classes"
            )
        if self.dense_weight and token_logits is None:
            raise ValueError("the output has no token logits; use dense_weight=0 or a network with a token head")
        if target.ndim == 2:
            if self.ground_truth:
                raise ValueError("ground_truth=True needs targets [B, C, 2 + N]; these are [B, C]")
            return target, target.unsqueeze(1)

        slots = target.shape[2] - 2
        if target.ndim != 3 or slots < 0 or (self.dense_weight and slots != token_logits.shape[1]):
            tokens = "no token logits" if token_logits is None else f"{token_logits.shape[1]} tokens"
            raise ValueError(f"targets {tuple(target.shape)} do not fit {tokens}: [B, C, 2 + N] is needed")
        cls_target = target[:, :, 1]
        if self.ground_truth:
            cls_target = blend_ground_truth(target[:, :, 1], target[:, :, 0])
        return cls_target, target[:, :, 2:].transpose(1, 2)


def blend_ground_truth(teacher: Tensor, truth: Tensor) -> Tensor:
    """Blend teacher and ground-truth class targets [B, C] by the published rule.

    The teacher's share is 0.5 where it names the true class and 0.9 where it does not. The published comment
    intends the reverse; the published code does this, and its fine-tuning results rest on it.
    """
    agree = teacher.argmax(-1) == truth.argmax(-1)
    share = torch.where(agree, 0.5, 0.9).to(teacher.dtype).unsqueeze(-1)
    return share * teacher + (1 - share) * truth
