"""Losses of token labeling (arXiv 2104.10858): one term on the class token, one on every token.

B images, C classes, N tokens of the final grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volo.token_labels.targets import TokenTargets


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


def token_cross_entropy(logits: Tensor, targets: TokenTargets) -> Tensor:
    """Return the mean cross entropy over the tokens that see their image; ``logits`` [B, N, C], computed in float32.

    The same value as :func:`soft_cross_entropy` with the dense targets, without ever making them: the shared
    background needs the sum over classes only, and the excess the logits of the listed classes.
    """
    logits = logits.float()
    listed = logits.gather(2, targets.classes)  # [B, N, M]
    per_token = (
        logits.logsumexp(2) * targets.mass - targets.background * logits.sum(2) - (targets.excess * listed).sum(2)
    )  # [B, N]
    return per_token.sum() / (targets.mass.sum() / targets.full_mass).clamp_min(1)


class TokenLabelLoss(nn.Module):
    """Soft-target cross entropy on the class token plus ``dense_weight`` times that on the tokens.

    Args:
        dense_weight: Weight of the token term; 0 leaves it out (the network may then have no token head).
        cls_weight: Weight of the class term.
        ground_truth: Blend the image's own label into the class target, as fine-tuning does, where the targets have a
            teacher in them ([B, C] are the own labels already). See :func:`blend_ground_truth`.
        corrected_ratio: Give the image's own label more weight, not less, where the teacher misses it.
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

    def forward(self, output, target: Tensor | TokenTargets, mix_box: Tensor | None = None) -> Tensor:
        """Return the weighted loss; arguments as in :meth:`terms`."""
        return self.terms(output, target, mix_box).total

    def terms(self, output, target: Tensor | TokenTargets, mix_box: Tensor | None = None) -> LossTerms:
        """Return the loss and its two terms.

        Args:
            output: ``TokenLogits`` or a pair (cls [B, C], tokens [B, N, C]); the tokens are un-mixed.
            target: [B, C], used for the class token and for every token; [B, C, 2 + N] with the ground truth, the
                teacher's class target and the teacher's N token targets along the last axis; or the same, sparse.
            mix_box: int [4] (top, left, bottom, right) of MixToken on the final token grid, or None.

        Raises:
            ValueError: the shapes do not fit together.
        """
        cls_logits, token_logits = output
        self._check(cls_logits, token_logits, target)
        cls_target = self._class_target(target)
        if mix_box is not None:
            if token_logits is None:
                raise ValueError("a MixToken box was given, but the output has no token logits to count its area on")
            cls_target = mix_class_targets(cls_target, mix_box, num_tokens=token_logits.shape[1])

        cls = soft_cross_entropy(cls_logits, cls_target)
        if self.dense_weight == 0:
            return LossTerms(self.cls_weight * cls, cls, torch.zeros_like(cls))
        if isinstance(target, TokenTargets):
            dense = token_cross_entropy(token_logits, target)
        elif target.ndim == 2:
            dense = soft_cross_entropy(token_logits, target.unsqueeze(1))
        else:
            dense = soft_cross_entropy(token_logits, target[:, :, 2:].transpose(1, 2))
        return LossTerms(self.cls_weight * cls + self.dense_weight * dense, cls, dense)

    def _class_target(self, target: Tensor | TokenTargets) -> Tensor:
        """Return the class target [B, C]."""
        if isinstance(target, TokenTargets):
            truth, teacher = target.truth, target.teacher
        elif target.ndim == 2:
            return target
        else:
            truth, teacher = target[:, :, 0], target[:, :, 1]
        return blend_ground_truth(teacher, truth, self.corrected_ratio) if self.ground_truth else teacher

    def _check(self, cls_logits: Tensor, token_logits: Tensor | None, target: Tensor | TokenTargets) -> None:
        """Raise ValueError where logits and targets do not fit together."""
        if self.dense_weight and token_logits is None:
            raise ValueError("the output has no token logits; use dense_weight=0 or a network with a token head")
        tokens = token_logits.shape[1] if token_logits is not None else None
        if isinstance(target, TokenTargets):
            shape, slots = target.truth.shape, target.background.shape[1]
        else:
            shape = target.shape[:2]
            slots = target.shape[2] - 2 if target.ndim == 3 else None
            if target.ndim not in (2, 3) or (slots is not None and slots < 0):
                raise ValueError(f"targets are [B, C] or [B, C, 2 + N]; these are {tuple(target.shape)}")
        if shape != cls_logits.shape:
            raise ValueError(
                f"targets of {tuple(shape)} do not fit class logits {tuple(cls_logits.shape)}: the first two axes are "
                "images and classes"
            )
        if self.dense_weight and slots is not None and slots != tokens:
            raise ValueError(
                f"the targets are for {slots} tokens and the network has {tokens}: make the labels for its final grid"
            )


def blend_ground_truth(teacher: Tensor, truth: Tensor, corrected: bool = False) -> Tensor:
    """Blend teacher and ground-truth class targets [B, C]: share * teacher + (1 - share) * truth.

    The teacher's share is 0.5 where it names the true class. Where it does not, the published code takes 0.9,
    although its comment means to trust such a teacher less; its fine-tuning results rest on that. ``corrected``
    takes 0.1.
    """
    agree = teacher.argmax(-1) == truth.argmax(-1)
    share = torch.where(agree, 0.5, 0.1 if corrected else 0.9).to(teacher.dtype).unsqueeze(-1)
    return share * teacher + (1 - share) * truth
