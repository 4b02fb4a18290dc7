"""The published layout of token labels: a folder of small files, ``<root>/<class>/<stem>.pt``.

Each file holds one tensor [2, k, h, w], float16 in the published archive: the raw logits of the k best classes of
each of h x w cells (rows, columns), and the indices of those classes as numbers of the same type. n files.
"""

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from volo.runtime.files import refuse_special
from volo.token_labels.store import MAX_CLASSES, StoreHeader, TokenLabelMap, check_map

_SUFFIX = ".pt"
_FILES_FOR_SHAPE = 5
# Above it float16 skips integers, so a class index stored in it may be that of a neighbour.
EXACT_IN_FLOAT16 = 2048


class PublishedLabels:
    """The label files under a folder, in the order of their paths; hidden files are ignored.

    Args:
        root: The folder.
        num_classes: Classes of the teacher, which the files do not state; None accepts every class index until
            :meth:`expect_classes`.

    Raises:
        ValueError: No such folder, or no label file in it.
    """

    def __init__(self, root: str | os.PathLike, num_classes: int | None = None):
        self.path = Path(root).absolute()
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder; give the folder of the label files or a packed store")
        files = sorted(files_below(self.path))
        stems = [file.removesuffix(_SUFFIX) for file in files if file.endswith(_SUFFIX)]
        if not stems:
            raise ValueError(
                f"{self.path} holds no token labels, neither {_SUFFIX} files nor a packed store. Give the folder of "
                "the label files, or a store that scripts/pack_token_labels.py wrote"
            )
        self.ignored = len(files) - len(stems)  # files of other kinds
        # One array rather than a list: a million Python strings would be copied into every worker as their
        # reference counts are touched.
        self._stems = np.array([os.fsencode(stem) for stem in stems])
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self._stems)

    @property
    def header(self) -> StoreHeader:
        """What the labels have in common, as far as a few files show; ValueError if none of them is a label."""
        return StoreHeader("published", "center_crop", self._shape[0], self._num_classes, None, len(self))

    def map_hw(self, entries: np.ndarray) -> tuple[int, int]:
        """Return the height and width that maps have, as far as a few files show."""
        return self._shape[1:]

    @functools.cached_property
    def _shape(self) -> tuple[int, int, int]:
        """The most common (k, height, width) of a few files: any one of them may be damaged."""
        counts, failures = Counter(), []
        for entry in sample(len(self), _FILES_FOR_SHAPE):
            try:
                counts[tuple(_load_tensor(self._file(entry)).shape[1:])] += 1
            except ValueError as error:
                failures.append(error)
        if not counts:
            raise failures[0]
        return counts.most_common(1)[0][0]

    def expect_classes(self, num_classes: int) -> None:
        """Make reading refuse class indices of ``num_classes`` and above from now on."""
        self._num_classes = num_classes

    def key(self, entry: int) -> str:
        """Return the path of an entry's file without its suffix."""
        return os.fsdecode(self._stems[entry])

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the entry of each key, int64 [n]; -1 where there is none.

        A key without a file of its name is looked up by its part before the first dot, because the published code
        cuts the names of label files there: "n01/a.b.JPEG" becomes "n01/a".

        Raises:
            ValueError: Several keys are cut to the name of one file, which can be the label of only one of them.
        """
        entry_of = {stem: entry for entry, stem in enumerate(self._stems.tolist())}
        found, cut = [], set()
        for key in keys:
            entry = entry_of.get(os.fsencode(key))
            if entry is None and (entry := entry_of.get(os.fsencode(key.split(".")[0]))) is not None:
                cut.add(entry)
            found.append(-1 if entry is None else entry)
        if cut:
            uses = Counter(entry for entry, _ in set(zip(found, keys, strict=True)))
            for entry in cut:
                if uses[entry] > 1:
                    names = [key for key, other in zip(keys, found, strict=True) if other == entry]
                    raise ValueError(
                        f"{self._file(entry)} would be the label of {len(names)} images ({', '.join(names[:10])}): "
                        "the published layout cuts names at their first dot. Generate labels for this folder with "
                        "scripts/generate_token_labels.py"
                    )
        return np.array(found, dtype=np.int64)

    def read(self, entry: int) -> TokenLabelMap:
        """Return the map of an entry; ValueError names a file that is not a label map."""
        assert 0 <= entry < len(self), f"entry {entry} of {len(self)}"
        path = self._file(entry)
        tensor = _load_tensor(path)
        label = TokenLabelMap(tensor[0].half().numpy(), _class_indices(tensor[1], path))
        check_map(label, self._shape[0], self._num_classes, str(path))
        return label

    def _file(self, entry: int) -> Path:
        return self.path / (self.key(entry) + _SUFFIX)


def sample(count: int, most: int) -> list[int]:
    """Return up to ``most`` of the numbers 0 ... count - 1, spread evenly, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)).tolist()


def files_below(root: Path) -> Iterator[str]:
    """Yield the visible files under ``root``, relative to it, with forward slashes."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(folder).relative_to(root).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        yield from (prefix + name for name in files if not name.startswith("."))


def _load_tensor(path: Path) -> Tensor:
    """Return the tensor [2, k, h, w] of a label file."""
    try:
        refuse_special(os.stat(path))
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:  # a fault of the machine, not of the file
        raise
    except Exception as error:  # torch's readers raise anything from EOFError to UnpicklingError on broken bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a file of one tensor"
        raise _no_label(path, reason) from error
    if not isinstance(tensor, Tensor):
        raise _no_label(path, f"it holds a {type(tensor).__name__}")
    if tensor.dtype not in (torch.float16, torch.float32) or tensor.layout != torch.strided:
        raise _no_label(path, f"its values are {tensor.dtype}, {tensor.layout}")
    if tensor.ndim != 4 or tensor.shape[0] != 2 or 0 in tensor.shape:
        raise _no_label(path, f"its shape is {list(tensor.shape)}")
    return tensor.detach()


def _class_indices(plane: Tensor, path: Path) -> np.ndarray:
    """Return the plane of class indices [k, h, w] as int16."""
    values = plane.float().numpy()
    if not np.array_equal(values, np.rint(values)):  # NaN equals nothing
        raise _no_label(path, "its second plane does not hold class indices")
    highest = values.max()
    if highest >= MAX_CLASSES:
        raise _no_label(
            path, f"its class index {highest:.0f} is above {MAX_CLASSES - 1:,}, the largest that can be stored"
        )
    if plane.dtype == torch.float16 and highest > EXACT_IN_FLOAT16:
        raise ValueError(
            f"{path} gives class index {highest:.0f} in float16, which is exact only up to {EXACT_IN_FLOAT16:,}; "
            "generate labels with scripts/generate_token_labels.py, or save them as float32"
        )
    return values.clip(-1).astype(np.int16)  # any index below zero is refused in check_map


def _no_label(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is not a token label: {reason}; it should be one float16 tensor [2, k, height, width], scores and "
        "class indices. Generate or download it again"
    )
