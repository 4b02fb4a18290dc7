"""The label maps of a list of images: which entry belongs to which image, and how it is read."""

from collections.abc import Iterable

import numpy as np

from volo.data.augment import Plan
from volo.token_labels.geometry import TokenCells, token_cells
from volo.token_labels.opening import check_covers, open_labels
from volo.token_labels.store import TokenLabelStore, label_key


class LabelSource:
    """Label maps of the training images, led through each sample's augmentation.

    Args:
        root: A packed store or a folder in the published layout.
        names: Name of each image, as :class:`volo.data.source.Source` has it.
        classes: Class names in index order.
        grid: (rows, columns) of the network's final token grid.
        geometry: "aligned" or "reference".
        verify_checksums: Read all of a packed store and compare its checksums.

    Raises:
        ValueError: No such labels, of another data set or teacher, or not one for every image.
    """

    def __init__(
        self,
        root: str,
        names: Iterable[str],
        classes: tuple[str, ...],
        grid: tuple[int, int],
        geometry: str,
        verify_checksums: bool = False,
    ):
        self.labels = open_labels(root)
        if verify_checksums:
            if not isinstance(self.labels, TokenLabelStore):
                raise ValueError(
                    f"token_label.verify_checksums is on, but {root} is a folder of .pt files, which have none: pack "
                    "it with scripts/pack_token_labels.py, which reads and checks every one"
                )
            self.labels.verify_checksums()
        self.entries: np.ndarray = check_covers(self.labels, [label_key(name) for name in names], len(classes), classes)
        self.grid = grid
        self.geometry = geometry

    def cells(self, index: int, plan: Plan, image_hw: tuple[int, int], out_hw: tuple[int, int]) -> TokenCells:
        """Return what each token takes from the label map of image ``index`` after ``plan``.

        Raises ValueError, naming the label, where it is damaged.
        """
        labels = self.labels.read(int(self.entries[index]))
        return token_cells(labels, plan, image_hw, out_hw, self.grid, self.geometry, self.labels.header.geometry)

    def __str__(self) -> str:
        header = self.labels.header
        return (
            f"{self.labels.path}: top {header.top_k} of {header.teacher}, {header.geometry}, read as {self.geometry} "
            f"for a grid of {self.grid[0]}x{self.grid[1]} tokens"
        )
