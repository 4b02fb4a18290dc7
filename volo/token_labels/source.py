"""The label maps of the training images: which entry belongs to which image, and how it follows the augmentation."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np

from volo.data.pixels.transforms import Plan
from volo.token_labels import aligned, published
from volo.token_labels.opening import check_orientation, match_images, open_labels
from volo.token_labels.pt_folder import PublishedLabels, sample
from volo.token_labels.store import TokenLabelMap, TokenLabelStore, label_key

# Reading one takes some 0.3 ms from memory, and some 10 ms over a network.
_FILES_TRIED = 1000

# Two modules with the same functions; the name is looked up only here.
_GEOMETRIES = {"aligned": aligned, "published": published}

_logger = logging.getLogger("volo")


class LabelSource:
    """Label maps of the training images, which follow each sample's augmentation.

    Args:
        root: A packed store or a folder in the published layout.
        names: Name of each image, as in :class:`volo.data.sources.base.ImageSource`.
        classes: Class names in index order.
        grid: (rows, columns) of the network's final token grid.
        geometry: "aligned" or "published".
        exif: What the run does with orientation tags, "ignore" or "apply"; the labels must have been made the same way.
        verify_checksums: Read all of a packed store and compare its checksums.

    Raises:
        ValueError: No such labels, labels of another data set or teacher, or images without a label.
    """

    def __init__(
        self,
        root: str,
        names: Iterable[str],
        classes: tuple[str, ...],
        grid: tuple[int, int],
        geometry: str,
        exif: str = "ignore",
        verify_checksums: bool = False,
    ):
        self.labels = open_labels(root)
        if verify_checksums:
            if not isinstance(self.labels, TokenLabelStore):
                raise ValueError(
                    f"token_label.verify_checksums is on, but {root} is a folder of .pt files, which have none. Pack "
                    "it with scripts/pack_token_labels.py, which reads and checks every file"
                )
            self.labels.verify_checksums()
        check_orientation(self.labels, exif)
        self.entries: np.ndarray = match_images(self.labels, [label_key(name) for name in names], len(classes), classes)
        self.grid = grid
        self.geometry = geometry
        self._rules = _GEOMETRIES[geometry]
        self._map_hw = self.labels.map_hw(self.entries) if self._rules.ONE_SIZE else None

    def try_files(self, on_error: str) -> None:
        """Read label files of the published layout: all of them if they are few, else a sample.

        Does nothing for a packed store, whose maps were checked when they were packed.

        Args:
            on_error: "fail", or "skip" to continue if fewer than half of the files are damaged.

        Raises:
            ValueError: Files are damaged; the message names the first.
        """
        if not isinstance(self.labels, PublishedLabels):
            return
        tried, damaged = sample(len(self.entries), _FILES_TRIED), []
        for index in tried:
            try:
                self._read(index)
            except ValueError as error:
                damaged.append(str(error))
        if not damaged:
            return
        count = f"{len(damaged):,} of {len(tried):,} label files tried are damaged"
        if on_error == "fail" or 2 * len(damaged) >= len(tried):
            raise ValueError(f"{count}: {damaged[0]} (scripts/pack_token_labels.py checks every file)")
        _logger.warning("%s; data.on_error is skip, so other images replace theirs:", count)
        for reason in damaged[:10]:
            _logger.warning("  %s", reason)

    def transformed(self, index: int, plan: Plan, image_hw: tuple[int, int], out_hw: tuple[int, int]):
        """Return what each token takes from the label map of image ``index``, once ``plan`` is applied to the image.

        Args:
            index: Index of the image in the records.
            plan: The augmentation of the pixels.
            image_hw: Size of the decoded image, in pixels.
            out_hw: Size of the network's input, in pixels.

        Raises:
            ValueError: The label is damaged; the message names it.
        """
        return self._rules.transformed(self._read(index), plan, image_hw, out_hw, self.grid, self.labels.header.covers)

    def collate(self, samples: Sequence):
        """Return the maps of a batch from the results of :meth:`transformed`; they have ``map`` and ``targets``."""
        return self._rules.collate(samples)

    def _read(self, index: int) -> TokenLabelMap:
        entry = int(self.entries[index])
        labels = self.labels.read(entry)
        found = labels.scores.shape[1:]
        if self._map_hw is not None and found != self._map_hw:
            raise ValueError(
                f"{self.labels.path}: the map of {self.labels.key(entry)} has {found[0]}x{found[1]} cells, others have "
                f"{self._map_hw[0]}x{self._map_hw[1]}, and token_label.geometry published takes only one size. "
                "Generate it again, or set token_label.geometry to aligned"
            )
        return labels

    def __str__(self) -> str:
        header = self.labels.header
        unchecked = isinstance(self.labels, TokenLabelStore) and not self.labels.has_checksums
        return (
            f"{self.labels.path}: top {header.top_k} of {header.teacher}, {header.covers}, read as {self.geometry} "
            f"for a grid of {self.grid[0]}x{self.grid[1]} tokens"
            f"{' (without checksums of its maps, as packed by earlier code)' if unchecked else ''}"
        )
