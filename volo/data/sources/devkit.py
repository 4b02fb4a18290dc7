"""The development kit of ILSVRC2012, which gives the synset of each of the 50,000 validation images.

Two files of the kit (ILSVRC2012_devkit_t12.tar.gz, or the folder unpacked from it) are read: data/meta.mat has the
number and the synset ("WNID") of each class, where numbers up to 1,000 are the classes of the challenge;
data/ILSVRC2012_validation_ground_truth.txt has the class number of image 1, image 2, ...
"""

import io
import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


def is_devkit(path: str) -> bool:
    """Tell whether ``path`` is a development kit rather than a labels file: a folder, or a tar archive."""
    return os.path.isdir(path) or path.endswith((".tar.gz", ".tgz", ".tar"))


def validation_synsets(names: Iterable[str], devkit: str) -> list[str]:
    """Return the synset of each official validation file, by the number in its name.

    Raises ValueError if the kit is incomplete, or an image is not named like an official one.
    """
    truth = ground_truth(devkit)
    synsets = []
    for name in names:
        found = _NAME.fullmatch(name.rsplit("/", 1)[-1])
        if not found or not 1 <= int(found[1]) <= len(truth):
            raise ValueError(
                f"{devkit} labels ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(truth):08d}.JPEG, but there is "
                f"an image {name}. Give a labels file instead (data.train_labels, data.val_labels)"
            )
        synsets.append(truth[int(found[1]) - 1])
    return synsets


def ground_truth(devkit: str) -> list[str]:
    """Return the synset of validation image 1, 2, ...; ValueError if the kit is incomplete."""
    files = _read(devkit, (_META, _TRUTH))
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(f"Reading {devkit} needs the package scipy: pip install scipy") from error
    try:
        meta = loadmat(io.BytesIO(files[_META]), squeeze_me=True)["synsets"]
        synset_of = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in meta}
        return [synset_of[int(number)] for number in files[_TRUTH].split()]
    except Exception as error:  # scipy has errors of its own for damaged files
        raise ValueError(
            f"{devkit} is not the development kit of ILSVRC2012: {_META} or {_TRUTH} cannot be parsed "
            f"({type(error).__name__}: {error})"
        ) from error


def _read(devkit: str, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Return the content of the files whose paths end with each of ``wanted``."""
    found: dict[str, bytes] = {}
    if os.path.isdir(devkit):
        for file in Path(devkit).rglob("*"):
            found |= {name: file.read_bytes() for name in wanted if file.as_posix().endswith(name) and file.is_file()}
    else:
        try:
            with tarfile.open(devkit) as archive:
                for member in archive:
                    for name in wanted:
                        wanted_here = member.isfile() and member.name.endswith(name)
                        if wanted_here and (content := archive.extractfile(member)):
                            found[name] = content.read()
        except (OSError, EOFError, tarfile.TarError) as error:
            raise ValueError(f"{devkit} cannot be read ({error}). Copy it again") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{devkit} has no {' and no '.join(missing)}. Give the development kit of tasks 1 and 2 ({ARCHIVE}), or "
            "the folder unpacked from it"
        )
    return found
