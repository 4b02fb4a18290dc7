"""A teacher: a classifier that also classifies each cell of its last feature map.

The classifier that follows the pooling is applied to every cell, as a 1x1 convolution would be (arXiv 2104.10858). If
pooling is a mean and only a linear layer follows it, the mean over the cells is the network's own prediction.
B images of H x W pixels, C classes, h x w cells, N = h * w tokens, P prefix tokens (class token and the like), D
channels of the features.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from volo.models import VOLO
from volo.token_labels.generation.teacher_input import TeacherInput


class TeacherLogits(NamedTuple):
    """Logits of each cell [B, h, w, C], and of the whole image [B, C]."""

    cells: Tensor
    image: Tensor


@dataclass
class Teacher:
    """A network and the preprocessing of its images.

    Args:
        name: The name that the user gave.
        model: A module in evaluation mode, with ``forward_features``.
        classify: Returns the logits from the model, its features and (H, W).
        num_classes: C.
        input: The size of its input.
        mean, std: Normalisation of each channel, in [0, 1].
    """

    name: str
    model: Any
    classify: Callable[[Any, Tensor, tuple[int, int]], TeacherLogits]
    num_classes: int
    input: TeacherInput
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    @torch.inference_mode()
    def __call__(self, images: Tensor, autocast: Callable = nullcontext) -> TeacherLogits:
        """Classify normalised images [B, 3, H, W]; the features under ``autocast``, the classifier in its own dtype."""
        with autocast():
            features = self.model.forward_features(images)
        if not isinstance(features, Tensor):
            raise ValueError(
                f"--teacher {self.name} has no single feature map (its features are a {type(features).__name__}), so "
                "it cannot label cells; take another teacher"
            )
        features = features.to(next(self.model.parameters()).dtype)
        return self.classify(self.model, features, (images.shape[-2], images.shape[-1]))

    def check(self, device: torch.device) -> tuple[int, int]:
        """Label one black image; return the (rows, columns) of its map. ValueError if that fails."""
        size = self.input.image_hw
        try:
            cells = self(torch.zeros(1, 3, *size, device=device)).cells
        except (RuntimeError, AssertionError) as error:  # networks refuse a size in various ways
            raise ValueError(
                f"--teacher {self.name} fails on an image of {size[0]}x{size[1]}: {first_line(error)}; try another "
                "--img_size"
            ) from error
        if cells.shape[1] * cells.shape[2] < 2:
            raise ValueError(
                f"--teacher {self.name} has one cell for an image of {size[0]}x{size[1]}, which is not a map; give a "
                "larger --img_size, or another teacher"
            )
        return cells.shape[1], cells.shape[2]

    def full_name(self) -> str:
        """Return the name to store with its labels, which differs between two teachers of one architecture."""
        return f"{self.name}, weights {self.fingerprint()[:12]}"

    def fingerprint(self) -> str:
        """Return the SHA-256 of its weights, which tells whether two runs have the same teacher."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ logits of cells


def volo_logits(model: VOLO, features: Tensor, image_hw: tuple[int, int]) -> TeacherLogits:
    """Classify tokens with the token head, or with the class head of a VOLO that has no token head."""
    if model.cls_token is None:
        cells = model.head(features)  # [B, N, C]
        image = model.head(features.mean(1))  # [B, C]
    elif model.aux_head is None:
        cells, image = model.head(features[:, 1:]), model.head(features[:, 0])
    else:
        cells = model.aux_head(features[:, 1:])  # [B, N, C]
        image = model.head(features[:, 0]) + 0.5 * cells.amax(1)  # [B, C]
    return TeacherLogits(cells.unflatten(1, model.grid_size), image)


def timm_logits(model: Any, features: Tensor, image_hw: tuple[int, int]) -> TeacherLogits:
    """Classify cells with timm's own head: each cell is passed to it as if it were an image of one cell.

    So everything that a model does after pooling (norm, convolution, several heads) is done to the cell. A token is
    passed with copies of itself as prefix tokens, because some models take a prefix token for the pooled vector, and
    others the mean of the remaining tokens.
    """
    image = model.forward_head(features)  # [B, C]
    if features.ndim == 3:
        if hasattr(model, "aux_head"):  # timm's VOLO: as ours
            cells = model.aux_head(features[:, 1:])  # [B, N, C]
            return TeacherLogits(cells.unflatten(1, token_grid(model, cells.shape[1], image_hw)), image)
        prefix = getattr(model, "num_prefix_tokens", 0)
        grid = token_grid(model, features.shape[1] - prefix, image_hw)
        tokens = features[:, prefix:].flatten(0, 1)  # [B * N, D]
        cells = model.forward_head(tokens[:, None].expand(-1, 1 + prefix, -1))  # [B * N, C]
    elif getattr(model, "output_fmt", "NCHW") == "NHWC":
        grid = features.shape[1:3]
        cells = model.forward_head(features.flatten(0, 2)[:, None, None])  # [B * N, C]
    else:
        grid = features.shape[2:]
        cells = features.permute(0, 2, 3, 1).flatten(0, 2)  # [B * N, D]
        cells = model.forward_head(cells[:, :, None, None])  # [B * N, C]
    return TeacherLogits(cells.unflatten(0, (-1, *grid)), image)


def token_grid(model: nn.Module, num_tokens: int, image_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) of ``num_tokens`` tokens; ValueError if they form no grid of the image's shape."""
    grid = tuple(getattr(getattr(model, "patch_embed", None), "grid_size", None) or ())
    if len(grid) == 2 and math.prod(grid) == num_tokens:
        return grid
    rows = round(math.sqrt(num_tokens * image_hw[0] / image_hw[1]))
    if num_tokens < 2 or rows < 1 or num_tokens % rows:
        raise ValueError(
            f"--teacher: {num_tokens} tokens form no grid over an input of {image_hw[0]}x{image_hw[1]}, so there is no "
            "label map; take another teacher"
        )
    return rows, num_tokens // rows


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
