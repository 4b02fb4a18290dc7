"""Labelling: images go to the teacher, and the best classes of each cell come back.

B images of H x W pixels, C classes, k top scores per cell, h x w cells of a map.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from volo.data.pixels.decode import UnreadableImage
from volo.data.sources.records import ImageRecords
from volo.token_labels.generation.label_blocks import LabelBlock
from volo.token_labels.generation.teacher import Teacher
from volo.token_labels.generation.teacher_input import Chunk
from volo.token_labels.store import TokenLabelMap


class _Labelled(NamedTuple):
    """Results of one forward pass, on the device: scores and classes [B, k, h, w], top-1 and top-5 hits [2]."""

    indices: list[int]
    scores: Tensor
    classes: Tensor
    correct: Tensor


class Labeller:
    """Labels the images of one block after another.

    Args:
        teacher: Its model is on ``device``.
        records: The images.
        device: Where to compute.
        autocast: Gives the autocast context of the features.
        top_k: k.
        batch_size: Largest number of images in a forward pass.
        on_error: What an unreadable image does: "fail" or "skip".
    """

    def __init__(
        self,
        teacher: Teacher,
        records: ImageRecords,
        device: torch.device,
        autocast: Callable,
        top_k: int,
        batch_size: int,
        on_error: str,
    ):
        self.teacher = teacher
        self.records = records
        self.device = device
        self.autocast = autocast
        self.top_k = top_k
        self.batch_size = batch_size
        self.on_error = on_error
        mean, std = (torch.tensor(values, device=device) * 255 for values in (teacher.mean, teacher.std))
        self._mean, self._std = mean.view(3, 1, 1), std.view(3, 1, 1)

    def block(self, chunks: Iterable[Chunk], on_images: Callable[[int], None] = lambda images: None) -> LabelBlock:
        """Label the images of one block.

        Images of one size share a forward pass; they wait for one another, but never beyond the block.

        Args:
            chunks: All images of the block.
            on_images: Called now and then with the number of images just labelled or skipped, for a progress bar.

        Raises:
            UnreadableImage: An image is unreadable, and ``on_error`` is "fail".
            ValueError: A score of the teacher is not finite, or the device has too little memory.
        """
        waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        done: list[_Labelled] = []
        skipped: dict[int, str] = {}
        for chunk in chunks:
            skipped |= chunk.skipped
            if skipped and self.on_error == "fail":
                raise UnreadableImage(
                    f"{next(iter(skipped.values()))}; replace or remove the file, or give --on_error skip, which "
                    "lists unreadable images and gives them no label"
                )
            for index, pixels in chunk.images():
                group = waiting.setdefault(tuple(pixels.shape), [])
                group.append((index, pixels))
                if len(group) == self.batch_size:
                    done.append(self._label(waiting.pop(tuple(pixels.shape))))
                    on_images(len(group))
        for group in waiting.values():
            done.append(self._label(group))
            on_images(len(group))
        if skipped:
            on_images(len(skipped))
        # The host waits for the device only here.
        labels = [pair for labelled in done for pair in self._maps(labelled)]
        correct = sum((labelled.correct for labelled in done), torch.zeros(2, dtype=torch.int64, device=self.device))
        return LabelBlock(
            sorted(labels, key=lambda pair: pair[0]), tuple(correct.tolist()), dict(sorted(skipped.items()))
        )

    def _label(self, group: list[tuple[int, Tensor]]) -> _Labelled:
        indices = [index for index, _ in group]
        try:
            return self._labelled(indices, torch.stack([pixels for _, pixels in group]))
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{len(group)} images of {group[0][1].shape[1]}x{group[0][1].shape[2]} do not fit into "
                "the memory of the GPU; start again with a smaller --batch_size (finished blocks are kept)"
            ) from error

    def _labelled(self, indices: list[int], pixels: Tensor) -> _Labelled:
        truth = torch.from_numpy(self.records.labels[indices])
        if self.device.type == "cuda":  # from pageable memory a copy would wait for the device
            pixels, truth = pixels.pin_memory(), truth.pin_memory()
        images = pixels.to(self.device, non_blocking=True)  # uint8 [B, 3, H, W]
        truth = truth.to(self.device, non_blocking=True)
        if self.device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        images = images.float().sub_(self._mean).div_(self._std)
        logits = self.teacher(images, self.autocast)  # cells [B, h, w, C], image [B, C]
        scores, classes = logits.cells.topk(self.top_k, dim=3)  # [B, h, w, k]
        ranked = logits.image.topk(min(5, logits.image.shape[1]), dim=1).indices  # [B, 5]
        hits = ranked == truth[:, None]
        correct = torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
        return _Labelled(
            indices, scores.permute(0, 3, 1, 2).half(), classes.permute(0, 3, 1, 2).to(torch.int16), correct
        )

    def _maps(self, labelled: _Labelled) -> list[tuple[int, TokenLabelMap]]:
        scores = np.ascontiguousarray(labelled.scores.cpu().numpy())
        classes = np.ascontiguousarray(labelled.classes.cpu().numpy())
        finite = np.isfinite(scores).all((1, 2, 3))
        if not finite.all():
            path = self.records.name(labelled.indices[int(np.argmin(finite))])
            raise ValueError(
                f"the teacher's scores of {path} are not finite, or exceed float16; try --precision fp32, and "
                "check that the weights belong to this teacher"
            )
        maps = (TokenLabelMap(*pair) for pair in zip(scores, classes, strict=True))
        return list(zip(labelled.indices, maps, strict=True))
