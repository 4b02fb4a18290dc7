"""The targets of the loss: class targets, dense token targets, and sparse token targets.

All three have ``shape`` (B, C), ``num_tokens`` (None if every token takes the class target), ``truth`` and ``teacher``
[B, C] (``teacher`` is None if there are no label maps), and the methods ``token_loss``, ``mixed``, ``to_dense`` and
``seen``. B images, C classes, N tokens, M listed classes per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from volo.data.mixing import Mix, mix_targets, token_shares


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over rows of ``-sum(target * log_softmax(logits))``; both [..., C]. Computed in float32."""
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    return -(target * log_probabilities).sum(-1).mean()


@dataclass
class ClassTargets:
    """Targets of images without label maps: ``truth`` [B, C] is the target of the class token and of every token."""

    truth: Tensor
    teacher: None = None
    num_tokens: int | None = None

    @property
    def shape(self) -> torch.Size:
        """(B, C)."""
        return self.truth.shape

    def to_dense(self) -> Tensor:
        """Return [B, C]."""
        return self.truth

    def seen(self) -> None:
        """Return None: no token has its own target."""

    def token_loss(self, logits: Tensor) -> Tensor:
        """Return the mean cross entropy over all tokens; ``logits`` [B, N, C]."""
        return soft_cross_entropy(logits, self.truth.unsqueeze(1))

    def mixed(self, mix: Mix, grid: tuple[int, int], image_hw: tuple[int, int]) -> "ClassTargets":
        """Return the targets of images that were mixed by ``mix``."""
        return ClassTargets(mix_targets(self.truth, mix))


@dataclass
class DenseTargets:
    """Targets as the published code builds them: ``values`` [B, C, 2 + N] are truth, teacher, and N tokens."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """(B, C)."""
        return self.values.shape[:2]

    @property
    def num_tokens(self) -> int | None:
        """N."""
        return self.values.shape[2] - 2

    @property
    def truth(self) -> Tensor:
        """The image's own label, [B, C]."""
        return self.values[:, :, 0]

    @property
    def teacher(self) -> Tensor:
        """The teacher's view of the crop, [B, C]."""
        return self.values[:, :, 1]

    def to_dense(self) -> Tensor:
        """Return [B, C, 2 + N]."""
        return self.values

    def seen(self) -> Tensor:
        """Return bool [B, N], all true: the published code counts every token."""
        return torch.ones_like(self.values[:, 0, 2:], dtype=torch.bool)

    def token_loss(self, logits: Tensor) -> Tensor:
        """Return the mean cross entropy over all tokens; ``logits`` [B, N, C]."""
        return soft_cross_entropy(logits, self.values[:, :, 2:].transpose(1, 2))

    def mixed(self, mix: Mix, grid: tuple[int, int], image_hw: tuple[int, int]) -> "DenseTargets":
        """Return the targets of mixed images: every token takes the image's ratio, as in the published code."""
        return DenseTargets(mix_targets(self.values, mix))


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

    @property
    def shape(self) -> torch.Size:
        """(B, C)."""
        return self.truth.shape

    @property
    def num_tokens(self) -> int | None:
        """N."""
        return self.background.shape[1]

    def to_dense(self) -> Tensor:
        """Return [B, C, 2 + N]: truth, teacher, tokens, as the published code builds them."""
        num_classes = self.truth.shape[1]
        tokens = self.background[..., None].expand(-1, -1, num_classes).contiguous()  # [B, N, C]
        tokens = tokens.scatter_add(2, self.classes, self.excess)
        return torch.cat([self.truth[..., None], self.teacher[..., None], tokens.transpose(1, 2)], dim=2)

    def seen(self) -> Tensor:
        """Return which tokens see their image, bool [B, N]."""
        return self.mass > 0

    def token_loss(self, logits: Tensor) -> Tensor:
        """Return the mean cross entropy over the tokens that see their image; ``logits`` [B, N, C].

        The same value as with the dense targets, which are never made: the shared background needs only the sum over
        classes, and the excess only the logits of the listed classes. Computed in float32.
        """
        logits = logits.float()
        listed = logits.gather(2, self.classes)  # [B, N, M]
        per_token = (
            logits.logsumexp(2) * self.mass - self.background * logits.sum(2) - (self.excess * listed).sum(2)
        )  # [B, N]
        return per_token.sum() / (self.mass.sum() / self.full_mass).clamp_min(1)

    def mixed(self, mix: Mix, grid: tuple[int, int], image_hw: tuple[int, int]) -> "TokenTargets":
        """Return the targets of mixed images: each token takes the share of its own pixels.

        Args:
            mix: How the images were mixed.
            grid: (rows, columns) of the final token grid.
            image_hw: Size of the network's input, in pixels.
        """
        device = self.truth.device
        shares = (mix.lam, token_shares(mix, grid, image_hw))  # [B], [B, N], on the host
        # A blocking copy would wait for all that the device still has to do.
        return self.blended(*(share.float().to(device, non_blocking=True) for share in shares))

    def blended(self, lam: Tensor, token_lam: Tensor) -> "TokenTargets":
        """Return the targets blended with those of the reversed batch.

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


Targets = ClassTargets | DenseTargets | TokenTargets


def as_targets(target: Tensor | Targets) -> Targets:
    """Return targets; a tensor [B, C] or [B, C, 2 + N] is wrapped, anything else is returned as it is.

    Raises:
        ValueError: A tensor of another shape.
    """
    if not isinstance(target, Tensor):
        return target
    if target.ndim == 2:
        return ClassTargets(target)
    if target.ndim == 3 and target.shape[2] >= 2:
        return DenseTargets(target)
    raise ValueError(f"targets are [B, C] or [B, C, 2 + N]; these are {tuple(target.shape)}")


def smoothing_terms(smoothing: float, num_classes: int, published: bool) -> tuple[float, float]:
    """Return a and b of the smoothed teacher's targets, a t + b.

    Args:
        smoothing: Share s of the uniform distribution.
        num_classes: C.
        published: t (1 - s + s / C) + s / C, whose rows sum to 1 + s / C, as in the published code; else
            t (1 - s) + s / C, whose rows sum to 1.
    """
    uniform = smoothing / num_classes
    return 1 - smoothing + (uniform if published else 0.0), uniform
