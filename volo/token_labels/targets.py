"""Token-label targets on the device: sparse, and dense where somebody wants to see them.

The target of a token is softmax over all C classes of a few pooled teacher scores, every other class scoring 0. So
it is a background probability that all classes share, plus an excess on M listed ones; the [B, C, 2 + N] tensor of
the published code (100 MB for 128 images at 1,000 classes) never has to be made. B images, C classes, N tokens,
k scores a cell, S = h * w cells, Q cells a token, M = Q * k listed classes a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from volo.token_labels.aligned import TokenCells
from volo.token_labels.published import smoothing_terms


@dataclass
class TokenLabelBatch:
    """The label maps of a batch and what each token takes from them, on the host; see ``TokenCells``.

    Args:
        scores: float32 [B, k, S].
        classes: int64 [B, k, S].
        cells: int64 [B, N, Q].
        weights: float32 [B, N, Q].
        class_weights: float32 [B, S].
        valid: bool [B, N].
    """

    scores: Tensor
    classes: Tensor
    cells: Tensor
    weights: Tensor
    class_weights: Tensor
    valid: Tensor

    @classmethod
    def collate(cls, samples: Sequence[TokenCells]) -> "TokenLabelBatch":
        """Stack samples; maps of fewer cells, and tokens of fewer cells, are filled up with weight 0."""
        columns = {}
        for name in TokenCells._fields:
            arrays = [getattr(sample, name) for sample in samples]
            shape = np.max([array.shape for array in arrays], axis=0)
            stacked = np.zeros((len(arrays), *shape), dtype=arrays[0].dtype)
            for row, array in zip(stacked, arrays, strict=True):
                row[tuple(slice(side) for side in array.shape)] = array
            columns[name] = torch.from_numpy(stacked)
        return cls(**columns)

    def map(self, function) -> "TokenLabelBatch":
        """Return a copy with ``function`` applied to every tensor."""
        return TokenLabelBatch(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


@dataclass
class TokenTargets:
    """Targets of the class token and of every token of B images.

    The target of token n for class c is ``background[n]`` plus the sum of ``excess[n, m]`` over the m with
    ``classes[n, m] == c``; a class may be listed several times. It sums to ``mass[n]``, which is 0 for a token that
    sees nothing of its image.

    Args:
        truth: [B, C], the image's own label.
        teacher: [B, C], the teacher's view of the crop.
        classes: int64 [B, N, M].
        excess: [B, N, M].
        background: [B, N].
        mass: [B, N].
        full_mass: What the target of a token that sees its image sums to.
    """

    truth: Tensor
    teacher: Tensor
    classes: Tensor
    excess: Tensor
    background: Tensor
    mass: Tensor
    full_mass: float = 1.0

    def to_dense(self) -> Tensor:
        """Return [B, C, 2 + N]: truth, teacher, tokens, as the published code builds them."""
        num_classes = self.truth.shape[1]
        tokens = self.background[..., None].expand(-1, -1, num_classes).contiguous()  # [B, N, C]
        tokens = tokens.scatter_add(2, self.classes, self.excess)
        return torch.cat([self.truth[..., None], self.teacher[..., None], tokens.transpose(1, 2)], dim=2)

    def mixed(self, lam: Tensor, token_lam: Tensor) -> "TokenTargets":
        """Return the targets mixed with those of the reversed batch.

        Args:
            lam: Own share of each image's class targets, [B].
            token_lam: Own share of each token's target, [B, N].
        """
        own, other = lam[:, None], 1 - lam[:, None]
        mine, theirs = token_lam, 1 - token_lam
        return TokenTargets(
            truth=own * self.truth + other * self.truth.flip(0),
            teacher=own * self.teacher + other * self.teacher.flip(0),
            classes=torch.cat([self.classes, self.classes.flip(0)], dim=2),
            excess=torch.cat([mine[..., None] * self.excess, theirs[..., None] * self.excess.flip(0)], dim=2),
            background=mine * self.background + theirs * self.background.flip(0),
            mass=mine * self.mass + theirs * self.mass.flip(0),
            full_mass=self.full_mass,
        )


def token_targets(labels: TokenLabelBatch, truth: Tensor, smoothing: float, published_smoothing: bool) -> TokenTargets:
    """Build the targets of a batch, on the device that ``labels`` is on.

    Args:
        labels: The batch's label maps.
        truth: Class targets [B, C] of the images' own labels, smoothed.
        smoothing, published_smoothing: See :func:`volo.token_labels.published.smoothing_terms`.
    """
    num_classes = truth.shape[1]
    scale, uniform = smoothing_terms(smoothing, num_classes, published_smoothing)

    batch, num_tokens, per_token = labels.cells.shape
    k = labels.scores.shape[1]
    flat = labels.cells.reshape(batch, 1, -1).expand(-1, k, -1)  # [B, k, N * Q]
    entries = (batch, k, num_tokens, per_token)
    scores = labels.scores.gather(2, flat).reshape(entries) * labels.weights[:, None]  # [B, k, N, Q]
    classes = labels.classes.gather(2, flat).reshape(entries)
    scores = scores.permute(0, 2, 3, 1).flatten(2)  # [B, N, M]
    classes = classes.permute(0, 2, 3, 1).flatten(2)  # [B, N, M]
    classes, pooled, listed = _sum_by_class(classes, scores)

    # softmax over C classes of which all but the listed score 0
    top = pooled.amax(-1, keepdim=True).clamp_min(0)  # [B, N, 1]
    powers = torch.where(listed, (pooled - top).exp(), 0)
    rest = (-top).exp()  # of one class that is not listed
    total = powers.sum(-1, keepdim=True) + (num_classes - listed.sum(-1, keepdim=True)) * rest
    background = rest / total  # [B, N, 1]
    excess = torch.where(listed, powers / total - background, 0)

    seen = labels.valid.to(truth.dtype)  # [B, N]
    full_mass = scale + num_classes * uniform
    return TokenTargets(
        truth=truth,
        teacher=_teacher_targets(labels, num_classes) * scale + uniform,
        classes=classes,
        excess=scale * excess * seen[..., None],
        background=(scale * background.squeeze(-1) + uniform) * seen,
        mass=full_mass * seen,
        full_mass=full_mass,
    )


def _teacher_targets(labels: TokenLabelBatch, num_classes: int) -> Tensor:
    """Return softmax of the scores pooled over the whole crop, [B, C]."""
    pooled = labels.scores.new_zeros(len(labels.scores), num_classes)
    weighted = labels.scores * labels.class_weights[:, None]  # [B, k, S]
    return pooled.scatter_add_(1, labels.classes.flatten(1), weighted.flatten(1)).softmax(-1)


def _sum_by_class(classes: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum ``values`` of equal ``classes`` along the last axis.

    Returns classes and sums, of the same shape, and which places are in use; the others hold class 0 and sum 0.
    """
    classes, order = classes.sort(dim=-1)
    is_new = torch.ones_like(classes, dtype=torch.bool)
    is_new[..., 1:] = classes[..., 1:] != classes[..., :-1]
    place = is_new.cumsum(-1) - 1
    sums = torch.zeros_like(values).scatter_add_(-1, place, values.gather(-1, order))
    names = torch.zeros_like(classes).scatter_(-1, place, classes)
    count = place[..., -1:] + 1
    return names, sums, torch.arange(classes.shape[-1], device=classes.device) < count
